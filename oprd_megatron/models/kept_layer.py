"""A layer that stays in bf16 inside a model whose linear layers Transformer Engine computes in fp8.

mcore can keep layers at the ends; this keeps any. TE's contexts nest, and the innermost decides: built inside one that is off,
a layer's parameters are in bf16; called inside one, so are its products. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import transformer_engine.pytorch as te
from megatron.core.transformer.transformer_layer import TransformerLayer


class KeptLayer(TransformerLayer):
    """mcore's layer, in bf16 whatever surrounds it. Not for the recipe `delayed`."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Called by mcore."""
        with te.fp8_model_init(enabled=False):
            super().__init__(*arguments, **keywords)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """mcore's, hooks included."""
        with te.fp8_autocast(enabled=False):
            return super().__call__(*arguments, **keywords)
