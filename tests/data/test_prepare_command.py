"""`python -m tpresearch.prepare`: prepares what a run would read, and says what that is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.commands import ROOT, Done, environment, execute_warm

from tpresearch.verify.ranks import Ranks

pytestmark = pytest.mark.cli


def prepare_command(ranks: Ranks, tmp_path: Path, *overrides: str) -> Done:
    words = ("-m", "tpresearch.prepare", f"data.cache_dir={tmp_path / 'cache'}", "hydra.run.dir=run")
    env = environment(tmp_path, PYTHONPATH=str(ROOT))
    return execute_warm(ranks, None, (*words, *overrides), tmp_path, env)


def test_it_says_what_was_prepared(ranks: Ranks, texts: Path, tmp_path: Path) -> None:
    words = ("data=text", f"data.path='{texts}/**/*.txt'", "tokenizer.vocab_size=400", "data.seq_len=16")
    ran = prepare_command(ranks, tmp_path, *words)
    assert ran.code == 0, ran.err
    [folder] = (tmp_path / "cache/tokens").glob("text-*")
    meta = json.loads((folder / "meta.json").read_text())
    assert str(folder) in ran.out
    assert meta["corpus_hash"] in ran.out
    for part in ("train", "held_out"):
        counts = meta[part]
        expected = [counts["documents"], counts["tokens"], counts["tokens"] // 17]
        [line] = re.findall(rf"^{part} +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+)$", ran.out, re.MULTILINE)
        assert [int(number.replace(",", "")) for number in line[:3]] == expected
        assert float(line[3]) == pytest.approx(counts["bytes"] / counts["tokens"], abs=0.005)


@pytest.mark.parametrize("record", ['{"text": 5}', '{"body": "a text"}'])
def test_a_record_that_only_preparing_reads_is_refused_without_the_same_command_to_try(
    ranks: Ranks, tmp_path: Path, record: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a text"}\n' * 40 + record)
    words = ("data=jsonl", f"data.path={tmp_path}/a.jsonl", "tokenizer.vocab_size=300")
    ran = prepare_command(ranks, tmp_path, *words)
    assert ran.code == 2
    line = ran.refusal
    assert f"in {tmp_path}/a.jsonl, line 41; " in line
    assert "; try: python -m tpresearch.prepare data.cache_dir=" in line
    assert line.endswith(" data.text_field=VALUE")
