"""Runs beside each other: a table on the terminal, one self-contained page, and its charts as PNGs."""
