"""Training: loss, step, optimizer and schedule, evaluation, metrics. `main.train` is a run from start to end."""
