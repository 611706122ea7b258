"""Separates one recording in memory and measures its parts."""
