"""`python -m tpresearch.prepare data=... tokenizer=...`: tokenize and pack a run's data ahead of time."""

from __future__ import annotations

import logging
import math

from tpresearch.config import Config, ConfigError
from tpresearch.data.check import check_data
from tpresearch.data.pipeline import prepare
from tpresearch.data.rows import PackedCorpus
from tpresearch.launch import Run, World, entrypoint
from tpresearch.launch.stop import StopFlag, Stopped

log = logging.getLogger(__name__)


def preflight(cfg: Config, world: World) -> Config:
    if cfg.data.is_synthetic:
        why = "synthetic rows are generated as they are read"
        legal = "a source of text to prepare"
        raise ConfigError("data.source", cfg.data.source, why, legal, fix={"data": "pystdlib"})
    check_data(cfg.data, cfg.tokenizer)
    return cfg


@entrypoint("train", preflight=preflight)
def main(cfg: Config, run: Run) -> None:
    with StopFlag() as flag:  # a BPE learns in threads of its own, which no KeyboardInterrupt reaches
        try:
            corpus = prepare(cfg.data, cfg.tokenizer, run.world, flag.check)
        except Stopped as stopped:
            log.warning("%s", stopped)
            raise
    assert isinstance(corpus, PackedCorpus)
    if run.world.rank == 0:
        print(report(corpus))


def report(corpus: PackedCorpus) -> str:
    """What was prepared: a table of both splits, and what identifies it."""
    meta = corpus.meta
    lines = [f"{'':12}{'documents':>12}{'tokens':>16}{'rows':>12}{'bytes/token':>14}"]
    for part, rows in {"train": corpus.train, "held_out": corpus.held_out}.items():
        counts = meta[part]
        documents, tokens = counts["documents"], counts["tokens"]
        ratio = counts["bytes"] / tokens if tokens else math.nan
        lines.append(f"{part:12}{documents:>12,}{tokens:>16,}{len(rows):>12,}{ratio:>14.2f}")
    facts = {
        "row": f"{corpus.train.shape[1] - 1} + 1 tokens, {meta['dtype']}, of {corpus.vocab_size:,}",
        "entropy": f"{corpus.unigram_entropy:.3f} nats per held-out token, from token frequencies alone",
        "corpus": f"{corpus.corpus_hash} (losses compare only between equal ones)",
        "tokenizer": corpus.tokenizer_hash,
        "folder": str(corpus.folder),
    }
    return "\n".join([*lines, *(f"{name:12}{value}" for name, value in facts.items())])


if __name__ == "__main__":
    main()
