"""Imports without a search for garbage."""

import gc

from tpresearch.launch.garbage import gc_paused


def test_what_is_imported_is_never_looked_through() -> None:
    before = gc.get_freeze_count()
    try:
        with gc_paused():
            with gc_paused():
                imported: list[list[object]] = [[] for _ in range(2000)]
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(imported)
    finally:
        gc.unfreeze()
