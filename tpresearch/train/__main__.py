"""`python -m tpresearch.train`: train the composed config, from any folder; `train.py` is the same command."""

from __future__ import annotations

from functools import partial

from tpresearch.launch import Run, entrypoint
from tpresearch.train.preflight import Preflight, check_folder, preflight, quick_check


@entrypoint(
    "train",
    preflight=preflight,
    check_folder=check_folder,
    quick_check=quick_check,
    preflight_resumed=partial(preflight, resumes=True),
)
def main(job: Preflight, run: Run) -> None:
    from tpresearch.train.main import train  # late: a refused config should not wait for all of torch

    train(job, run)


if __name__ == "__main__":
    main()
