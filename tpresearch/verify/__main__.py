"""`python -m tpresearch.verify`: each plan against one process, from the same weights on the same batches."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, NamedTuple

from tpresearch.config import Config, ConfigError
from tpresearch.launch import Run, World, entrypoint


class Judged(NamedTuple):
    cfg: Config
    plans: dict[str, list[Config]]
    """For each plan one config per optimizer."""


def judge(cfg: Config, world: World) -> Judged:
    if world.size > 1:
        raise ConfigError(
            "WORLD_SIZE", world.size, "it starts its own ranks", "a start by python, without torchrun"
        )
    from tpresearch.verify.plans import check_plan, configs

    plans = configs(cfg, sys.argv[1:])
    for cfgs in plans.values():
        check_plan(cfgs[0])
    return Judged(cfg, plans)


@entrypoint("verify", judge=judge)
def main(judged: Judged, run: Run) -> None:
    from tpresearch.verify.plans import verify_plans
    from tpresearch.verify.report import print_table

    cfg = judged.cfg
    results = verify_plans(judged.plans, cfg)
    record: dict[str, Any] = {
        "model": cfg.model.name,
        "dtype": str(cfg.train.dtype),
        "world_size": cfg.verify.world_size,
        "steps": cfg.verify.steps,
        "passed": all(result.passed for result in results),
        "results": [dataclasses.asdict(result) | {"passed": result.passed} for result in results],
    }
    path = run.folder / "verify.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print_table(results, path)
    if not record["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
