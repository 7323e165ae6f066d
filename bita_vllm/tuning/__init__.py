"""Offline only: `bita tune`, which times steps and chooses rows by load, and the simulator."""
