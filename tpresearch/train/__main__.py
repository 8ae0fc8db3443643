"""`python -m tpresearch.train`: train the composed config, from any folder; `train.py` is the same command."""

from __future__ import annotations

from functools import partial

from tpresearch.launch import Run, entrypoint
from tpresearch.train.preflight import Preflight, glance, judge_folder, preflight


@entrypoint(
    "train",
    judge=preflight,
    judge_folder=judge_folder,
    glance=glance,
    judge_resumed=partial(preflight, resumes=True),
)
def main(judged: Preflight, run: Run) -> None:
    from tpresearch.train.main import train  # late: a refused config should not wait for all of torch

    train(judged, run)


if __name__ == "__main__":
    main()
