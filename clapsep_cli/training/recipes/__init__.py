"""What can be trained: mini, CLAPSep and TUSS, the presets, and what the three share."""
