"""Leave one site out: each site's rows are predicted with the matmul rate fitted on all other sites.

A row asks for the rate with which it would be met; a site for the median of its rows, and the others for the median of
theirs, per generation of cards. No constant of a year or a site is used. Of what llm-foundry's rows fixed beside that rate
(attention, bandwidth, overlap, scale) nothing is fitted again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from published.recorded import Scored
    from published.row import Row

AMPERE = ("A100",)


def site(row: Row) -> str:
    """llm-foundry's families are one."""
    return "llmf" if row["family"].startswith("llmf") else row["family"]


def by_the_others(found: Sequence[Scored]) -> list[Scored]:
    """The same rows, each as the other sites' matmuls say."""
    asked: dict[tuple[bool, str], list[float]] = defaultdict(list)
    for one in found:
        if one.row.measured_s:
            asked[_is_ampere(one.row), site(one.row)].append(_factor(one, one.row.measured_s))
    told = []
    for one in found:
        kind = _is_ampere(one.row)
        others = [median(v) for (other, name), v in asked.items() if other == kind and name != site(one.row)]
        told.append(_with_rate(one, median(others) if others else 1.0))
    return told


def _is_ampere(row: Row) -> bool:
    return row.gpu in AMPERE


def _factor(one: Scored, measured_s: float) -> float:
    """By how much faster matmuls would have to be; at least a third, at most thrice."""
    left = measured_s - (one.step_s - one.gemm_s)
    return min(3.0, max(1 / 3, one.gemm_s / left if left > 0 else 3.0))


def _with_rate(one: Scored, factor: float) -> Scored:
    step = one.step_s - one.gemm_s + one.gemm_s / factor
    width = step / one.step_s
    return replace(one, step_s=step, low_s=one.low_s * width, high_s=one.high_s * width)
