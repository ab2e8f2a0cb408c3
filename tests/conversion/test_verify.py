"""Equal models are found equal, and every damage that was tried is found and named."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import tiny_gguf_model, write_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_conversion import FAMILIES
from checkpoints_conversion.convert.hf_to_megatron import import_hf
from checkpoints_conversion.convert.options import Options
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.verify import Report, VerifyOptions, report_text, streaming, verify
from checkpoints_conversion.verify import tensors as tensors_module
from checkpoints_conversion.verify.sides import open_side
from checkpoints_conversion.verify.states import LogitsDifference
from checkpoints_conversion.verify.streaming import Weights
from checkpoints_conversion.verify.transformers_side import run_transformers
from oprd_megatron.errors import CheckpointError
from tests.tiny_models import ORIGINAL_LENGTH, tiny_hf_model, tiny_tokenizer

NUM_LAYERS = 3
Tensors = dict[str, Tensor]


def quiet() -> Progress:
    return Progress(io.StringIO())


def compare(a: Path, b: Path, **options: Any) -> Report:
    """The report; its text and json must at least be writable."""
    report = verify(a, b, VerifyOptions(**options), quiet())
    assert ("\nEQUAL" in report_text(report)) == report.is_equal
    json.dumps(report.as_json(), allow_nan=False)
    return report


def imported(hf_dir: Path, **options: Any) -> Path:
    """A Megatron checkpoint of a model, beside it."""
    out = hf_dir.with_name(hf_dir.name + "-megatron")
    import_hf(hf_dir, out, Options(workers=1, **options), quiet())
    return out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Qwen3: q/k norms, and an output layer of its own."""
    tiny_hf_model("qwen3", tmp_path / "model", tied=False, num_layers=NUM_LAYERS, std=0.1)
    return tmp_path / "model"


def changed(hf_dir: Path, weights: Callable[[Tensors], None] = lambda tensors: None, **config: Any) -> Path:
    """A copy of a model with something changed in its weights, and keys of its config.json."""
    out = hf_dir.with_name("changed")
    out.mkdir()
    for path in hf_dir.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(out / "model.safetensors")
    weights(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    rewrite_config(out, **config)
    return out


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_is_equal(family: Any, tied: bool, tmp_path: Path) -> None:
    """Every family, by transformers and by mcore: all tensors bitwise, and states far within the tolerance."""
    tiny_hf_model(family, tmp_path / "hf", tied=tied, num_layers=NUM_LAYERS)
    report = compare(tmp_path / "hf", imported(tmp_path / "hf"))
    assert report.is_equal, report.reasons
    assert report.tensors.num_bitwise == report.tensors.num_tensors == report.a.num_tensors == report.b.num_tensors
    assert max(state.relative for state in report.states) < 1e-5  # a tenth of the tolerance
    assert report.logits is not None and report.logits.num_same_top == report.logits.num_tokens >= 256
    assert len(report.states) == 1 + NUM_LAYERS + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_states_are_those_of_the_loaded_model(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lending a layer its weights, and the head some of its rows, changes nothing: transformers' own `from_pretrained` gives
    these very states and logits."""
    monkeypatch.setattr(streaming, "READ_BYTES", 1000)
    monkeypatch.setattr(streaming, "HEAD_BYTES", 4 * 32 * 50)  # 50 of 288 rows
    tiny_hf_model(family, tmp_path, tied=False, num_layers=NUM_LAYERS)
    ids = torch.randint(288, (2, ORIGINAL_LENGTH + 8), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = loaded(ids, output_hidden_states=True, use_cache=False)
    found: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        side = open_side(tmp_path, None, tmp_path, stack)
        weights = Weights(side, dict.fromkeys(side.names, "F32"), lambda nbytes: None)
        run_transformers(side, weights, [ids], [torch.arange(ids.numel())], torch.float32, found.__setitem__)
    for unit, states in enumerate(expected.hidden_states[:NUM_LAYERS]):  # the last has been normed
        torch.testing.assert_close(found[unit], states.flatten(0, 1))
    torch.testing.assert_close(found[NUM_LAYERS + 1], expected.hidden_states[-1].flatten(0, 1))
    torch.testing.assert_close(found[NUM_LAYERS + 2], expected.logits.flatten(0, 1))


def test_one_changed_weight_is_named(model: Path) -> None:
    """A single value of one tensor: that layer, that tensor, that one value."""

    def damage(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 2.0

    report = compare(model, imported(changed(model, damage)))
    assert not report.is_equal and report.first_differing_unit == 2
    assert "layer 2 of 3 (model.layers.1)" in report.reasons[0]
    assert "its tensors model.layers.1.mlp.down_proj.weight differs" in report.reasons[0]
    (difference,) = report.tensors.differences
    assert (difference.num_differing, round(difference.max_abs, 5)) == (1, 2.0)


def test_values_are_compared_in_every_block(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However tensors fall into blocks, the first, the last and all other rows are compared, of either side's dtype."""
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 4 * 32 * 7)
    rounded = imported(model, dtype="BF16")
    assert compare(model, rounded, tensors_only=True).is_equal

    def damage(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][[0, 100, -1], [0, 5, -1]] += 1.0

    report = compare(changed(model, damage), rounded, tensors_only=True)
    assert [each.num_differing for each in report.tensors.differences] == [3]


def test_a_change_too_small_for_the_states_is_found(model: Path) -> None:
    """A weight's last bit moves no state beyond the tolerance; the tensor is named all the same."""

    def damage(tensors: Tensors) -> None:
        tensors["model.layers.2.self_attn.q_proj.weight"].view(torch.int32)[0, 0] ^= 1

    report = compare(model, changed(model, damage))
    assert report.first_differing_unit is None and not report.is_equal
    assert report.reasons[0].startswith("model.layers.2.self_attn.q_proj.weight differs in 1 of ")


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}, "rotary_base"),
        ("rms_norm_eps", 1e-2, "norm_epsilon"),
    ],
)
def test_wrong_settings_with_right_weights_are_found(model: Path, key: str, value: Any, field: str) -> None:
    """In the config beside a Megatron checkpoint only: all tensors are bitwise equal, the first layer is not, and the field is
    named; so is the checkpoint's own setting, which contradicts."""
    megatron = imported(model)
    rewrite_config(megatron / "hf", **{key: value})
    report = compare(model, megatron)
    assert report.tensors.num_bitwise == report.tensors.num_tensors and not report.tensors.differences
    assert report.first_differing_unit == 1
    assert f"no tensor up to it differs; the settings do ({field})" in report.reasons[0]
    assert [each.name for each in report.settings] == [field]
    assert len(report.problems) == 1 and field in report.problems[0]


