"""What the families share: reading config.json under an allow-list, and the table of a dense pre-norm decoder.

A family is data: which keys of its config.json it understands, and one table of mappings. Every key must be read into
`Architecture`, fixed to the one value this project implements, or known to change nothing. Any other is refused
by name.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_conversion import mappings as m
from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.rope import ROPE_KEYS, Rope, read_rope
from checkpoints_conversion.families.values import read_flag, read_number, read_size
from checkpoints_conversion.files.json_file import read_json
from checkpoints_conversion.files.messages import quoted
from oprd_megatron.errors import CheckpointError

READ_KEYS = ROPE_KEYS | {
    "model_type",
    "architectures",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "layer_types",
}
"""Keys that become a field of `Architecture` or are checked against one."""

FIXED_VALUES: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}
"""Keys that may be absent or have exactly this value (which is also what transformers means when they are absent)."""

HARMLESS_KEYS = frozenset(
    {
        # provenance and file handling
        "_name_or_path",
        "_model_name_or_path",
        "name_or_path",
        "_attn_implementation_autoset",
        "transformers_version",
        "transformers.js_config",
        "torch_dtype",
        "dtype",
        "unsloth_fixed",
        "unsloth_version",
        # special tokens and generation
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "use_cache",
        # initialisation, which loading overwrites
        "initializer_range",
        # what a forward pass returns, or how it is cut, not what it computes
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "torchscript",
        "is_decoder",
        # heads of other tasks
        "id2label",
        "label2id",
        "problem_type",
        "task_specific_params",
        "finetuning_task",
        "tokenizer_class",
        "prefix",
    }
)

LayerTable = Callable[[Architecture], tuple[m.Mapping, ...]]
Extend = Callable[[Architecture, dict[str, Any], Path], Architecture]
ReadRope = Callable[[dict[str, Any], Path], Rope]


@dataclass(frozen=True)
class Family:
    """One model family: how its config is read and which mappings a layer has."""

    model_type: str
    hf_class: str
    """The only entry `architectures` may have."""
    fixed_values: Mapping[str, Any]
    """In addition to `FIXED_VALUES`."""
    harmless_keys: frozenset[str]
    """In addition to `HARMLESS_KEYS`."""
    qkv_bias: bool
    qk_norm: bool
    default_head_dim: int | None
    """What transformers takes when `head_dim` is absent; None: hidden_size / num_attention_heads."""
    layer_table: LayerTable
    read_keys: frozenset[str] = frozenset()
    """In addition to `READ_KEYS`: what `extend` reads. A key that is here may have other values than its `FIXED_VALUES`."""
    extend: Extend = lambda arch, config, path: arch
    """Adds to the architecture what only this family's config says."""
    default_tied: bool = False
    """What transformers takes when `tie_word_embeddings` is absent."""
    rope: ReadRope = read_rope
    """Reads the rotary settings."""

    def translate(self, config: dict[str, Any], path: Path) -> Architecture:
        """Read a parsed config.json.

        Args:
            config: the parsed file.
            path: where it came from, for messages.

        Raises:
            CheckpointError: a key is missing, unknown, or has a value this project does not implement.
        """
        self._refuse_what_is_not_understood(config, path)
        heads = read_size(config, "num_attention_heads", path)
        groups = read_size(config, "num_key_value_heads", path, default=heads)
        if heads % groups:
            raise CheckpointError(
                f"{path}: num_attention_heads {heads} does not divide by num_key_value_heads {groups}"
            )
        hidden_size = read_size(config, "hidden_size", path)
        num_layers = read_size(config, "num_hidden_layers", path)
        if "layer_types" not in self.read_keys:
            _check_layer_types(config, num_layers, path)
        rope = self.rope(config, path)
        arch = Architecture(
            family=self.model_type,
            num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=read_size(config, "intermediate_size", path),
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=self._head_dim(config, hidden_size, heads, path),
            vocab_size=read_size(config, "vocab_size", path),
            max_position_embeddings=read_size(config, "max_position_embeddings", path),
            norm_epsilon=read_number(config, "rms_norm_eps", path),
            rotary_base=rope.rotary_base,
            rope_scaling=rope.rope_scaling,
            rotary_fraction=rope.rotary_fraction,
            local_rotary_base=rope.local_rotary_base,
            tie_word_embeddings=read_flag(config, "tie_word_embeddings", path, self.default_tied),
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
        )
        return self.extend(arch, config, path)

    def mappings(self, arch: Architecture) -> dict[str, m.Mapping]:
        """The table of the whole model by Megatron name, in the order it is streamed: embedding, layers, head."""
        template = self.layer_table(arch)
        layers = [row.for_layer(index) for index in range(arch.num_layers) for row in template]
        table = [_embedding(arch), *layers, *_head(arch)]
        return {row.megatron_name: row for row in table}

    def _refuse_what_is_not_understood(self, config: dict[str, Any], path: Path) -> None:
        classes = config.get("architectures")
        if classes is not None and classes != [self.hf_class]:
            raise CheckpointError(
                f"{path}: architectures is {quoted(classes)}; only {[self.hf_class]} is supported for this type"
            )
        fixed = {key: value for key, value in FIXED_VALUES.items() if key not in self.read_keys} | dict(
            self.fixed_values
        )
        known = READ_KEYS | HARMLESS_KEYS | self.harmless_keys | self.read_keys
        for key, value in config.items():
            if key in fixed:
                if value != fixed[key]:
                    raise CheckpointError(f"{path}: {key} is {quoted(value)}; only {fixed[key]!r} is supported")
            elif key not in known:
                raise CheckpointError(
                    f"{path}: key {quoted(key)} is not understood for {self.model_type} and might change the maths; "
                    "delete it from config.json if it is known to be harmless"
                )

    def _head_dim(self, config: dict[str, Any], hidden_size: int, heads: int, path: Path) -> int:
        if config.get("head_dim") is not None:
            return read_size(config, "head_dim", path)
        if self.default_head_dim is not None:
            return self.default_head_dim
        if hidden_size % heads:
            raise CheckpointError(
                f"{path}: no head_dim, and hidden_size {hidden_size} does not divide by {heads} heads"
            )
        return hidden_size // heads


