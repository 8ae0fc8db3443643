"""Comparison of runs: a table on the terminal, a self-contained HTML page, and its charts as PNGs."""
