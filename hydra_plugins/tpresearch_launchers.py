"""The launchers of `-m`, in the namespace package that Hydra looks for plugins in.

Hydra imports this at the start of every command, so it must stay light: no torch, no submitit.
"""

from tpresearch.sweep import (  # the modules: a class that is imported here would be taken for a plugin
    launcher,
    slurm,
)


class TorchrunLauncher(launcher.TorchrunLauncher):
    """`hydra/launcher=torchrun`"""


class SlurmLauncher(slurm.SlurmLauncher):
    """`hydra/launcher=slurm`"""
