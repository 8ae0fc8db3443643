"""What one optimizer step sends and holds: measured, and expected by closed formulas."""
