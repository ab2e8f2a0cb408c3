"""Typed run configuration: `schema` says what there is, `load` reads it."""

from oprd_megatron.config.load import dump_config, load_config, parse_config
from oprd_megatron.config.schema import RunConfig

__all__ = ["RunConfig", "dump_config", "load_config", "parse_config"]
