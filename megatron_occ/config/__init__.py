"""Configuration: schema, loading, presets, validation and help. Imports no torch."""

from __future__ import annotations

from megatron_occ.config.errors import ConfigError
from megatron_occ.config.files import files_not_found
from megatron_occ.config.help import help_text, reference_markdown
from megatron_occ.config.load import flat_values, load_config, save_config, to_yaml
from megatron_occ.config.presets import PRESETS
from megatron_occ.config.resume import check_resumed
from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import Sizes, derive
from megatron_occ.config.validate import pretrains_first, validate

__all__ = [
    "PRESETS",
    "Config",
    "ConfigError",
    "Sizes",
    "check_resumed",
    "derive",
    "files_not_found",
    "flat_values",
    "help_text",
    "load_config",
    "pretrains_first",
    "reference_markdown",
    "save_config",
    "to_yaml",
    "validate",
]
