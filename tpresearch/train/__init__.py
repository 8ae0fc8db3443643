"""The loop: loss, step, optimizer and schedule, evaluation, metrics. `loop.train` tells the whole story."""
