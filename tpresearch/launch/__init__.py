"""From a command line to a run: compose, validate, agree on a folder, log, call main; or refuse in one line."""

from tpresearch.config.world import World
from tpresearch.launch.entrypoint import Run, entrypoint

__all__ = ["Run", "World", "entrypoint"]
