"""The supported model families: one config translation and one table of mappings each."""

from pathlib import Path

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.base import Family, read_config
from checkpoints_conversion.families.gemma3 import GEMMA3
from checkpoints_conversion.families.llama import LLAMA
from checkpoints_conversion.families.mistral import MISTRAL
from checkpoints_conversion.families.mixtral import MIXTRAL
from checkpoints_conversion.families.phi3 import PHI3
from checkpoints_conversion.families.qwen2 import QWEN2
from checkpoints_conversion.families.qwen3 import QWEN3
from checkpoints_conversion.families.qwen3_moe import QWEN3_MOE
from checkpoints_conversion.files.messages import quoted
from checkpoints_conversion.mappings import Mapping
from oprd_megatron.errors import CheckpointError

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE, MISTRAL, MIXTRAL, PHI3, GEMMA3)
}
"""Family by `model_type`. To add one: write its file, add it here."""

_INSTEAD = {"gemma3": "extract its text part (text_config, language_model) as a model of type gemma3_text"}
"""What to do about some types that are not supported."""


def read_architecture(hf_dir: str | Path) -> Architecture:
    """What model a Hugging Face directory holds, from its config.json alone.

    Raises:
        CheckpointError: the directory or config.json is missing or broken, the family is not supported, or the config
            asks for something this project does not implement; the message names the file and the key.
    """
    hf_dir = Path(hf_dir)
    config = read_config(hf_dir)
    model_type = config.get("model_type")
    path = hf_dir / "config.json"
    if model_type not in tuple(FAMILIES):
        instead = _INSTEAD.get(str(model_type), f"supported: {', '.join(FAMILIES)}")
        raise CheckpointError(f"{path}: model_type {quoted(model_type)} is not supported; {instead}")
    return FAMILIES[model_type].translate(config, path)


def mappings_for(arch: Architecture) -> dict[str, Mapping]:
    """Every mapping of a model by Megatron name (0-based global layer index), in the order weights are streamed."""
    return FAMILIES[arch.family].mappings(arch)
