"""Checkpoints: a run's state by name; saved, committed, pruned, found again, verified and loaded under any plan."""
