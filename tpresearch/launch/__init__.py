"""From a command line to a run: compose, refuse or agree on a folder, log, call main."""

from tpresearch.config.world import World
from tpresearch.launch.entrypoint import entrypoint
from tpresearch.launch.run import Run

__all__ = ["Run", "World", "entrypoint"]
