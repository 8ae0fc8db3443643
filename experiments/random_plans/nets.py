"""Small language models drawn at random, with sharding rules for them; some of both are wrong under tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from textwrap import indent
from typing import Any

DIM, HIDDEN, HEADS, HEAD, SEQ, VOCAB = 16, 32, 4, 4, 8, 64

OF_EACH_ELEMENT = (
    *(
        "{x}.relu()",
        "F.gelu({x})",
        "F.silu({x})",
        "{x}.tanh()",
        "2 * {x} + 0.1",
        "{x}.clamp(-1, 1)",
        "{x}.sigmoid() * {x}",
    ),
    *(
        "{x}.mT.contiguous().mT",
        "{x}.unsqueeze(1).squeeze(1)",
        "{x}.flatten(0, 1).view_as({x})",
        "{x}.where({x} > 0, 0.1 * {x})",
    ),
)
ALONG_FEATURES = (
    *(
        "{x}.softmax(-1)",
        "F.layer_norm({x}, {x}.shape[-1:])",
        "F.normalize({x}, dim=-1)",
        "{x}.cumsum(-1)",
        "{x}.sort(-1)[0]",
        "{x}.roll(1, -1)",
    ),
    *(
        "{x} - {x}.mean(-1, keepdim=True)",
        "{x} * {x}.amax(-1, keepdim=True)",
        "{x}[..., :1] * {x}",
        "{x} / {x}.shape[-1]",
        "{x}.cummax(-1)[0]",
    ),
    *(
        "torch.arange({x}.shape[-1]) * 0.01 * {x}",
        "torch.linspace(0, 1, {x}.shape[-1], dtype={x}.dtype) * {x}",
        "({x} @ {x}.mT).softmax(-1) @ {x}",
    ),
    *(
        "F.avg_pool1d({x}, 3, 1, 1)",
        "{x}.unflatten(-1, (2, -1)).flip(-2).flatten(-2)",
        "{x}.unflatten(-1, (-1, 4)).softmax(-1).flatten(-2)",
    ),
    *(
        "{x}.unflatten(-1, (4, -1)).softmax(-1).flatten(-2)",
        "{x}.repeat_interleave(2, -1)[..., ::2]",
        "{x} * {x}.std(-1, keepdim=True)",
    ),
    *(
        "torch.cat([{x}, 2 * {x}], -1).unflatten(-1, (2, -1)).sum(-2)",
        "F.scaled_dot_product_attention({x}, {x}, {x})",
        "{x}.flip(-1)",
    ),
)
ALONG_POSITIONS = (
    *(
        "{x}.cumsum(1)",
        "{x}.roll(1, 1)",
        "{x} - {x}.mean(1, keepdim=True)",
        "{x}.softmax(1)",
        "{x}[:, :1] + {x}",
        "{x}.flip(1)",
        "{x}.sort(1)[0]",
    ),
    *(
        "F.pad({x}, (0, 0, 1, 0))[:, :-1]",
        "F.avg_pool1d({x}.mT, 3, 1, 1).mT",
        "torch.arange({x}.shape[1]).view(1, -1, 1) * 0.01 * {x}",
    ),
    *(
        "({x} @ {x}.mT).tril().softmax(-1) @ {x}",
        "{x} / {x}.shape[1]",
        "torch.cat([{x}[:, 1:], {x}[:, :1]], 1)",
        "{x} * {x}.amax(1, keepdim=True)",
    ),
)
ACROSS_ROWS = ("{x} - {x}.mean()", "{x} / ({x}.norm() + 1)")
GATES = (
    *(
        "a, g = u.chunk(2, -1)",
        "a, g = u[..., ::2], u[..., 1::2]",
        "a, g = u.unflatten(-1, (-1, 2)).unbind(-1)",
    ),
    *(
        "a, g = u.unflatten(-1, (2, -1)).unbind(-2)",
        f"a, g = u.split({HIDDEN}, -1)",
        "a, g = F.glu(u, -1), 1",
    ),
)
QUERIES_KEYS_VALUES = (
    *(
        "(t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in u.chunk(3, -1))",
        "u.unflatten(-1, (-1, 3, 4)).transpose(1, 2).unbind(3)",
    ),
    *(
        "u.unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)",
        "u.unflatten(-1, (-1, 12)).transpose(1, 2).chunk(3, -1)",
    ),
    *(
        "u.unflatten(-1, (-1, 4, 3)).transpose(1, 2).unbind(-1)",
        "u.unflatten(-1, (4, 3, -1)).transpose(1, 2).unbind(3)",
    ),
)
GROUPS = (
    *(
        "(t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))",
        "(t.repeat(1, 2, 1, 1) for t in (k, v))",
    ),
    *(
        "(t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))",
        "(t[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2) for t in (k, v))",
    ),
)
ATTENTIONS = (
    "h = F.scaled_dot_product_attention(q, k, v, is_causal=True)",
    "h = torch.einsum('bhqk,bhkd->bhqd', torch.einsum('bhqd,bhkd->bhqk', q, k).tril().softmax(-1), v)",
    "h = q.softmax(-1) @ (k.softmax(2).mT @ v)",
    "h = ((q @ k.mT) * 0.5 ** torch.arange(q.shape[1])[:, None, None]).softmax(-1) @ v",
    f"h = ((q @ k.mT) * 0.5 ** torch.arange({HEADS})[:, None, None]).softmax(-1) @ v",
    "w = (q @ k.mT).softmax(-1)\nh = (w - w.mean(1, keepdim=True)) @ v",
)
JOINED = (
    "h.transpose(1, 2).flatten(2)",
    "h.transpose(1, 2).reshape(*x.shape[:1], h.shape[2], -1)",
    "h.permute(0, 2, 3, 1).flatten(2)",
)
PRELUDE = """
import torch
import torch.nn.functional as F
from torch import nn


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight, 1.0, 0.3)

    def forward(self, x):
        return x * self.weight
