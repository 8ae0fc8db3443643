"""Train the composed config: `torchrun --nproc-per-node=4 train.py parallel=fsdp_tp train.steps=20`."""

from tpresearch.launch import Run, entrypoint
from tpresearch.train.preflight import Preflight, preflight


@entrypoint("train", judge=preflight)
def main(judged: Preflight, run: Run) -> None:
    from tpresearch.train.main import train  # late: a refused config should not wait for all of torch

    train(judged, run)


if __name__ == "__main__":
    main()
