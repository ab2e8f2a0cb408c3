"""Hugging Face <-> Megatron: one table of mappings per family, used to load, to export and to sync weights.

    architecture    what a model is, how it is cut
    mappings        the named mappings: which rows are which
    families        config.json -> Architecture, Architecture -> table of mappings
    files           files as bytes; safetensors
    reader          checks of a Hugging Face directory, and rows of its tensors on demand
    formats         the same for .bin and GGUF; tokenizer: what belongs to a model beside its weights
    torch_dist      megatron-core's checkpoint format; interop: what other packages look for beside it
    convert         import and export, resumable; commands: `oprd convert`
    weights         what a run's path may be: Hugging Face or Megatron, with config and tokenizer
    verify          do two models compute the same?  describe: what is this directory?
    live            a live sharded model in and out
Only `live` and `verify` import torch; `convert` has a helper process do so.
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
