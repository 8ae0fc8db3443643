"""The panels of a comparison as a W&B workspace and report."""
