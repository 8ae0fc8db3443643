"""Settings that have no effect are named in a sentence, and defaults never are."""

from __future__ import annotations

import pytest
from support.composed import config

from tpresearch.config.notes import notes_on_settings
from tpresearch.config.validate import validate
from tpresearch.launch.command import values_by_key

SGD = "optimizer=sgd"
LOGITS, OUT = "model.plans.tp.logits.dst=replicate", "model.plans.tp.out.style=rowwise"
ENDS = "the learning rate ends at"

# Overrides, ranks, and the note on them; "..." stands for the last override.
NOTED = [
    (f"parallel=fsdp_tp {LOGITS}", 4, "... has no effect: parallel=fsdp_tp has the rules of model.plans.sp"),
    (f"parallel=fsdp {LOGITS}", 4, "... has no effect: parallel=fsdp has no rules"),
    (f"parallel=tp {LOGITS} {OUT}", 2, None),
    (f"parallel=sp {LOGITS} {OUT}", 2, f"{LOGITS} and {OUT} have no effect: parallel=sp has the rules of model.plans.sp"),
    (f"{SGD} optimizer.betas=[0.9,0.99]", 1, "optimizer.betas=[0.9, 0.99] has no effect: they are AdamW's"),
    (f"{SGD} optimizer.betas=[0.9,0.95] optimizer.eps=1e-8", 1, None),
    ("optimizer=adamw optimizer.betas=[0.9,0.99] optimizer.eps=1e-6 optimizer.decay_vectors=true", 1, None),
    (f"{SGD} optimizer.decay_vectors=true", 1, "... has no effect: optimizer.weight_decay=0"),
    ("train.steps=10", 1, None),
    ("train.steps=5", 1, f"schedule.warmup_steps=10 is more than the 5 of the run: {ENDS} 0.5 of optimizer.lr"),
    ("train.steps=null train.tokens=384", 1, f"schedule.warmup_steps=10 is more than the 3 of the run: {ENDS} 0.3 of optimizer.lr"),
    ("schedule=constant schedule.min_lr_ratio=0.5", 1, "... has no effect: schedule=constant lowers no learning rate"),
    ("schedule=cosine schedule.decay_ratio=0.5", 1, "... has no effect: it is an option of schedule=wsd"),
    ("schedule=wsd schedule.decay_ratio=0.5 schedule.min_lr_ratio=0.5", 1, None),
    ("parallel=fsdp parallel.loss_parallel=false", 2, "... has no effect: no logits are sharded where mesh.tp is 1"),
    ("parallel=ddp parallel.fsdp.reshard_after_forward=false", 2, "... has no effect: no weights are sharded over data-parallel ranks"),
    ("parallel=fsdp parallel.fsdp.reduce_dtype=bfloat16", 2, "... has no effect: gradients are summed in train.dtype=float32"),
    ("parallel=tp train.dtype=bfloat16 parallel.fsdp.reduce_dtype=bfloat16", 2, "parallel.fsdp.reduce_dtype=bfloat16 has no effect: there is one data-parallel rank"),
    ("parallel=ddp train.dtype=bfloat16 parallel.fsdp.reduce_dtype=bfloat16", 2, None),
    ("parallel=none parallel.activation_budget=0.5", 1, "... has no effect: it is of parallel.activation_checkpointing=budget"),
    ("data=jsonl data.path=x data.text_field=body data.name=a data.split=validation", 1, "data.name=a and data.split=validation have no effect: data=jsonl is no dataset that has them; data=hf"),
    ("data=text data.path=x data.text_field=body", 1, "data.text_field=body has no effect: data=text has no fields"),
    ("data=random_tokens data.width=8", 1, "... has no effect: it is an option of data=uniform"),
    ("data=random_tokens data.max_tokens=8", 1, "... has no effect: data=random_tokens is drawn as it is read"),
    ("data=random_tokens train.eval_every=8", 1, "... has no effect: data=random_tokens has no held-out rows"),
    ("data=random_tokens train.eval_every=null train.eval_rows=1", 1, None),
    ("model=toy_net data=uniform data.seq_len=1", 1, None),
    ("model=toy_net data=uniform data.seq_len=8", 1, "data.seq_len=8: each row of data=uniform counts as 8 tokens; 1, by default"),
    ("data=random_tokens tokenizer.path=x", 1, "... has no effect: data=random_tokens has no text"),
    ("logger=none logger.name=a logger.project=b logger.tags=[c]", 1, "logger.project=b and logger.tags=['c'] have no effect: W&B is off; logger=wandb"),
    ("logger=tensorboard logger.group=a", 1, "... has no effect: W&B is off; logger=wandb"),
    ("logger=wandb logger.group=a", 1, None),
    ("profiler=none profiler.first_step=5", 1, "... has no effect: profiler=none; profiler=trace"),
    ("profiler=trace profiler.first_step=5", 1, None),
    ("parallel=tp defects.overlapping_batches=true", 2, "... has no effect: there is one data-parallel rank"),
    ("parallel=fsdp world_size=4", 2, "... has no effect: torchrun has started 2 ranks"),
    ("parallel=none world_size=4", 1, None),
    ("parallel=none gpus=4", 1, "... has no effect: it is an option of python -m tpresearch.planner"),
    ("parallel=none trace=true", 1, "... has no effect: it is an option of python -m tpresearch.simulate; profiler=trace"),
    ("+cluster=h100_dgx trace=true gpus=4 resume=auto", 1, None),
    ("+cluster=h100_dgx resume=x init_from=y", 1, "resume=x and init_from=y have no effect: a simulated step has no weights"),
    ("+cluster=h100_dgx tokenizer=hf tokenizer.path=y init_from=y", 1, None),
    ("parallel=none init_from=y resume=x", 1, None),
    ("parallel=none verify.plans=[] verify.steps=7", 1, "... has no effect: python -m tpresearch.verify reads it"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "world", "note"), NOTED, ids=[row[0] for row in NOTED])
def test_a_setting_without_effect_is_named_and_no_other(typed: str, world: int, note: str | None) -> None:
    words = typed.split() if "parallel=" in typed else ["parallel=none", *typed.split()]
    cfg = config(*words)
    expected = [note.replace("...", words[-1])] if note else []
    assert notes_on_settings(cfg, validate(cfg, world), values_by_key(words)) == expected
