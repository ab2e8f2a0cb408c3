"""Hugging Face <-> Megatron: one table of mappings per family, used to load, to export and to sync weights.

Layers of the package, each importing only those above it:
    architecture    what a model is, how it is cut (no torch)
    mappings        the named mappings, two verbs each
    families        config.json -> Architecture, Architecture -> table of mappings
    reader          checks and slices of a Hugging Face directory
    live, writer    a live sharded model in and out; a directory written all or nothing
    export          the two together
"""

from checkpoints_conversion.architecture import Architecture, Llama3Rope, Sharding
from checkpoints_conversion.export import export_hf
from checkpoints_conversion.families import FAMILIES, mappings_for, read_architecture
from checkpoints_conversion.live import canonical_parameters, load_hf_weights, stream_hf_tensors, stream_hf_weights
from checkpoints_conversion.mappings import Mapping
from checkpoints_conversion.reader import HFReader, check_model
from checkpoints_conversion.writer import write_hf_directory

__all__ = [
    "FAMILIES",
    "Architecture",
    "HFReader",
    "Llama3Rope",
    "Mapping",
    "Sharding",
    "canonical_parameters",
    "check_model",
    "export_hf",
    "load_hf_weights",
    "mappings_for",
    "read_architecture",
    "stream_hf_tensors",
    "stream_hf_weights",
    "write_hf_directory",
]
