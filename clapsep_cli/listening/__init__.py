"""Measures and shows what recordings and their parts hold: levels, presence, events, sounds by name, pictures."""
