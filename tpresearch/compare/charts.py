"""Each panel as one Vega-Lite chart: the page draws it, and so does its PNG."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import altair as alt
import vl_convert

from tpresearch.compare.bars import bars, ledger, parts
from tpresearch.compare.curves import curves, differences, pareto, scaling
from tpresearch.compare.look import CONFIG, Drawn, Look
from tpresearch.compare.numbers import Numbers, Points
from tpresearch.track.panels import Kind, Panel

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
DRAW: dict[Kind, Callable[[Panel, Points, Look], Drawn]] = {
    "curve": curves,
    "difference": differences,
    "bars": bars,
    "parts": parts,
    "pareto": pareto,
    "scaling": scaling,
    "ledger": ledger,
}

Spec = dict[str, Any]


def spec_of(panel: Panel, points: Points, look: Look) -> Spec:
    """The chart of a panel, its data in it."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    chart = DRAW[panel.kind](panel, points, look).properties(autosize=fit)
    with alt.data_transformers.disable_max_rows():
        return {**chart.to_dict(), "config": CONFIG}


def png(panel: Panel, numbers: Numbers, spec: Spec) -> bytes:
    """The same chart under its title and what one reads from it, since a PNG goes about without its page."""
    title = {"text": panel.title, "subtitle": [panel.reads, *numbers.notes]}
    image: bytes = vl_convert.vegalite_to_png(
        json.dumps({**spec, "title": title}), vl_version=VEGA_LITE, scale=2, allowed_base_urls=[]
    )
    return image


def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed, for a page that must not ask the network for them."""
    code: str = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]
    return code
