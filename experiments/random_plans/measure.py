"""Random small language models under random sharding rules: is each refused, or does it train as one process does?

    python experiments/random_plans/measure.py [COUNT] [FIRST]

Each model is composed as a run composes it. What is refused is also trained without the check that refused it, where that can be left
out, and what is not refused is trained for three steps on gloo ranks in float64, beside one process. Writes results.csv (record.py says where).
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1]))
from random_plans.nets import SEQ, VOCAB, Net, net
from record import made_by, place, write_rows
from torch.distributed.device_mesh import DeviceMesh

import tpresearch
from tpresearch.config import Config, ConfigError
from tpresearch.config.model import model_config
from tpresearch.config.world import World
from tpresearch.data.pipeline import prepare
from tpresearch.data.rows import AnyCorpus
from tpresearch.parallel.device import Device
from tpresearch.train import assemble
from tpresearch.train.agreement import AgreedGradients
from tpresearch.train.loop import Loop
from tpresearch.train.observe import Observer
from tpresearch.train.preflight import Preflight, preflight
from tpresearch.verify import trace as traces
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.reference import reference
from tpresearch.verify.trace import EXACT, RunTrace, compare

HERE = Path(__file__).parent
STEPS, TOLERANCE = 3, 1e-9
RANKS = {"tp": 2, "sp": 2, "fsdp_tp": 4, "fsdp": 2, "ddp": 2}


def main() -> None:
    count, first = (
        int(sys.argv[at]) if len(sys.argv) > at else default for at, default in ((1, 400), (2, 0))
    )
    rows, ranks = [], Ranks(60)
    for seed in range(first, first + count):
        found = net(seed)
        what, why = outcome(found, ranks)
        rows.append(
            {
                "seed": seed,
                "plan": found.parallel,
                "rules_for": found.tensor,
                "mistake": found.mistake,
                "outcome": what,
                "why": why,
            }
        )
        print(f"{seed + 1 - first} of {count}: {what}{': ' * bool(why)}{why[:150]}", flush=True)
    write_rows(place(HERE) / "results.csv", rows, heading=made_by(HERE))
    print(
        *(f"{number:5}  {what}" for what, number in Counter(row["outcome"] for row in rows).most_common()),
        sep="\n",
    )


def outcome(found: Net, ranks: Ranks) -> tuple[str, str]:
    """What became of a model under its plan, and why."""
    size = RANKS[found.parallel]
    try:
        cfg = config_of(found)
        job = preflight(cfg, World(size=size, local_size=size, elastic=True))
    except ConfigError as error:
        needless = trained(found, ranks, checked=False) == ""
        return ("refused, though right" if needless else "refused"), str(error)
    wrong = trained(found, ranks)
    if wrong.startswith("refused: "):
        return "refused in the first step", wrong.removeprefix("refused: ")
    if job.plan.across_rows:
        return ("noted" if wrong else "noted, though right"), job.plan.across_rows
    return ("wrong" if wrong else "right"), wrong


def trained(found: Net, ranks: Ranks, checked: bool = True) -> str:
    """What differs from the training of one process, or how it ended; nothing if they are the same."""
    try:
        with left_out(checked):
            cfg = config_of(found)
            beside = reference(cfg, prepare(cfg.data, cfg.tokenizer), STEPS)
            trace = ranks.run(RANKS[found.parallel], train, found, checked)[0]
    except Exception as error:  # also a forward that does not run: the net is a random one
        return f"ended: {str(error).strip().splitlines()[-1]}"
    if isinstance(trace, str):
        return f"refused: {trace}"
    errors = compare(trace, beside)
    return ", ".join(
        what for what, found in errors.items() if not found.error <= (0 if what in EXACT else TOLERANCE)
    )


def train(world: World, found: Net, checked: bool) -> RunTrace | str:
    """A few steps on this rank, with the comparison of gradients that each run makes; or the sentence that refuses them."""

    def watched(
        job: Preflight, mesh: DeviceMesh, device: Device, corpus: AnyCorpus, observers: Sequence[Observer]
    ) -> Loop:
        return assemble.assemble(
            job, mesh, device, corpus, [*observers, AgreedGradients(job.cfg, job.plan, mesh)]
        )

    try:
        logging.disable()  # torch's own words for what ends in a sentence
        with left_out(checked), patch.object(traces, "assemble", watched):
            cfg = config_of(found)
            return traces.trace_run(cfg, prepare(cfg.data, cfg.tokenizer), world, STEPS)
    except ConfigError as error:
        return str(error)


@contextmanager
def left_out(checked: bool) -> Iterator[None]:
    """Context without the check of a rank's forward, unless it is wanted."""
    if checked:
        yield
    else:
        with patch("tpresearch.plan.one_rank.check_one_rank", lambda *_: None):
            yield


def config_of(found: Net) -> Config:
    """The config of a plan for it. Its class is importable in this process from now on."""
    module = types.ModuleType("random_net")
    exec(compile(found.source, "random_net.py", "exec"), vars(module))
    sys.modules["random_net"] = module
    size = RANKS[found.parallel]
    words = (
        f"parallel={found.parallel}",
        *(("mesh.tp=2", f"parallel.tensor={found.tensor}") if size == 4 else ()),
    )
    sizes = (
        f"data.seq_len={SEQ}",
        f"tokenizer.vocab_size={VOCAB}",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.eval_rows=4",
    )
    cfg = tpresearch.load(
        *words, *sizes, "data=random_tokens", "train.dtype=float64", "optimizer.lr=0.01", "logger=none"
    )
    model = {
        "name": "random_net",
        "_target_": "random_net.Net",
        "vocab_size": VOCAB,
        "blocks": ["blocks.*"],
        "plans": {found.tensor: found.rules},
    }
    return dataclasses.replace(cfg, model=model_config(model))


if __name__ == "__main__":
    main()
