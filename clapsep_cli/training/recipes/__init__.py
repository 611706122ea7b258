"""Recipes for training mini, CLAPSep and TUSS, with presets and shared parts."""
