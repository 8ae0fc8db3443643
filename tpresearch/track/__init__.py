"""Tracking of a run, on rank 0: its record on disk, Weights & Biases, the terminal."""
