"""Sweeps: `python train.py -m ...` runs each job under its own torchrun, and ends with one table."""
