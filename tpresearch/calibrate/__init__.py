"""Calibration: measures the numbers of a cluster file on this machine."""
