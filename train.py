"""Train the composed config: `torchrun --nproc-per-node=4 train.py parallel=fsdp_tp train.steps=20`."""

from tpresearch.config import Config
from tpresearch.launch import Run, entrypoint
from tpresearch.train.preflight import preflight


@entrypoint("train", check=preflight)
def main(cfg: Config, run: Run) -> None:
    from tpresearch.train.main import (
        train,
    )  # late: torch takes seconds to import, a refused config should not

    train(preflight(cfg, run.world), run)


if __name__ == "__main__":
    main()
