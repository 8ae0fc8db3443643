"""`parallel.compile=true` compiles each block once, and every step after that runs compiled code, the counted one too."""

from __future__ import annotations

import functools
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.assembled import joined, ranks_of_a_host
from support.composed import SEQ_LEN, config, corpus
from support.counted_steps import FAKE, PLANS
from support.marks import exhaustive
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import post_grad
from torch.distributed import _symmetric_memory as symmetric
from torch.torch_version import TorchVersion

from tpresearch.config import Config, ConfigError
from tpresearch.config.axes import MeshSizes
from tpresearch.config.world import World
from tpresearch.ledger.entries import Expected, StepLedger
from tpresearch.ledger.formulas import expected_entries
from tpresearch.ledger.memory_formulas import expected_memory
from tpresearch.parallel import device
from tpresearch.parallel.apply import compiled as compiled_function
from tpresearch.parallel.apply import enable_async_tp, set_activation_budget
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.parallel.recomputing import checkpointed
from tpresearch.train import cross_entropy
from tpresearch.train.assemble import assemble
from tpresearch.train.preflight import preflight
from tpresearch.train.watch import CountedStep
from tpresearch.verify.ranks import Ranks

WHOLE, SHORT = (12, 31, 8), (5, 7, 3)
"""Layers, steps, and recompilations past which dynamo gives up (8 unless said): fewer of all show the same every day. An
evaluation comes before the last two steps."""
KINDS = ("none", "selective", "full", "budget")
EVERY_DAY = {("none", "selective"), ("sp", "full"), ("none", "budget")}
CASES = [
    (plan, world, kind, *SHORT) if (plan, kind) in EVERY_DAY else exhaustive(plan, world, kind, *WHOLE)
    for plan, world in PLANS
    for kind in KINDS
]


