"""The plan compiler: a model's named sharding rules, resolved and judged on a meta model. No process group in this room."""
