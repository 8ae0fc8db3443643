"""Column-wise, row-wise and combined layers alone, and the last with its rows sharded: what each rank holds, what is sent, and that the product is the same.

python experiments/layers/measure.py      # prints the table; writes results.csv and placements.png (record.py says where)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard

from tpresearch.config.axes import MeshSizes
from tpresearch.config.model import Rule
from tpresearch.config.schema import DataPlan, Dtype, ParallelConfig, TensorPlan
from tpresearch.config.world import World
from tpresearch.ledger.communication import CommunicationLedger
from tpresearch.ledger.entries import entries_of
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.device import CPU
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.parallel.weights import local_part, set_parameter
from tpresearch.plan.compiler import Plan
from tpresearch.plan.rules import resolve_rule
from tpresearch.verify.ranks import Ranks

HERE = Path(__file__).parent
RANKS = 4
ROWS, WIDTH, HIDDEN = 8, 16, 32
"""X is [8, 16]; B is [16, 32] and C is [32, 16], whose weights torch keeps transposed, [out, in]."""


@dataclass(frozen=True)
class Case:
    """One way to compute X B, or relu(X B) C, on several ranks."""

    name: str
    product: str
    rules: dict[str, Rule]


CASES = [
    Case("column-wise", "A = X B", {"b": Rule(style="colwise", src="replicate", dst="replicate")}),
    Case("row-wise", "A = X B", {"b": Rule(style="rowwise", src="shard:-1", dst="replicate")}),
    Case(
        "combined",
        "A = relu(X B) C",
        {
            "b": Rule(style="colwise", src="replicate", dst="shard:-1"),
            "c": Rule(style="rowwise", src="shard:-1", dst="replicate"),
        },
    ),
    Case(
        "sequence parallel",
        "A = relu(X B) C",
        {
            "b": Rule(style="colwise", src="shard:0", dst="shard:-1"),
            "c": Rule(style="rowwise", src="shard:-1", dst="shard:0"),
        },
    ),
]


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a case."""

    held: dict[str, tuple[int, ...]]
    """Shapes of its parts of X and of the weights (as B and C, [in, out])."""
    sent: dict[str, str]
    """By phase: collectives and the bytes that this rank sends."""
    apart: float
    """Greatest difference from the unsharded product and its gradients, on integers."""


def build(case: Case) -> nn.Sequential:
    layers: dict[str, nn.Module] = {"b": nn.Linear(WIDTH, HIDDEN, bias=False)}
    if "c" in case.rules:
        layers |= {"relu": nn.ReLU(), "c": nn.Linear(HIDDEN, WIDTH, bias=False)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def see(world: World, case: Case) -> Seen:
    """Forward and backward of one case on this rank, beside the same without shards."""
    whole, model = build(case), build(case)
    x, upstream = integers(ROWS, WIDTH), integers(ROWS, WIDTH if "c" in case.rules else HIDDEN)
    for parameter in whole.parameters():
        parameter.data = integers(*parameter.shape)
    x_whole = x.clone().requires_grad_()
    product = whole(x_whole)
    product.backward(upstream)

    sizes = MeshSizes(tp=world.size)
    rules = {name: resolve_rule("alone", name, rule, False) for name, rule in case.rules.items()}
    plan = Plan(rules, [], [], sizes)
    parallel = ParallelConfig(name="tp", tensor=TensorPlan.tp, data=DataPlan.none)
    with process_group(CPU, world):
        mesh = build_mesh(sizes, "cpu")
        parallelize(model, plan, parallel, mesh, Dtype.float32)
        for parameter, full in zip(model.parameters(), whole.parameters(), strict=True):
            set_parameter(parameter, full.detach())
        *_, last = rules.values()
        arrives, leaves = rules["b"].src[0], last.dst[0]
        own = part(x, arrives, world).clone().requires_grad_()
        counted = CommunicationLedger(mesh)
        with counted:
            with counted.phase("forward"):
                output = model(own)
                output = output + 0  # which waits for a collective that is under way
            with counted.phase("backward"):
                output.backward(part(upstream, leaves, world))
        assert own.grad is not None
        assert x_whole.grad is not None
        pairs = [(output, part(product, leaves, world)), (own.grad, part(x_whole.grad, arrives, world))]
        for p, w in zip(model.parameters(), whole.parameters(), strict=True):
            assert w.grad is not None
            pairs.append((whole_of(p.grad), w.grad))
        entries = entries_of(counted.events)
        return Seen(
            {"X": tuple(own.shape)}
            | {n[0].upper(): tuple(reversed(local_part(p).shape)) for n, p in model.named_parameters()},
            {
                phase: " + ".join(
                    f"{e.count} {e.collective.replace('_', '-')} of {e.tensor_bytes:,} B, sends {e.sent_bytes:,} B"
                    for e in entries
                    if e.phase == phase
                )
                or "nothing"
                for phase in ("forward", "backward")
            },
            max((a - b).abs().max().item() for a, b in pairs),
        )


def whole_of(gradient: Tensor | None) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor()


def part(whole: Tensor, layout: Placement | None, world: World) -> Tensor:
    """What a rank has of a matrix that is laid out so."""
    return whole.chunk(world.size, layout.dim)[world.rank] if isinstance(layout, Shard) else whole


def measure(ranks: Ranks, size: int = RANKS) -> dict[str, list[Seen]]:
    """Case name -> what each rank saw."""
    return {case.name: ranks.run(size, see, case) for case in CASES}


def main() -> None:
    from layers.picture import draw
    from record import made_by, place, write_rows

    found = measure(Ranks())
    rows = [
        {
            "case": case.name,
            "product": case.product,
            "rank_0_holds": ", ".join(
                f"{n} {'x'.join(map(str, s))}" for n, s in found[case.name][0].held.items()
            ),
            "forward": found[case.name][0].sent["forward"],
            "backward": found[case.name][0].sent["backward"],
            "greatest_difference": max(seen.apart for seen in found[case.name]),
        }
        for case in CASES
    ]
    out = place(HERE)
    write_rows(out / "results.csv", rows, heading=made_by(HERE))
    for row in rows:
        print("\n".join(f"{key:>20}  {value}" for key, value in row.items()), "\n")
    draw(out / "placements.png", RANKS)
    print(f"picture: {out / 'placements.png'}")


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(HERE.parent))
    from layers.measure import main as imported  # pyrefly: ignore[missing-module-attribute]  # ranks import what they run by this name

    imported()
