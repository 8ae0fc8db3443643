"""Which plan to pick: every legal plan, mesh, checkpointing and micro-batch for some GPUs, ranked by the simulator."""
