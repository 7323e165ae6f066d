"""Rows by load: which step block pays at which batch size, and `bita tune` (DESIGN section 8)."""
