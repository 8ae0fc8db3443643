"""Which plan to choose: every legal plan, mesh, checkpointing mode and micro-batch for some GPUs, ranked by the simulator."""
