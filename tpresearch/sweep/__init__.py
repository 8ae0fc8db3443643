"""Sweeps: `python train.py -m ...` runs each job under a torchrun of its own, and ends in one table."""

from tpresearch.sweep.launcher import JobFailed
from tpresearch.sweep.plugin import register_launchers

__all__ = ["JobFailed", "register_launchers"]
