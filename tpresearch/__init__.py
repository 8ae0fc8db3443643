"""tpresearch: understand and compare tensor, sequence, fully-sharded and 2D parallelism."""
