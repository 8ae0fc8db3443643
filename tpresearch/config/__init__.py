"""The typed config: its schema (`schema`), composition (`compose`) and validation (`validate`)."""

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config

__all__ = ["Config", "ConfigError"]
