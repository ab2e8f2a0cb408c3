"""RMSNorm for mcore's layers where Transformer Engine is absent."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dim, as Hugging Face's Llama and Qwen norms compute it.

    mcore's own torch norm refuses sequence parallelism because nothing would sum the weight's gradient over the
    tensor-parallel ranks. Marking the weight makes mcore's gradient finalisation do exactly that.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        """Called by mcore with its config, the width and the epsilon. The weight is in `params_dtype`: a float32 norm in
        a bf16 model breaks the distributed optimizer's checkpoint."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.epsilon = eps
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (mcore's own mark)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., D], any float dtype; statistics in fp32, result in x's dtype."""
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(x.dtype)
