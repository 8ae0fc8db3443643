"""What one optimizer step sends and holds, measured, and by closed formulas beside it."""
