"""Ranks of hosts whose command, code or rows differ are refused on every rank, in one sentence."""

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from support.composed import VOCAB, config, corpus
from torch import nn

from tpresearch.config import ConfigError
from tpresearch.config.world import World
from tpresearch.launch import Run
from tpresearch.launch.agents_store import tell_other_hosts
from tpresearch.models.toy_mlp import ToyLM
from tpresearch.parallel.group import process_group
from tpresearch.train import main, same_job
from tpresearch.train.preflight import preflight
from tpresearch.train.same_job import check_same_job, code_hash
from tpresearch.verify.ranks import Ranks

OF_RANK_1 = {
    "optimizer.lr=0.5": "optimizer.lr=0.003: rank 1 has 0.5; the same command, conf and code on every host",
    "model=toy_net": "model=toy_mlp: rank 1 has toy_net; ",
    "train.seed=7": "train.seed=0: rank 1 has 7; ",
    "checkpoint.every=3": "checkpoint.every=1000: rank 1 has 3; ",
    "init_from=elsewhere": "init_from=null: rank 1 has elsewhere; ",
    "+model.plans.tp.more={match: output, style: colwise}": "model.plans.tp.more=null: rank 1 has {",
}

SHAPES = "parameters.mlp.in_proj.weight=[32, 64] of torch.float32: rank 1 has [64, 64] of torch.float32; "
ORDER = "its parameters are in another order on rank 1: a.weight in the place of b.weight; "


def meet(world: World) -> None:
    common = ("model=toy_mlp", "parallel=ddp")
    job, rows = preflight(config(*common), world), corpus()
    assert job.device
    with process_group(job.device, world):
        check_same_job(job, rows)
        for typed, sentence in OF_RANK_1.items():
            cfg = config(*common, *([typed] if world.rank else []))
            with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
                check_same_job(replace(job, cfg=cfg), rows)
        own = [f"{key}=of_rank_{world.rank}" for key in ("name", "data.cache_dir", "data.path", "logger.dir")]
        check_same_job(replace(job, cfg=config(*common, *own)), rows)
        with (
            patch.object(same_job, "code_hash", lambda _: str(world.rank)),
            pytest.raises(ConfigError, match=r"^code=0: rank 1 has 1; "),
        ):
            check_same_job(job, rows)
        with torch.device("meta"):
            of_this_host = ToyLM(VOCAB, 64, 32 * (1 + world.rank))
        with pytest.raises(ConfigError, match=re.escape(SHAPES)):
            check_same_job(replace(job, model=of_this_host), rows)
        in_order = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("ab" if world.rank else "ba")})
        with pytest.raises(ConfigError, match=re.escape(ORDER)):
            check_same_job(replace(job, model=in_order), rows)
        with pytest.raises(ConfigError, match="ranks 0 and 1 prepared different rows from it"):
            check_same_job(job, replace(rows, tokenizer_hash=f"of rank {world.rank}"))


def test_ranks_of_different_jobs_are_refused(ranks: Ranks) -> None:
    ranks.run(2, meet)


def end(world: World, folder: Path) -> str:
    """What each of two hosts is refused for, of which one finds the run complete; both find it so the second time."""
    host = replace(world, local_rank=0, local_size=1)
    job = preflight(config("model=toy_mlp", "parallel=ddp", "data=random_tokens"), host)
    run = Run(folder, host)
    with patch.object(main, "is_complete", lambda *_: world.rank == 1), pytest.raises(ConfigError) as refused:
        main.train(job, run)
    tell_other_hosts(refused.value, host)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    with patch.object(main, "is_complete", lambda *_: True):
        main.train(job, run)
    return str(refused.value)


def test_a_run_that_is_complete_on_the_disk_of_one_host_is_refused_on_all(
    ranks: Ranks, tmp_path: Path
) -> None:
    first, second = ranks.run(2, end, tmp_path)
    why = "resume=auto: the run is complete in the folder that rank 1 sees, and not in that of rank 0"
    assert first == f"{why}; a run folder on a disk that all hosts share"
    assert second == f"{why} (on rank 0); a run folder on a disk that all hosts share"


def test_code_is_that_of_the_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of what its module has imported from its folder, by name or as a module."""
    monkeypatch.syspath_prepend(tmp_path)
    own = {
        "own_model": "from torch import nn\nfrom own_layers import Layer\n\nclass Own(nn.Module): ...\n",
        "own_layers": "import own_ops\n\nclass Layer: ...\n",
        "own_ops": "def double(x): return 2 * x\n",
        "own_notes": "NOTE = 1\n",
    }
    for name, text in own.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    model = importlib.import_module("own_model").Own()
    importlib.import_module("own_notes")
    before = code_hash(model)
    assert code_hash(model) == before
    for name, text in own.items():
        (tmp_path / f"{name}.py").write_text(text + "# changed\n")
        assert (code_hash(model) != before) == (name != "own_notes")
        (tmp_path / f"{name}.py").write_text(text)


def test_a_model_of_a_notebook_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = ModuleType("notebook_of_a_test")
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    of_notebook = type("Own", (nn.Module,), {"__module__": notebook.__name__})
    assert code_hash(of_notebook()) != code_hash(nn.Linear(1, 1))