def dense_layer_table(arch: Architecture) -> tuple[m.Mapping, ...]:
    """One layer of a pre-norm decoder with grouped-query attention and a gated MLP, without biases (Llama)."""
    ours, theirs = "decoder.layers.{layer}.mlp", "model.layers.{layer}.mlp"
    width, ffn = arch.hidden_size, arch.ffn_hidden_size
    return (
        *attention_rows(arch),
        m.GatedMLP(
            f"{ours}.linear_fc1.weight", (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"), (ffn, width)
        ),
        m.RowParallel(f"{ours}.linear_fc2.weight", (f"{theirs}.down_proj.weight",), (width, ffn)),
    )


def attention_rows(arch: Architecture) -> tuple[m.Mapping, ...]:
    """What a layer of `dense_layer_table` holds besides its MLP: attention, and both norms."""
    ours, theirs = "decoder.layers.{layer}", "model.layers.{layer}"
    width = arch.hidden_size
    group_width = arch.heads_per_group * arch.head_dim
    return (
        m.Replicated(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), width),
        qkv_row(arch, "weight", width),
        m.AttentionOutput(
            f"{ours}.self_attention.linear_proj.weight",
            (f"{theirs}.self_attn.o_proj.weight",),
            (width, arch.num_query_groups * group_width),
            group_width,
        ),
        m.Replicated(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), width),
    )


def qkv_row(arch: Architecture, kind: str, columns: int | None) -> m.QKV:
    """The row of `linear_qkv.{kind}`: kind "weight" with `columns` inputs, or "bias" with None."""
    return m.QKV(
        f"decoder.layers.{{layer}}.self_attention.linear_qkv.{kind}",
        tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}" for part in "qkv"),
        arch.num_query_groups,
        arch.heads_per_group,
        arch.head_dim,
        columns,
    )


def _embedding(arch: Architecture) -> m.Mapping:
    shape = (arch.vocab_size, arch.hidden_size)
    return m.VocabParallel("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), shape)


def _head(arch: Architecture) -> tuple[m.Mapping, ...]:
    """Final norm and output layer. Tied, the last stage's copy loads from the embedding and is not exported."""
    source = "model.embed_tokens.weight" if arch.tie_word_embeddings else "lm_head.weight"
    shape = (arch.vocab_size, arch.hidden_size)
    return (
        m.Replicated("decoder.final_layernorm.weight", ("model.norm.weight",), arch.hidden_size),
        m.VocabParallel("output_layer.weight", (source,), shape, exported=not arch.tie_word_embeddings),
    )


def read_config(hf_dir: Path) -> dict[str, Any]:
    """Parse `hf_dir/config.json`.

    Raises:
        CheckpointError: no such directory, no config.json in it, or it is not a JSON object.
    """
    path = hf_dir / "config.json"
    if not os.path.isdir(hf_dir):
        raise CheckpointError(f"{hf_dir}: no such model directory; give the directory that holds config.json")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file; give a Hugging Face model directory")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download it again")
    return config


def _check_layer_types(config: dict[str, Any], num_layers: int, path: Path) -> None:
    types = config.get("layer_types")
    if types is not None and types != ["full_attention"] * num_layers:
        raise CheckpointError(
            f"{path}: layer_types must be full_attention {num_layers} times; no other layer is supported"
        )
