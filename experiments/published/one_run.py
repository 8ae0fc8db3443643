"""Give one step of each site: its other rows are predicted with the rates that `calibrate run=` makes of the first one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from published.stacks import cluster_of_row

from tpresearch.calibrate.run import SHARES, fitted_factor, scaled

if TYPE_CHECKING:
    from published.recorded import RecordedRow, Scored


def by_first_row(one: RecordedRow, factors: dict[str, float]) -> Scored | None:
    """A row as the first of its site says; None for that one, the first whose step some rates explain.

    Args:
        factors: of each site's rates; first rows are added.
    """
    base, site = cluster_of_row(one.row), one.row["family"]
    if site in factors:
        most = min(1 / base["numbers"][key]["value"] for key in SHARES)
        return one.on(scaled(base, min(factors[site], most)))
    if measured_s := one.row.measured_s:
        factor = fitted_factor(lambda by: one.on(scaled(base, by)).step_s, base, measured_s)
        if factor is not None:
            factors[site] = factor
    return None
