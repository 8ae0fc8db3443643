"""A config goes into files and to W&B, so it may hold no credential."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

CREDENTIAL = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)($|_)", re.IGNORECASE)
SHORTEST = 12
"""Characters; a shorter value is a word that may well occur in a config."""


def refuse_secrets(config: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Raise when the config repeats the value of a credential in the environment, such as HF_TOKEN.

    Raises:
        ValueError: naming the variable, never its value.
    """
    text = json.dumps(config, ensure_ascii=False)
    for name, value in environment.items():
        if (
            CREDENTIAL.search(name)
            and len(value) >= SHORTEST
            and json.dumps(value, ensure_ascii=False)[1:-1] in text
        ):
            raise ValueError(
                f"the config holds the value of ${name}, and would carry it into config.yaml and to W&B; "
                f"take it out and let the library read it from the environment"
            )
