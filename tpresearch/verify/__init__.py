"""Parity: whether a plan computes the same thing as one process."""
