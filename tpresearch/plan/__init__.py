"""The plan compiler: a model's named sharding rules, resolved and validated on a meta model. No process group here."""
