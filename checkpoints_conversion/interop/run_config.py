"""Reading run_config.yaml of Megatron-Bridge, which may come from strangers: nothing in it is executed.

Bridge names Python objects by `_target_`, a plain string here. YAML itself has tags that make some loaders build objects; here
an object of any unknown tag is read as the mapping, list or text that it is written as.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from checkpoints_conversion.files.messages import reason
from checkpoints_conversion.files.regular_file import read_whole
from checkpoints_conversion.interop.settings import RUN_CONFIG
from oprd_megatron.errors import CheckpointError

MAX_BYTES = 2**20
"""Bridge's files have 20 to 60 kB."""


def read_run_config(path: Path) -> dict[str, Any] | None:
    """run_config.yaml of a checkpoint directory (or that file itself); None if there is none.

    Raises:
        CheckpointError: not YAML, not a mapping, too large, or nested too deeply.
    """
    path = path / RUN_CONFIG if path.is_dir() else path
    if not path.exists():
        return None
    text = read_whole(path, MAX_BYTES)
    try:
        found = yaml.load(text, _PlainLoader)
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply for a run_config; copy the checkpoint again") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not valid YAML ({reason(error)}); copy the checkpoint again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no settings by name; copy the checkpoint again")
    return found


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that reads unknown tags as plain values, and merges nothing: merged keys can double at every level."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave `<<` a key like any other."""


def _plain(loader: _PlainLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_PlainLoader.add_constructor(None, _plain)
