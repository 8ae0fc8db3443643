"""Simulation of a step of the real code on fake ranks: will it fit, how fast will it be, which plan to choose."""
