"""The typed config: its shape (`schema`), how it is made (`compose`), what is legal (`validate`)."""

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config

__all__ = ["Config", "ConfigError"]
