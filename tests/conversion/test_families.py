"""config.json -> Architecture, and the tables' names and shapes, against what transformers really writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conversion_models import FAMILIES, LLAMA3_ROPE, LONG_ROPE, tiny_config, write_tiny_model
from safetensors.torch import load_file

from checkpoints_conversion import Architecture, Llama3Rope, mappings_for, read_architecture
from checkpoints_conversion.architecture import Experts, LinearRope, LongRope
from oprd_megatron.errors import CheckpointError

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
"""SmolLM2-135M-Instruct, in the spelling before transformers 5."""


def write_config(directory: Path, config: dict[str, object]) -> Path:
    """A directory with nothing but this config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def saved_config(family: str, tmp_path: Path, **changes: object) -> dict[str, object]:
    """What transformers writes for a tiny model."""
    tiny_config(family, **changes).save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_writes(family: str, tied: bool, tmp_path: Path) -> None:
    """Every field of a config written by the installed transformers arrives under our name."""
    tiny_config(family, tied).save_pretrained(tmp_path)
    llama = Architecture(
        family=family,
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=6,
        num_query_groups=3,
        head_dim=8,
        vocab_size=509,
        max_position_embeddings=256,
        norm_epsilon=1e-6,
        rotary_base=123456.0,
        rope_scaling=None,
        tie_word_embeddings=tied,
        qkv_bias=False,
        qk_norm=False,
    )
    assert read_architecture(tmp_path) == replace(llama, **FIELDS_OF_FAMILY.get(family, {}))  # type: ignore[arg-type]


FIELDS_OF_FAMILY: dict[str, dict[str, object]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"head_dim": 16, "qk_norm": True},
    "qwen3_moe": {
        "head_dim": 16,
        "qk_norm": True,
        "ffn_hidden_size": 24,
        "experts": Experts(4, 2, 24, normalised=False),
    },
    "mixtral": {"norm_epsilon": 1e-5, "experts": Experts(4, 2, 80, normalised=True)},
    "mistral": {"head_dim": 16, "attention_windows": (5, 5, 5)},
    "phi3": {
        "norm_epsilon": 1e-5,
        "attention_windows": (7, 7, 7),
        "rotary_fraction": 0.5,
        "rope_scaling": LongRope((1.0, 1.5), (2.0, 4.0), 16, attention_factor=2**0.5),  # sqrt(1 + ln 16 / ln 16)
    },
    "gemma3_text": {
        "head_dim": 16,
        "qk_norm": True,
        "attention_windows": (5, None, 5),
        "rope_scaling": LinearRope(8.0),
        "local_rotary_base": 4321.0,
        "attention_scale": 0.1,
        "activation": "gelu_tanh",
        "zero_centred_norm": True,
        "sandwich_norm": True,
        "embedding_scale": 48**0.5,
    },
}
"""What is otherwise than in Llama."""


def test_reads_the_spelling_before_transformers_5(tmp_path: Path) -> None:
    """Top-level rope_theta, torch_dtype and SmolLM2's extra keys are understood; head_dim follows from the width."""
    arch = read_architecture(write_config(tmp_path, SMOLLM2))
    assert (arch.rotary_base, arch.rope_scaling, arch.head_dim) == (100000.0, None, 64)
    assert (arch.num_attention_heads, arch.num_query_groups, arch.heads_per_group) == (9, 3, 3)
    assert arch.tie_word_embeddings


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type"])
def test_reads_llama3_rope_in_every_spelling(spelling: str, tmp_path: Path) -> None:
    """The new nested object, the old scaling beside rope_theta, and the older `type` give the same rope."""
    config = saved_config("llama", tmp_path, rope_parameters=LLAMA3_ROPE)
    if spelling != "rope_parameters":
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        if spelling == "type":
            rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope
    arch = read_architecture(write_config(tmp_path, config))
    assert arch.rotary_base == 500000.0
    assert arch.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 64)


