"""`python -m tpresearch.prepare`: prepares what a run would read, and says what that is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cli


def prepare_command(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    run_dir = f"hydra.run.dir={tmp_path / 'run'}"
    command = [sys.executable, "-m", "tpresearch.prepare", f"data.cache_dir={tmp_path / 'cache'}", run_dir]
    return subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=1500, check=False)


def test_it_says_what_was_prepared(texts: Path, tmp_path: Path) -> None:
    words = ("data=text", f"data.path='{texts}/**/*.txt'", "tokenizer.vocab_size=400", "data.seq_len=16")
    ran = prepare_command(tmp_path, *words)
    assert ran.returncode == 0, ran.stderr
    [folder] = (tmp_path / "cache/tokens").glob("text-*")
    meta = json.loads((folder / "meta.json").read_text())
    assert str(folder) in ran.stdout
    assert meta["corpus_hash"] in ran.stdout
    for part in ("train", "held_out"):
        counts = meta[part]
        expected = [counts["documents"], counts["tokens"], counts["tokens"] // 17]
        [line] = re.findall(rf"^{part} +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+)$", ran.stdout, re.MULTILINE)
        assert [int(number.replace(",", "")) for number in line[:3]] == expected
        assert float(line[3]) == pytest.approx(counts["bytes"] / counts["tokens"], abs=0.005)


@pytest.mark.parametrize("record", ['{"text": 5}', '{"body": "a text"}'])
def test_a_record_that_only_preparing_reads_is_refused_without_the_same_command_to_try(
    tmp_path: Path, record: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a text"}\n' * 40 + record)
    ran = prepare_command(tmp_path, "data=jsonl", f"data.path={tmp_path}/a.jsonl", "tokenizer.vocab_size=300")
    assert ran.returncode == 2
    [line] = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert f"in {tmp_path}/a.jsonl, line 41; " in line
    assert "; try: python -m tpresearch.prepare data.cache_dir=" in line
    assert line.endswith(" data.text_field=VALUE")
