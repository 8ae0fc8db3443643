"""Sweeps: `python train.py -m ...` runs each job under a torchrun of its own, and ends in one table."""