def test_what_changes_no_result_is_no_difference(model: Path) -> None:
    """A longer context is told, and counts for nothing."""
    report = compare(model, changed(model, max_position_embeddings=1024))
    assert report.is_equal and [each.name for each in report.architecture] == ["max_position_embeddings"]


def test_swapped_norms_are_named(model: Path) -> None:
    """q's norm for k's in one layer, which a round trip would not notice."""

    def damage(tensors: Tensors) -> None:
        q, k = (f"model.layers.2.self_attn.{each}_norm.weight" for each in "qk")
        tensors[q], tensors[k] = tensors[k], tensors[q]

    report = compare(model, imported(changed(model, damage)))
    assert report.first_differing_unit == 3
    assert "q_norm.weight, model.layers.2.self_attn.k_norm.weight differ" in report.reasons[0]


def test_permuted_heads_are_named(model: Path) -> None:
    """The query heads of one layer in another order."""

    def damage(tensors: Tensors) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].unflatten(0, (4, -1)).flip(0).flatten(0, 1).contiguous()

    report = compare(imported(model), changed(model, damage))
    assert report.first_differing_unit == 1 and "model.layers.0.self_attn.q_proj.weight" in report.reasons[0]


def test_a_tensor_is_blamed_for_later_layers(model: Path) -> None:
    """If the states after a damaged layer are within the tolerance, and those of a later one are not, its tensor is named."""

    def damage(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"] *= 1.3

    report = compare(model, changed(model, damage))
    report.tolerance = report.states[1].relative
    report.states[2] = replace(report.states[2], relative=2 * report.tolerance)
    assert report.differing_tensors and "layer 2 of 3" in report.reasons[0]
    assert "no tensor of it differs, but before it model.layers.0.mlp.down_proj.weight does" in report.reasons[0]


def test_missing_and_extra_tensors_are_listed(model: Path) -> None:
    """Nothing is computed with half a model, and each name says whose it is."""

    def damage(tensors: Tensors) -> None:
        del tensors["model.layers.1.self_attn.k_norm.weight"]
        tensors["model.layers.1.self_attn.k_norm.bias"] = torch.zeros(8)
        tensors["model.norm.weight"] = torch.zeros(7)

    report = compare(model, changed(model, damage))
    assert {each.name: each.what for each in report.tensors.differences} == {
        "model.layers.1.self_attn.k_norm.weight": "only in A",
        "model.layers.1.self_attn.k_norm.bias": "only in B",
        "model.norm.weight": "shape",
    }
    assert report.logits is None and report.not_computed and not report.is_equal


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_explains_another_dtype(dtype: str, model: Path) -> None:
    """A conversion with --dtype is equal once both are rounded; a value that rounding does not explain is found."""
    rounded = imported(model, dtype=dtype)
    report = compare(model, rounded)
    assert report.is_equal and report.tensors.num_rounded == report.tensors.num_tensors
    assert max(state.relative for state in report.states) < 1e-5  # of models with the same, rounded, weights

    def damage(tensors: Tensors) -> None:
        tensors["model.norm.weight"][0] *= 1.01

    report = compare(changed(model, damage), rounded, tensors_only=True)
    assert [each.name for each in report.tensors.differences] == ["model.norm.weight"]


def test_bf16_judges_by_the_next_token(model: Path) -> None:
    """Computed in bf16, a conversion is equal and a wrong rope base is not."""
    megatron = imported(model)
    assert compare(model, megatron, compute_dtype="bf16").is_equal
    rewrite_config(megatron / "hf", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    report = compare(model, megatron, compute_dtype="bf16")
    assert report.meaning_differs and "rotary_base" in report.reasons[0]


def test_bf16_forgives_tokens_that_go_to_another_expert(tmp_path: Path) -> None:
    """Rounding sends some tokens elsewhere, whose states are far off; the distributions still agree. A KL beyond the limit, or
    another top token, is a difference by itself."""
    tiny_hf_model("mixtral", tmp_path / "hf", num_layers=4, std=0.1)
    report = compare(tmp_path / "hf", imported(tmp_path / "hf"), compute_dtype="bf16")
    assert report.is_equal and report.first_differing_unit is not None
    for logits in (LogitsDifference(100, 100, kl=0.05), LogitsDifference(100, 80, kl=0.0)):
        report.logits = logits
        assert report.meaning_differs and not report.is_equal


def test_a_tolerance_allows_small_differences(model: Path) -> None:
    """With --tolerance, weights and states may differ by that much, relative to their size."""

    def damage(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor *= 1 + 1e-5

    other = changed(model, damage)
    assert not compare(model, other).is_equal
    assert compare(model, other, tolerance=1e-2).is_equal


def test_gguf_is_a_side(tmp_path: Path) -> None:
    """A GGUF file, its heads permuted and its config inside, against the model it was made of; quantised, it differs."""
    for kind, is_equal in (("F32", True), ("Q8_0", False)):
        hf, gguf = tmp_path / kind, tmp_path / f"{kind}.gguf"
        model = tiny_gguf_model("llama")
        model.save_pretrained(hf)
        tiny_tokenizer(hf)
        write_gguf(gguf, "llama", model, GGMLQuantizationType[kind])
        report = compare(hf, gguf)
        assert not report.settings and report.tensors.is_complete
        assert bool(report.differing_tensors or report.meaning_differs) != is_equal, report.reasons


def test_other_tokenizers_are_a_difference(model: Path) -> None:
    """One token more; or as many, with the ids of two letters changed over, which only a text tells."""
    longer = changed(model)
    tiny_tokenizer(longer, extra_tokens=("Hello",))
    report = compare(model, longer, tensors_only=True)
    assert not report.is_equal and report.tokenizer_differences == ["260 tokens in A's, 261 in B's"]
    tiny_tokenizer(longer)
    path = longer / "tokenizer.json"
    entries = json.loads(path.read_text())
    vocabulary = entries["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    path.write_text(json.dumps(entries))
    report = compare(model, longer, tensors_only=True)
    assert not report.is_equal and report.tokenizer_differences[0].startswith("'Hello world' is cut into")


def test_a_run_s_checkpoint_takes_the_other_side_s_config(model: Path) -> None:
    """A Megatron checkpoint without a config of its own is read with --like, or with the other side's."""
    megatron = imported(model)
    bare = megatron / "release"
    (megatron / "hf").rename(megatron.with_name("elsewhere"))
    assert compare(model, bare, tensors_only=True).is_equal
    assert compare(bare, bare, like=model, tensors_only=True).is_equal
    with pytest.raises(CheckpointError, match="--like"):
        compare(bare, bare, tensors_only=True)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "checkpoints_conversion", *words], capture_output=True, text=True, timeout=300
    )


def test_exit_codes(model: Path, tmp_path: Path) -> None:
    """0, 1, and 2 with one line; figures as json."""
    other = changed(model, rms_norm_eps=1e-2)
    good = command("verify", str(model), str(model), "--tokens", "8", "--json", str(tmp_path / "out.json"))
    assert good.returncode == 0 and "EQUAL" in good.stdout, good.stderr
    assert json.loads((tmp_path / "out.json").read_text())["equal"] is True
    bad = command("verify", str(model), str(other), "--tokens", "8")
    assert bad.returncode == 1 and "norm_epsilon" in bad.stdout and "layer 1 of 3" in bad.stdout
    for words in ((str(model), str(tmp_path / "none")), (str(model), str(model), "--compute-dtype", "fp8")):
        wrong = command("verify", *words)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("error: ")


def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """38 more layers of 7 MB, on either side, cost less than six of them."""
    peaks = {}
    for num_layers in (2, 40):
        hf = tmp_path / str(num_layers)
        tiny_hf_model("llama", hf, num_layers=num_layers, hidden_size=256, ffn=2048, std=0.02)
        result = command("verify", str(hf), str(imported(hf)), "--tokens", "16")
        assert result.returncode == 0, result.stdout + result.stderr
        peaks[num_layers] = float(result.stdout.strip().splitlines()[-1].split()[-2])
    assert peaks[40] - peaks[2] < 6 * 7, peaks
