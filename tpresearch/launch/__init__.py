"""From a command line to a run: compose, refuse or agree on a folder, log, call main."""

from tpresearch.launch.entrypoint import entrypoint
from tpresearch.launch.run import Run
from tpresearch.launch.world import World

__all__ = ["Run", "World", "entrypoint"]
