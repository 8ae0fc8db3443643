"""A study's files import each other by their bare names, as scripts do: so do tests of them."""

from __future__ import annotations

import sys
from pathlib import Path

for study in ("two_hosts", "gpu", "published"):
    sys.path.append(str(Path(__file__).parents[2] / "experiments" / study))
