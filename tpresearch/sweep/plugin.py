"""How Hydra comes to know our launchers."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

from hydra.core.plugins import Plugins

from tpresearch.sweep.launcher import TorchrunLauncher
from tpresearch.sweep.slurm import SlurmLauncher


def register_launchers() -> None:
    """Make `hydra/launcher=torchrun` and `hydra/launcher=slurm` known.

    Hydra takes a launcher only from a package hydra_plugins, and looks it up there by name: it gets one, beside
    what other plugins there are, so that ours needs no folder outside tpresearch.
    """
    launchers = (TorchrunLauncher, SlurmLauncher)
    for launcher in launchers:
        Plugins.instance().register(launcher)
    package, _, name = TorchrunLauncher.__module__.partition(".")
    try:
        plugins = importlib.import_module(package)
    except ModuleNotFoundError:
        plugins = sys.modules[package] = ModuleType(package)
    setattr(plugins, name, SimpleNamespace(**{launcher.__name__: launcher for launcher in launchers}))
