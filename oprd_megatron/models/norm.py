"""RMSNorm for mcore's layers where Transformer Engine is absent."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dim, as Hugging Face's Llama and Qwen norms compute it; with
    1 + weight for weight, rounded once and not twice, as Gemma's do (`layernorm_zero_centered_gamma` of mcore's config).

    mcore's own torch norm refuses sequence parallelism because nothing would sum the weight's gradient over the
    tensor-parallel ranks. Marking the weight makes mcore's gradient finalisation do exactly that.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        """Called by mcore with its config, the width and the epsilon. The weight is in `params_dtype`: a float32 norm in
        a bf16 model breaks the distributed optimizer's checkpoint."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.epsilon = eps
        self.zero_centred = config.layernorm_zero_centered_gamma
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (mcore's own mark)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., D], any float dtype; statistics in fp32, result in x's dtype."""
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        if self.zero_centred:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)


class NormedRowParallelLinear(RowParallelLinear):
    """A row-parallel layer whose output, summed over the tensor-parallel ranks, is normed: the sandwich norms of Gemma's
    attention and MLP. mcore adds what it returns to the residual.

    The norm's name is Megatron-Bridge's. It has whole rows also under sequence parallelism, where the sum leaves each rank
    some of the tokens; its weight is marked like every norm's.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **keywords: Any) -> None:
        """Called by mcore."""
        super().__init__(input_size, output_size, config=config, **keywords)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, features / tp] -> ([S, B, D] or this rank's rows of it, None)."""
        output, bias = super().forward(input_)
        assert bias is None, "a bias would have to be added before the norm"
        return self.post_layernorm(output), bias