def test_old_configs_of_the_other_families(tmp_path: Path) -> None:
    """Published Qwen2.5 and Qwen3 configs keep window settings they do not use; no group count means one a head."""
    window = {"sliding_window": 4096, "max_window_layers": 21, "use_sliding_window": False}
    for family in ("qwen2", "qwen3"):
        config = saved_config(family, tmp_path / family)
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config.update(window, rope_scaling=None)
        del config["layer_types"], config["num_key_value_heads"]
        arch = read_architecture(write_config(tmp_path / family, config))
        assert arch.num_query_groups == arch.num_attention_heads == 6


def test_head_dim_default_is_the_one_transformers_has(tmp_path: Path) -> None:
    """Without head_dim Llama and Qwen2 divide the width by the heads; Qwen3's default is 128 whatever the width."""
    for family, head_dim in (("llama", 8), ("qwen2", 8), ("qwen3", 128)):
        config = saved_config(family, tmp_path / family)
        config.pop("head_dim", None)
        assert read_architecture(write_config(tmp_path / family, config)).head_dim == head_dim


REFUSALS = [
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("llama", {"sliding_window": 4096}, "sliding_window"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2", {"use_mrope": True}, "use_mrope"),
    ("qwen2", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"model_type": "gemma2"}, "model_type 'gemma2' is not supported; supported: llama, qwen2, qwen3"),
    ("gemma3_text", {"model_type": "gemma3"}, "model_type 'gemma3' is not supported; extract its text part"),
    ("llama", {"model_type": None}, "model_type"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}}, "factor"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial",
    ),
    ("llama", {"rope_parameters": {"rope_type": "default"}}, "no rope_theta"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta"),
    ("llama", {"rope_parameters": 3}, "rope_parameters"),
    ("llama", {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": None}}, "low_freq_factor"),
    ("llama", {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ("llama", {"rope_theta": 5.0}, "disagree"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "disagree"),
    ("llama", {"num_key_value_heads": 4}, "num_key_value_heads"),
    ("llama", {"hidden_size": 0}, "hidden_size"),
    ("llama", {"hidden_size": 50, "head_dim": None}, "head_dim"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
    ("llama", {"vocab_size": "many"}, "vocab_size"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act"),
    ("mistral", {"rope_parameters": {"rope_type": "llama4", "rope_theta": 1e4}}, "default, linear and llama3 are"),
    (
        "mistral",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial",
    ),
    ("phi3", {"attention_bias": True}, "attention_bias"),
    ("phi3", {"mlp_bias": True}, "mlp_bias"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
    ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop"),
    ("phi3", {"embd_pdrop": 0.1}, "embd_pdrop"),
    ("phi3", {"full_attn_mod": 2}, "full_attn_mod"),
    ("phi3", {"interpolate_factor": 2}, "interpolate_factor"),
    ("phi3", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    (
        "phi3",
        {"partial_rotary_factor": 0.75},
        "partial_rotary_factor and rope_parameters.partial_rotary_factor disagree",
    ),
    ("phi3", {"rope_parameters": {**LONG_ROPE, "partial_rotary_factor": 0.375}}, "must be even"),
    ("phi3", {"rope_parameters": {**LONG_ROPE, "partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5"),
    ("phi3", {"rope_parameters": {**LONG_ROPE, "long_factor": [1.0]}}, "long_factor has 1 numbers, not 2"),
    ("phi3", {"rope_parameters": {**LONG_ROPE, "short_factor": [1.0, None]}}, "short_factor"),
    ("phi3", {"rope_parameters": {**LONG_ROPE, "short_factor": 1.0}}, "short_factor must be a list"),
    ("phi3", {"rope_parameters": {**LONG_ROPE, "short_mscale": 1.0}}, "short_mscale"),
    ("phi3", {"rope_parameters": {**LONG_ROPE, "original_max_position_embeddings": 32}}, "the top level's, 16"),
    ("phi3", {"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
    ("phi3", {"rope_parameters": {**LONG_ROPE, "attention_factor": 0}}, "attention_factor"),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "default and longrope are",
    ),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("gemma3_text", {"attention_bias": True}, "attention_bias"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma3_text", {"sliding_window": None, "layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types must be 3 times"),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern"),
    ("gemma3_text", {"layer_types": None, "_sliding_window_pattern": 5}, "_sliding_window_pattern"),
    (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "full_attention and sliding_attention",
    ),
    ("gemma3_text", {"rope_parameters": None, "rope_theta": 1e6}, "sliding_attention, whose rope_theta"),
    ("gemma3_text", {"rope_parameters": None, "rope_local_base_freq": 1e4}, "no rope_theta"),
    ("gemma3_text", {"rope_theta": 5.0}, "disagree"),
    ("gemma3_text", {"rope_local_base_freq": 5.0}, "disagree"),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "disagree"),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "linear"}}},
        "only default is",
    ),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSALS, ids=[f"{f}-{n}" for f, _, n in REFUSALS])
def test_refuses_by_name(family: str, changes: dict[str, object], named: str, tmp_path: Path) -> None:
    """What is not understood, or not implemented, is refused in one line that names config.json and the key."""
    write_config(tmp_path, {**saved_config(family, tmp_path), **changes})
    with pytest.raises(CheckpointError) as refusal:
        read_architecture(tmp_path)
    message = str(refusal.value)
    assert named in message and str(tmp_path / "config.json") in message and "\n" not in message


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_parameters",
        "model_type",
    ],
)
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    """Nothing that decides the maths has a default of ours."""
    config = saved_config("llama", tmp_path)
    del config[key]
    with pytest.raises(CheckpointError, match="rope_theta" if key == "rope_parameters" else key):
        read_architecture(write_config(tmp_path, config))


@pytest.mark.parametrize(
    "junk", [None, [], {}, "x", -1, 0, True, float("nan"), float("inf"), [[]], {"a": []}], ids=repr
)
@pytest.mark.parametrize("family", ["llama", "llama with llama3", "mistral", "phi3", "gemma3_text"])
def test_junk_is_accepted_or_refused_never_a_crash(family: str, junk: object, tmp_path: Path) -> None:
    """Whatever stands behind a key, the outcome is an Architecture with sane numbers or a one-line refusal."""
    family, _, stretched = family.partition(" with ")
    config = saved_config(family, tmp_path, **({"rope_parameters": LLAMA3_ROPE} if stretched else {}))
    parameters = config["rope_parameters"]
    assert isinstance(parameters, dict)
    broken = [{**config, key: junk} for key in config]
    broken += [{**config, "rope_parameters": {**parameters, key: junk}} for key in parameters]
    for candidate in broken:
        write_config(tmp_path, candidate)
        try:
            arch = read_architecture(tmp_path)
        except CheckpointError as refusal:
            assert "\n" not in str(refusal)
        else:
            assert 0 < arch.norm_epsilon < 1 and 0 < arch.rotary_base < 1e9 and arch.hidden_size > 0


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    """No directory, no file, no JSON, no object: one line each."""
    for content, told in ((None, "no such file"), ("{", "not valid JSON"), ("[1]", "no JSON object")):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=told):
            read_architecture(tmp_path)
    with pytest.raises(CheckpointError, match="no such model directory"):
        read_architecture(tmp_path / "nowhere")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_table_is_the_file(family: str, tied: bool, tmp_path: Path) -> None:
    """The exported rows of the table name exactly the file's tensors, with their shapes, each once."""
    write_tiny_model(family, tmp_path, tied)
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert ("lm_head.weight" in expected) != tied
    named: list[str] = []
    for mapping in mappings_for(read_architecture(tmp_path)).values():
        if mapping.exported:
            named += mapping.hf_names
            assert mapping.hf_shapes == {name: expected[name] for name in mapping.hf_names}
    assert sorted(named) == sorted(expected)


def test_tables_share_no_state(tmp_path: Path) -> None:
    """A tied student read before an untied teacher leaves the teacher's output layer alone (a bug of mbridge's)."""
    tied = read_architecture(write_config(tmp_path, SMOLLM2))
    untied = replace(tied, tie_word_embeddings=False)
    assert mappings_for(tied)["output_layer.weight"].hf_names == ("model.embed_tokens.weight",)
    assert mappings_for(untied)["output_layer.weight"].hf_names == ("lm_head.weight",)
    assert mappings_for(tied)["output_layer.weight"].hf_names == ("model.embed_tokens.weight",)
