"""Tracking of a run, on rank 0: its record on disk, Weights & Biases, the terminal."""

from tpresearch.track.tracker import RunFacts, Tracker

__all__ = ["RunFacts", "Tracker"]
