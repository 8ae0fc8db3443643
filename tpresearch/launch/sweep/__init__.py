"""Sweeps: `python train.py -m ...` runs each job under a torchrun of its own, and ends in one table."""

from tpresearch.launch.sweep.launcher import JobFailed, register_launcher

__all__ = ["JobFailed", "register_launcher"]
