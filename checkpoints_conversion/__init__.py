"""Hugging Face <-> Megatron: one table of mappings per family, used to load, to export and to sync weights.

Layers of the package, each importing only those above it:
    architecture    what a model is, how it is cut
    mappings        the named mappings: which rows are which
    families        config.json -> Architecture, Architecture -> table of mappings
    reader          checks of a Hugging Face directory, and rows of its tensors on demand
    live, writer    a live sharded model in and out; a directory written all or nothing
    export          the two together
Only the last line of these imports torch.
"""

from checkpoints_conversion.architecture import Architecture, Llama3Rope, Sharding
from checkpoints_conversion.families import FAMILIES, mappings_for, read_architecture
from checkpoints_conversion.mappings import Mapping
from checkpoints_conversion.reader import HFReader, check_model

__all__ = [
    "FAMILIES",
    "Architecture",
    "HFReader",
    "Llama3Rope",
    "Mapping",
    "Sharding",
    "check_model",
    "mappings_for",
    "read_architecture",
]