"""


@dataclass
class Net:
    source: str
    tensor: str
    """The plan that the rules are for: tp or sp."""
    rules: dict[str, dict[str, Any]]
    parallel: str
    mistake: str
    """What was changed in rules that fit, if anything was."""


@dataclass
class _Block:
    name: str
    sp: bool
    random: Random
    layers: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=lambda: ["y = x"])
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)

    def linear(self, layer: str, size_in: int, size_out: int, style: str = "") -> None:
        self.layers.append(
            f"self.{layer} = nn.Linear({size_in}, {size_out}, bias={self.random.random() < 0.5})"
        )
        if style == "colwise":
            self.rule(layer, style=style, **({"src": "shard:1", "dst": "shard:-1"} if self.sp else {}))
        elif style:
            self.rule(layer, style=style, **({"src": "shard:-1", "dst": "shard:1"} if self.sp else {}))

    def rule(self, layer: str, **rule: Any) -> None:
        self.rules[f"{layer}_{self.name.rpartition('.')[2]}"] = {"match": f"{self.name}.{layer}", **rule}

    def ops(self, x: str, inner: bool) -> None:
        """Ops of each element, mostly, on features between the layers of a block (`inner`), or on what is between the blocks."""
        for _ in range(self.random.choice((0, 1, 2))):
            kinds = (ALONG_FEATURES, ALONG_POSITIONS, ACROSS_ROWS, OF_EACH_ELEMENT)
            (ops,) = self.random.choices(kinds, (12, 8, 1, 80) if inner else (8, 12, 1, 80))
            self.lines.append(f"{x} = " + self.random.choice(ops).format(x=x))

    def norm(self) -> None:
        if self.random.random() < 0.4:
            kind = self.random.choice(
                (f"nn.LayerNorm({DIM})", f"nn.RMSNorm({DIM})", f"Scale({DIM})", "Scale(1)")
            )
            self.layers.append(f"self.pre = {kind}")
            self.lines.append("y = self.pre(y)")
            if self.sp:
                self.rule("pre", style="sequence")

    def factor(self) -> None:
        if self.random.random() < 0.15:
            self.layers.append("self.factor = Scale(1)")
            self.lines.append("h = self.factor(h)")
            if self.random.random() < 0.5:
                self.rule("factor", style="sequence", src="shard:-1", dst="shard:-1")

    def mlp(self) -> None:
        self.linear("up", DIM, HIDDEN, "colwise")
        self.lines.append("h = self.up(y)")
        self.factor()
        self.ops("h", inner=True)

    def glu(self) -> None:
        self.linear("up", DIM, 2 * HIDDEN, "colwise")
        self.lines += ["u = self.up(y)", self.random.choice(GATES), "h = a * g"]
        self.ops("h", inner=True)

    def convolution(self) -> None:
        inner, size = self.random.choice(((True, HIDDEN), (False, DIM)))
        groups = self.random.choice((size, 1))
        self.layers.append(f"self.conv = nn.Conv1d({size}, {size}, 3, padding=2, groups={groups})")
        self.linear("up", DIM, HIDDEN, "colwise")
        through = "self.conv({x}.mT)[..., :{x}.shape[1]].mT"
        self.lines += (
            ["h = self.up(y)", f"h = {through.format(x='h')}"]
            if inner
            else [f"y = {through.format(x='y')}", "h = self.up(y)"]
        )
        if self.sp:
            self.rule("conv", style="sequence")

    def experts(self) -> None:
        self.linear("router", DIM, 2)
        self.linear("up", DIM, HIDDEN, "colwise")
        self.linear("other", DIM, HIDDEN, "colwise")
        self.lines += [
            "p = self.router(y).softmax(-1)",
            "h = p[..., :1] * self.up(y).relu() + p[..., 1:] * self.other(y).relu()",
        ]
        if self.sp:
            self.rule("router", style="sequence")

    def attention(self) -> None:
        keys = self.random.choice((HEADS, HEADS, HEADS // 2))
        for layer, heads in zip("qkv", (HEADS, keys, keys), strict=True):
            self.linear(layer, DIM, heads * HEAD, "colwise")
        shape = self.random.choice((f"(-1, {HEAD})", f"(-1, {HEAD})", "({n}, -1)", f"({{n}}, {HEAD})"))
        heads = [
            f"self.{at}(y).unflatten(-1, {shape.format(n=n)}).transpose(1, 2)"
            for at, n in zip("qkv", (HEADS, keys, keys), strict=True)
        ]
        self.lines.append(f"q, k, v = {', '.join(heads)}")
        if self.random.random() < 0.3:
            self.lines.append(
                self.random.choice(
                    (
                        "q, k = F.normalize(q, dim=-1), F.rms_norm(k, k.shape[-1:])",
                        "q = q - q.mean(1, keepdim=True)",
                    )
                )
            )
        if keys != HEADS:
            self.lines.append(f"k, v = {self.random.choice(GROUPS)}")
        self.lines += [self.random.choice(ATTENTIONS), f"h = {self.random.choice(JOINED)}"]

    def fused_attention(self) -> None:
        self.linear("qkv", DIM, 3 * DIM, "colwise")
        self.lines += [
            "u = self.qkv(y)",
            f"q, k, v = {self.random.choice(QUERIES_KEYS_VALUES)}",
            ATTENTIONS[0],
            f"h = {JOINED[0]}",
        ]

    def one_key(self) -> None:
        """All heads have one key and value in common."""
        self.linear("q", DIM, DIM, "colwise")
        self.linear("k", DIM, HEAD)
        self.lines += [
            f"q, k = self.q(y).unflatten(-1, (-1, {HEAD})).transpose(1, 2), self.k(y).unsqueeze(1)",
            "h = (q @ k.mT).softmax(-1) @ k",
            f"h = {JOINED[0]}",
        ]
        if self.sp or self.random.random() < 0.5:
            rules = (
                {"style": "colwise", "dst": "replicate"},
                {"style": "sequence"},
                {"style": "rowwise", "src": "replicate"},
            )
            self.rule("k", **self.random.choice(rules))

    def code(self, cls: str) -> str:
        body = "\n".join(self.layers), "\n".join(self.lines)
        layers, lines = (indent(each, " " * 8) for each in body)
        return f"class {cls}(nn.Module):\n    def __init__(self):\n        super().__init__()\n{layers}\n\n    def forward(self, x):\n{lines}\n\n"


def net(seed: int) -> Net:
    """One model with its rules, and a plan for it."""
    random = Random(seed)
    tensor = random.choice(("tp", "tp", "sp"))
    sp = tensor == "sp"
    blocks = [_Block(f"blocks.{at}", sp, random) for at in range(random.choice((1, 1, 2)))]
    for block in blocks:
        block.norm()
        block.ops("y", inner=False)
        kinds = (
            block.mlp,
            block.glu,
            block.convolution,
            block.experts,
            block.attention,
            block.fused_attention,
            block.one_key,
        )
        kind = random.choice((*kinds, block.mlp, block.attention))
        kind()
        block.linear(
            "down", DIM if "attention" in kind.__name__ or kind == block.one_key else HIDDEN, DIM, "rowwise"
        )
        block.lines.append("y = self.down(h)")
        block.ops("y", inner=False)
        block.lines.append(
            random.choice(("return x + y", "return x + y", "return y", "return x * y.sigmoid()"))
        )
    ends = _Block("", sp, random, lines=["x = self.embed(tokens)"])
    ends.ops("x", inner=False)
    ends.lines += ["for block in self.blocks:", "    x = block(x)"]
    ends.ops("x", inner=False)
    layers = [
        f"self.embed = nn.Embedding({VOCAB}, {DIM})",
        f"self.blocks = nn.ModuleList([{', '.join(f'Block{at}()' for at in range(len(blocks)))}])",
    ]
    layers.append(f"self.output = nn.Linear({DIM}, {VOCAB}, bias=False)")
    rules = {name: rule for block in blocks for name, rule in block.rules.items()}
    rules["embed"] = {
        "match": "embed",
        "style": "rowwise",
        "src": "replicate",
        **({"dst": "shard:1"} if sp else {}),
    }
    rules["output"] = {
        "match": "output",
        "style": "colwise",
        "dst": "logits",
        **({"src": "shard:1"} if sp else {}),
    }
    if random.random() < 0.2:
        layers.append("self.output.weight = self.embed.weight")
    init, lines = (
        indent("\n".join(layers), " " * 8),
        indent("\n".join([*ends.lines, "return self.output(x)"]), " " * 8),
    )
    source = PRELUDE + "\n\n".join(block.code(f"Block{at}") for at, block in enumerate(blocks))
    source += f"class Net(nn.Module):\n    def __init__(self, vocab_size):\n        super().__init__()\n{init}\n\n    def forward(self, tokens):\n{lines}\n"
    mistake = _mistake(random, rules) if random.random() < 0.3 else ""
    return Net(
        source, tensor, rules, random.choice((tensor,) * 6 + ("fsdp_tp", "fsdp_tp", "fsdp", "ddp")), mistake
    )


def _mistake(random: Random, rules: dict[str, dict[str, Any]]) -> str:
    """Change one of the rules, as by a slip."""
    name, kind = random.choice([*rules]), random.choice(("none", "style", "src", "dst"))
    if kind == "none":
        del rules[name]
    elif kind == "style":
        rules[name]["style"] = random.choice(("colwise", "rowwise", "sequence"))
    else:
        rules[name][kind] = random.choice(("replicate", "shard:0", "shard:1", "shard:-1"))
    return f"{kind} of {name}"
