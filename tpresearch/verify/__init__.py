"""Verification that a plan computes what a single process does."""
