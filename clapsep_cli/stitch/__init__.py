"""Cuts recordings into windows and joins the results of the windows."""
