"""A program with a trivial main: what a user sees of an entrypoint, without any training.

The name of the run chooses what goes wrong. Ranks can be made to start apart by JITTER_S seconds each.
"""

import logging
import os
import signal
import time
import warnings

from hydra.core.hydra_config import HydraConfig

from tpresearch.config import Config, ConfigError
from tpresearch.launch import Run, World, entrypoint

RANK = int(os.environ.get("RANK", 0))
time.sleep(float(os.environ.get("JITTER_S", 0)) * RANK)


def preflight(cfg: Config, world: World) -> Config:
    if cfg.name == "too_few_ranks" and world.size == 1:
        raise ConfigError("mesh.tp", 2, f"cannot divide {world.size}", "1, or 2 ranks", nproc=2)
    if cfg.name == "bug_in_judge":
        raise ValueError("not the user's fault")
    return cfg


@entrypoint("train", preflight=preflight)
def main(cfg: Config, run: Run) -> None:
    log = logging.getLogger("tpresearch.program")
    log.info("training %s", cfg.model.name)
    log.warning("warned by rank %d", run.world.rank)
    warnings.warn(f"python warned rank {run.world.rank}", stacklevel=1)
    if cfg.name == "refused_late":
        raise ConfigError("data.path", cfg.data.path, "holds no rows", "a path with text in it")
    if cfg.name == "bug" and run.world.rank == run.world.size - 1:
        raise ValueError("not the user's fault")
    if cfg.name == "fails_once" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        raise ValueError("the first attempt fails")
    if cfg.name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if cfg.name == "sleeps":
        (run.folder / "asleep").touch()
        time.sleep(600)
    hydra = HydraConfig.get()
    typed, model = list(hydra.overrides.task), hydra.runtime.choices["model"]
    told = f"{hydra.output_subdir} rank {run.world.rank} of {run.world.size} {typed} {model}"
    print(f"folder {run.folder} {told}\n", end="")  # in one write, which no other rank can cut in two


if __name__ == "__main__":
    main()
