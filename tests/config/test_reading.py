"""What comes from YAML is read by type and within bounds: a wrong shape anywhere is one sentence that names its key."""

from __future__ import annotations

import pytest
from support.assembled import planned, refusal
from support.composed import config

from tpresearch.config import ConfigError
from tpresearch.config.validate import validate
from tpresearch.config.values import describe_type

SP = "model.plans.sp"
WRONG = [
    ("model.plans=3", "model.plans", "a dict"),
    ("model.plans.sp=3", SP, "named rules"),
    ("model.plans.sp=null", SP, "named rules"),
    ("model.plans.sp.out.match=3", f"{SP}.out.match", "text"),
    ("model.plans.sp.out.style=[colwise]", f"{SP}.out.style", "text or null"),
    ("model.plans.sp.out.dst={a:1}", f"{SP}.out.dst", "a list of text or null"),
    ("model.plans.sp.out.dst=[[replicate]]", f"{SP}.out.dst", "a list of text or null"),
    ("model.plans.sp.out.src=1", f"{SP}.out.src", "text"),
    ("model.plans.sp.out.dst=shard:99999999999999999999", f"{SP}.out.dst", "shard:N"),
    ("model.plans.sp.out.dst=shard:3", f"{SP}.out.dst", "shard:-3 to shard:2"),
    ("model.plans.sp.out.dst=logits", f"{SP}.out.dst", "replicate"),
    ("model.plans.sp.out.src=[null]", f"{SP}.out.src", "one layout"),
    ("model.plans.sp.out.src=[replicate,replicate]", f"{SP}.out.src", "one layout"),
    ("model.plans.sp.norms.src=replicate", f"{SP}.norms", "src and dst the same"),
    ("model.plans.sp.norms.dst=replicate", f"{SP}.norms", "src and dst the same"),
    ("model.plans.sp.ffn_x.src=[shard:1,null] model.plans.sp.ffn_x.dst=[replicate,null]", f"{SP}.ffn_x.src", "lists of 1"),
    ("model.plans.sp.qkv.units=null", f"{SP}.qkv.units", "a list of text"),
    ("model.plans.sp.qkv.units=[1]", f"{SP}.qkv.units", "a list of text"),
    ("+model.plans.sp.out.axis=[tp]", f"{SP}.out.axis", "text"),
    ("+model.plans.sp.out._target_=3", f"{SP}.out._target_", "text"),
    ("model.blocks=[null]", "model.blocks", "a list of text"),
    ("model.name=[a]", "model.name", "text"),
    ("model.n_heads=0", "model", "settings"),
    ("model.n_heads=abc", "model.n_heads", "a whole number"),
    ("model.n_heads=null", "model.n_heads", "a whole number"),
    ("model.dim=1e3", "model.dim", "a whole number"),
    ("model.dim=-64", "model", "settings"),
    ("model.dim=99999999999999999999", "model.dim", "1,000,000,000,000,000"),
    ("model.n_layers=100000", "model", "settings"),
    ("model.tied=1", "model.tied", "true or false"),
    ("+model.rope_theta=nan", "model.rope_theta", "a finite number"),
    ("model._target_=torch.nn.ReLU", "model.vocab_size", "inplace"),
    ("data.path={a:1}", "data.path", "text or a list of text or null"),
    ("data.path=[[a]]", "data.path", "text or a list of text or null"),
    ("data.seq_len=9223372036854775807", "data.seq_len", "from 1 to 100,000,000"),
    ("train.steps=9000000000000000000000", "train.steps", "1 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "field", "legal"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_shape_is_one_sentence(typed: str, field: str, legal: str) -> None:
    error = refusal("model=llama2_debug", "parallel=sp", *typed.split())
    assert error.field == field
    assert legal in error.legal


@pytest.mark.parametrize("name", ["bell \x07", "line\nline", "no \udc80 text"])
def test_text_is_what_a_file_system_and_a_record_take(name: str) -> None:
    cfg = config()
    cfg.data.cache_dir = name
    with pytest.raises(ConfigError, match=r"data\.cache_dir=") as caught:
        validate(cfg, 1)
    assert str(caught.value).isprintable()


def test_hints_are_said_in_words() -> None:
    assert describe_type(str | list[str | None] | None) == "text or a list of text or null or null"
    assert describe_type(dict[str, int]) == "a dict, each of its values a whole number"


def test_what_is_right_stays_right() -> None:
    words = "model.plans.sp.out.dst=[shard:-2]", "data.path=[a b,c]", "+model.norm_eps=1"
    planned("model=llama2_debug", *words)
