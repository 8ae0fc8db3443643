"""Whether W&B can be used online from here: a wish, a key and a host that answers."""

from __future__ import annotations

import logging
import netrc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from tpresearch.config.network import answers
from tpresearch.config.schema import WandbMode

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

log = logging.getLogger(__name__)


def choose_mode(wanted: WandbMode, settings: wandb.Settings) -> Mode:
    """The config's wish, else the environment's (WANDB_MODE), as far as it can work; said where it cannot."""
    if wanted is WandbMode.offline:
        return "offline"
    if wanted is WandbMode.auto and settings.mode in ("offline", "dryrun"):
        log.info("W&B: offline, as WANDB_MODE asks")
        return "offline"
    if wanted is WandbMode.auto and settings.mode == "disabled":
        log.info("W&B: off, as WANDB_MODE asks")
        return "disabled"
    if not has_key(settings):
        log.warning("W&B: offline, because there is no API key; `wandb login` or WANDB_API_KEY gives one")
        return "offline"
    if not answers(settings.base_url):
        log.warning("W&B: offline, because %s does not answer", settings.base_url)
        return "offline"
    return "online"


def has_key(settings: wandb.Settings) -> bool:
    """Whether the client would find credentials: in its settings, the environment or the netrc file."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        accounts = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return accounts.authenticators(urlsplit(settings.base_url).netloc) is not None
