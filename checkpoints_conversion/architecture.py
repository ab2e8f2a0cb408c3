"""What a decoder is (`Architecture`) and how its weights are cut (`Sharding`). No torch here.

`Architecture` is the part of a Hugging Face `config.json` that decides the maths, under one set of names for every
family. `Sharding` says which slice of it one tensor-parallel rank holds, including the two paddings Megatron needs:

- the vocabulary is padded so that it divides by the tensor-parallel size (extra rows are zero);
- the query groups are padded for the same reason (SmolLM2 has 9 heads in 3 groups; TP 2 needs 4 groups). A padded
  group has zero q, k, v rows and zero columns in the output projection: it contributes nothing and its gradient is
  exactly zero, so it stays zero through training and is dropped on export.
"""

from dataclasses import dataclass
from typing import Literal

from oprd_megatron.errors import LayoutError

VOCAB_MULTIPLE = 128
"""Each tensor-parallel rank's share of the vocabulary is padded to a multiple of this (Megatron's convention)."""


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of the rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LongRope:
    """Phi-3's stretching (`rope_type: longrope`): each rotary frequency is divided by a factor of its own, from one list up
    to the original length and from another beyond it; sines and cosines are multiplied by `attention_factor`."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


@dataclass(frozen=True)
class LinearRope:
    """All rotary frequencies divided by one factor (`rope_type: linear`)."""

    factor: float


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that stands in every layer in place of the MLP."""

    num_experts: int
    top_k: int
    """Experts that a token goes to."""
    ffn_hidden_size: int
    """Of one expert."""
    normalised: bool
    """Whether the weights of a token's experts are scaled to sum to one."""


@dataclass(frozen=True)
class Architecture:
    """The maths of one decoder-only model, read from its `config.json` by `read_architecture`."""

    family: str
    """`model_type` of the Hugging Face config: a key of `checkpoints_conversion.families.FAMILIES`."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of a layer's MLP, or of one expert."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding in the file, before any padding."""
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    rope_scaling: Llama3Rope | LongRope | LinearRope | None
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rotary_fraction: float = 1.0
    """Part of every head that is rotated, its first dimensions (Phi-4-mini)."""
    attention_windows: tuple[int | None, ...] = ()
    """For each layer, how many positions a query sees, its own included; None for all. Empty: all layers see all."""
    local_rotary_base: float | None = None
    """Rotary base of the layers with a window, without scaling, where it is another (Gemma 3)."""
    attention_scale: float | None = None
    """Factor on the attention scores; None for 1 / sqrt(head_dim)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the gate of the MLP."""
    zero_centred_norm: bool = False
    """A norm multiplies by 1 + weight (Gemma)."""
    sandwich_norm: bool = False
    """Attention's and MLP's outputs are normed too, before they are added to the residual (Gemma)."""
    embedding_scale: float = 1.0
    """Factor on the embedded tokens, rounded to the model's dtype (Gemma)."""
    experts: Experts | None = None

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups


@dataclass(frozen=True)
class Sharding:
    """The slice of a model that one tensor-parallel rank holds."""

    tp_rank: int
    tp_size: int
    num_query_groups_padded: int
    """Query groups of the Megatron model over all ranks: at least the architecture's, divisible by `tp_size`."""
    vocab_size_padded: int
    """Embedding rows of the Megatron model over all ranks: at least the architecture's, divisible by `tp_size`."""

    def __post_init__(self) -> None:
        assert 0 <= self.tp_rank < self.tp_size, f"tp_rank {self.tp_rank} outside a group of {self.tp_size}"

    @classmethod
    def smallest(cls, arch: Architecture, tp_rank: int = 0, tp_size: int = 1, vocab_multiple: int = 1) -> "Sharding":
        """The sharding with the least padding.

        Args:
            arch: the model to cut.
            tp_rank: this rank's place in its tensor-parallel group.
            tp_size: size of that group.
            vocab_multiple: each rank's share of the vocabulary is a multiple of this (128 suits GPU kernels).
        """
        return cls(
            tp_rank=tp_rank,
            tp_size=tp_size,
            num_query_groups_padded=_round_up(arch.num_query_groups, tp_size),
            vocab_size_padded=_round_up(arch.vocab_size, tp_size * vocab_multiple),
        )

    def check(self, arch: Architecture) -> None:
        """Refuse a sharding that does not fit the model.

        Raises:
            LayoutError: a padded size is smaller than the real one, or something does not divide by `tp_size`.
        """
        sizes = (
            ("num_query_groups_padded", self.num_query_groups_padded, arch.num_query_groups),
            ("vocab_size_padded", self.vocab_size_padded, arch.vocab_size),
            ("ffn_hidden_size", arch.ffn_hidden_size, arch.ffn_hidden_size),
        )
        for name, padded, real in sizes:
            if padded < real:
                raise LayoutError(f"{name} is {padded}, smaller than the model's {real}; raise it to at least {real}")
            if padded % self.tp_size:
                raise LayoutError(
                    f"{name} {padded} does not divide by tensor-parallel size {self.tp_size}; choose another tp"
                )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