class Compiler:
    """A backend that counts: graphs it was given, and calls into the code that it made of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.backend = aot_autograd(
            fw_compiler=self._made("forward"),
            bw_compiler=self._made("backward"),
            partition_fn=min_cut_rematerialization_partition,  # as inductor has it
        )

    def _made(self, direction: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            self.counts[f"{direction} graphs"] += 1

            def run(*args: Any) -> Any:
                self.counts[f"{direction} calls"] += 1
                return graph(*args)

            return make_boxed_func(run)

        return compiler

    def since(self, before: Counter[str]) -> dict[str, int]:
        return dict(self.counts - before)


@pytest.mark.parametrize(("plan", "world", "kind", "layers", "steps", "limit"), CASES)
def test_each_step_runs_compiled_code(
    plan: str, world: int, kind: str, layers: int, steps: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, loss_compiler, compile_ = Compiler(), Compiler(), torch.compile

    def counted(function: Callable[..., Any], **options: Any) -> Any:
        chosen = loss_compiler if getattr(function, "__module__", "") == cross_entropy.__name__ else compiler
        return compile_(function, **(options | {"backend": chosen.backend}))

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(cross_entropy, "_fused", functools.cache(cross_entropy._fused.__wrapped__))
    cfg = config(
        *("model=llama2_debug", f"model.n_layers={layers}", f"parallel={plan}", "parallel.compile=true"),
        *(f"parallel.activation_checkpointing={kind}", "train.eval_rows=11"),
    )
    found, of_loss, limited = {}, {}, torch._dynamo.config.patch(recompile_limit=limit)
    with limited, joined(cfg, ranks_of_a_host(world), FAKE) as (job, mesh, _):
        formulas = Expected(expected_entries(job.model, job.plan, cfg), {})
        counting = CountedStep(mesh, formulas, steps, compiled=True)
        loop = assemble(job, mesh, FAKE, corpus(), [counting])
        for step in range(1, steps + 1):
            before, loss_before = compiler.counts.copy(), loss_compiler.counts.copy()
            loop.step()
            found[step], of_loss[step] = compiler.since(before), loss_compiler.since(loss_before)
            if step == steps - 2:
                loop.evaluate()
    again = 2 if kind == "full" and job.plan.rules else 1  # a compiled block is called again in backward
    each = {"forward calls": again * layers, "backward calls": layers}
    graphs = {"forward graphs": 1, "backward graphs": 1}
    assert found == {1: each | graphs, **dict.fromkeys(range(2, steps + 1), each)}
    # Between collectives, of the loss's one chunk.
    stretches = {"forward calls": 3 if job.plan.loss_parallel else 2}
    made = {"forward graphs": stretches["forward calls"]}
    assert of_loss == {1: stretches | made, **dict.fromkeys(range(2, steps + 1), stretches)}
    assert isinstance(counting.counted, StepLedger)
    assert counting.counted.held == []
    share = cfg.parallel.activation_budget if kind == "budget" else 1
    assert torch._functorch.config.activation_memory_budget == share
    if kind == "selective":  # dynamo's general warning of in-place ops
        assert not logging.getLogger(torch._higher_order_ops.wrap.__name__).isEnabledFor(logging.WARNING)
    if formulas.sent is not None:
        assert counting.counted.sent == formulas.sent


@functools.cache
def kept(kind: str, *more: str) -> int:
    """Bytes per token of a row that one compiled block keeps for backward, as inductor's partitioner has it."""
    cfg = compiled(kind, *more)
    job = preflight(cfg, World())
    block = job.model.get_submodule(job.plan.blocks[0]).to_empty(device="cpu")
    torch._dynamo.reset()
    set_activation_budget(cfg.parallel)
    compiler = aot_autograd(
        fw_compiler=lambda graph, _: graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    forward = checkpointed(block.forward, cfg.parallel.activation_checkpointing)
    x, rotary = (
        torch.randn(1, SEQ_LEN, 64, dtype=torch.bfloat16, requires_grad=True),
        torch.ones(SEQ_LEN, 4, 2),
    )
    given = {t.untyped_storage().data_ptr() for t in (*block.parameters(), rotary)}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # The state of a generator is no floating-point tensor.
        if storage.data_ptr() not in given and tensor.dtype.is_floating_point:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.compile(forward, backend=compiler, fullgraph=True)(x, rotary)
    return sum(found.values()) // SEQ_LEN


def compiled(kind: str, *more: str) -> Config:
    return config(
        *("model=llama2_debug", "parallel=none", "parallel.compile=true", "train.dtype=bfloat16"),
        *("train.weights=bfloat16", "train.micro_batch_size=1"),
        *(f"parallel.activation_checkpointing={kind}", *more),
    )


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_compiled_blocks_keep_what_the_formula_says(kind: str) -> None:
    """Per token of one block: what a second one adds to the expected bytes of one."""
    expected = []
    for layers in (1, 2):
        job = preflight(compiled(kind, f"model.n_layers={layers}"), World())
        expected.append(expected_memory(job.model, job.plan, job.cfg)["activations"])
    one, two = expected
    assert one
    assert two
    assert kept(kind) == (two - one) / SEQ_LEN


def test_a_budget_bounds_what_compiled_blocks_keep() -> None:
    """At 0.9 about what selective checkpointing keeps, redoing norms and SwiGLU alone; at 0 the block's input."""
    whole, selective = kept("none"), kept("selective")
    shares = {b: kept("budget", f"parallel.activation_budget={b}") for b in (0, 0.5, 0.9, 1)}
    assert shares[1] == whole
    assert shares[0] == 64 * 2
    assert shares[0] < shares[0.5] < 0.6 * whole < shares[0.9] <= 0.9 * whole
    assert shares[0.9] == pytest.approx(selective, rel=0.03)
    with pytest.raises(ConfigError, match=r"parallel\.compile=false"):
        preflight(compiled("budget", "parallel.compile=false"), World())


@pytest.mark.parametrize(
    ("torch_version", "kv_heads", "refused"),
    [("2.11.0", 4, True), ("2.11.0", 8, False), ("2.11.0", None, False), ("2.13.0", 4, False)],
)
def test_a_budget_is_refused_where_torch_cannot_count_attention_of_grouped_heads(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, kv_heads: int | None, refused: bool
) -> None:
    """On CUDA alone: a CPU's attention is none of the ops that its partitioner counts."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(torch_version))
    monkeypatch.setattr(device, "_missing_for_compile", lambda on_cuda: None)
    words = ("parallel.compile=true", "parallel.activation_checkpointing=budget")
    cfg = config("model=llama2_debug", "parallel=none", *words)
    cfg.model.args["n_kv_heads"] = kv_heads
    if kv_heads is None:  # a model of one's own
        del cfg.model.args["n_kv_heads"]
    for kind in ("cuda", "cpu"):
        card = device.Device(torch.device(kind), "nccl", kind)
        if refused and kind == "cuda":
            with pytest.raises(
                ConfigError, match=r"^parallel.activation_checkpointing=budget: torch below 2.13"
            ):
                device.check_device(cfg, card)
        else:
            device.check_device(cfg, card)


def printing(x: torch.Tensor) -> torch.Tensor:
    print(x.shape)
    return x


def branching(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum().item() > 0 else -x


def logging_(x: torch.Tensor) -> torch.Tensor:
    logging.warning("x")  # the compiler ends within
    return x


@pytest.mark.parametrize("forward", [printing, branching, logging_])
def test_a_block_that_cannot_be_traced_is_refused_in_a_sentence(
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    with pytest.raises(
        ConfigError, match=r"^parallel\.compile=true: the compiler cannot trace a block: "
    ) as no:
        compiled_function(forward)(torch.ones(2))
    assert len(str(no.value).splitlines()) == 1
    assert no.value.fix == {"parallel.compile": "false"}
    if forward is not branching:
        assert f", at {__file__}:" in str(no.value)


def test_a_group_is_announced_for_async_tp_without_a_warning() -> None:
    """As inductor's pass still requires, while torch deprecates it for other users (torch 2.11 to 2.14)."""
    with process_group(FAKE, World(size=2, local_size=2)), warnings.catch_warnings():
        mesh = build_mesh(MeshSizes(tp=2), "cpu")["tp"]
        warnings.simplefilter("error")
        enable_async_tp(mesh)
        assert symmetric.is_symm_mem_enabled_for_group(mesh.get_group().group_name)


def losses_of(world: World, cfg: Config) -> tuple[list[float], Counter[str], bool]:
    """Of three steps; collectives by the name of their op in compiled code; and whether the ledger equals the formulas.

    Inductor's pass rewrites a CPU's matmuls too where it finds NCCL, and torch has a plain version of what it calls.
    """
    named: Counter[str] = Counter()

    def noted(graph: torch.fx.Graph, pass_: Callable[..., None] = post_grad.micro_pipeline_tp_pass) -> None:
        pass_(graph)
        ops = (node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))
        named.update(op._opname for op in ops if op.namespace in ("symm_mem", "_c10d_functional"))

    plain = torch.library.Library("symm_mem", "IMPL")
    for op in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        plain.impl(op, getattr(symmetric, f"_{op}_fallback"), "CPU")
    with pytest.MonkeyPatch.context() as patch, symmetric._test_mode():
        patch.setattr(device, "_missing_for_async_tp", lambda device: None)
        patch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        patch.setattr(post_grad, "micro_pipeline_tp_pass", noted)
        patch.setattr(torch._inductor.config, "force_disable_caches", True)
        with joined(cfg, world) as (job, mesh, chosen):
            formulas = Expected(expected_entries(job.model, job.plan, cfg), {})
            counting = CountedStep(mesh, formulas, 3, compiled=True)
            loop = assemble(job, mesh, chosen, corpus(), [counting])
            losses = [loop.step().loss.item() for _ in range(3)]
    assert counting.counted
    return losses, named, counting.counted.sent == formulas.sent


@pytest.mark.exhaustive
def test_async_tp_trains_the_same_and_is_counted_right(
    ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("model=llama2_debug", "parallel=sp")
    plain = ranks.run(2, losses_of, config(*settings))
    found = ranks.run(2, losses_of, config(*settings, "parallel.compile=true", "parallel.async_tp=true"))
    for (losses, _, _), (overlapped, named, is_as_formula) in zip(plain, found, strict=True):
        assert overlapped == pytest.approx(losses, rel=1e-5)
        # Of attention and SwiGLU, in forward and backward. What is a sum of several matmuls is not rewritten.
        assert named["fused_all_gather_matmul"] == 4
        assert named["fused_matmul_reduce_scatter"] == named["reduce_scatter_tensor"] == 2
        assert is_as_formula
    assert "no matching" not in capfd.readouterr().err  # of graphs that send nothing, such as the loss's
