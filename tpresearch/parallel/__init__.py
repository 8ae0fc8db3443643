"""From a plan in a config to a sharded model: mesh, plan compiler, parallelize, plan-independent weights."""
