"""Pauses Python's garbage collection where there is no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """For imports: inside it nothing is collected, and the objects that exist at its end are never scanned again.

    Of torch's import a third is a search among objects that all stay, and another follows when the process ends.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
