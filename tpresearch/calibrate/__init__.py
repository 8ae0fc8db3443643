"""A machine's own numbers: what a cluster file of conf/cluster states, measured."""
