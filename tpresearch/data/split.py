"""Which text is held out for evaluation: decided by names, so the same for every run, tokenizer and plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from itertools import islice

from tpresearch.data.documents import Document

DOCUMENTS_PER_HELD_OUT = 5
"""With fewer than this many times `held_out_every` documents, too few names may fall on the held-out side."""

Split = Callable[[Document], tuple[str, str]]
"""A document's text, as (train text, held-out text); one of them is empty when documents are kept whole."""


def is_held_out(name: str, every: int) -> bool:
    return int(hashlib.sha1(name.encode()).hexdigest(), 16) % every == 0


def choose_split(documents: Iterable[Document], every: int, chars: int | None = None) -> Split:
    """How a corpus is split, judged by its first `5 * every` documents or first `chars` of text.

    Whole documents are held out where sha1(name) % every == 0. A corpus with fewer documents than that (a
    single text file, say), or whose first ones would all fall on one side, gives the last 1/every of each
    document instead.
    """
    enough = DOCUMENTS_PER_HELD_OUT * every
    held_out: list[bool] = []
    for document in islice(documents, enough):
        held_out.append(is_held_out(document.name, every))
        if chars is not None and (chars := chars - len(document.text)) <= 0:
            break
    if len(held_out) == enough and 0 < sum(held_out) < enough:
        return lambda document: by_name(document, every)
    return lambda document: by_tail(document, every)


def by_name(document: Document, every: int) -> tuple[str, str]:
    return ("", document.text) if is_held_out(document.name, every) else (document.text, "")


def by_tail(document: Document, every: int) -> tuple[str, str]:
    """The text cut at 1/every before its end, or at a line's start at most as far again before."""
    text = document.text
    share = max(len(text) // every, 1)
    cut = len(text) - share
    line = text.rfind("\n", max(cut - share, 0), cut) + 1
    cut = line or cut
    return text[:cut], text[cut:]
