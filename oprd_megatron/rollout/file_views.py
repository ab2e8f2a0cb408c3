"""A transformers model's parameters under the names, and in the shapes, that its file has.

transformers 5 keeps the experts of a layer in two tensors, `experts.gate_up_proj` [E, 2F, D] and `experts.down_proj`
[E, D, F]; files have three matrices an expert. The matrices are views: what is copied into them is in the model.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from checkpoints_conversion.families.experts import EXPERT_NAMES


def as_in_files(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter by its name in the file, none of them a copy."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    names = EXPERT_NAMES.get(model.config.model_type)
    if names is None:
        return parameters
    views: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        name = name.replace(".mlp.", f".{names.block}.")
        block, _, part = name.rpartition(".")
        for expert, matrix in enumerate(parameter.unbind() if parameter.dim() == 3 else ()):
            if part == "gate_up_proj":
                gate, up = matrix.chunk(2)
                views |= {f"{block}.{expert}.{names.gate}.weight": gate, f"{block}.{expert}.{names.up}.weight": up}
            else:
                views[f"{block}.{expert}.{names.down}.weight"] = matrix
        if parameter.dim() < 3:
            views[name] = parameter
    return views
