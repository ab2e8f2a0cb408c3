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

from checkpoints_conversion import FAMILIES, read_architecture
from checkpoints_conversion.hf_to_megatron import import_hf
from checkpoints_conversion.options import Options
from checkpoints_conversion.progress import Progress
from checkpoints_conversion.verify import Report, VerifyOptions, report_text, verify
from checkpoints_conversion.verify.prompts import make_prompts, read_texts
from checkpoints_conversion.verify.sides import open_side
from checkpoints_conversion.verify.states import StateFile, compare_logits, compare_states
from checkpoints_conversion.verify.streaming import Weights
from checkpoints_conversion.verify.transformers_side import run_transformers
from oprd_megatron.errors import CheckpointError, DataError
from tests.tiny_models import ORIGINAL_LENGTH, WINDOW, tiny_hf_model, tiny_tokenizer

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
def test_streamed_states_are_those_of_the_loaded_model(family: Any, tmp_path: Path) -> None:
    """Lending a layer its weights changes nothing: transformers' own `from_pretrained` gives these very states and logits."""
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
    """A tokenizer with one token more."""
    other = changed(model)
    tiny_tokenizer(other, extra_tokens=("Hello",))
    report = compare(model, other)
    assert not report.is_equal and report.tokenizer_differences and report.tensors.is_complete


def test_a_run_s_checkpoint_takes_the_other_side_s_config(model: Path) -> None:
    """A Megatron checkpoint without a config of its own is read with --like, or with the other side's."""
    megatron = imported(model)
    bare = megatron / "release"
    (megatron / "hf").rename(megatron.with_name("elsewhere"))
    assert compare(model, bare, tensors_only=True).is_equal
    assert compare(bare, bare, like=model, tensors_only=True).is_equal
    with pytest.raises(CheckpointError, match="--like"):
        compare(bare, bare, tensors_only=True)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_limits_of_length_are_passed(family: Any, tmp_path: Path) -> None:
    """Some prompt is longer than a short window and than longrope's original length, and one is not; long ones are told."""
    tiny_hf_model(family, tmp_path)
    arch = read_architecture(tmp_path)
    limit = WINDOW if family == "mistral" else ORIGINAL_LENGTH
    for num_tokens in (4, limit, limit + 1, 100):
        lengths = {ids.size(1) for ids in make_prompts(arch, None, num_tokens, None).batches}
        assert max(lengths) > limit and (family == "mistral" or min(lengths) <= limit)
    if family == "mistral":
        far = replace(arch, attention_windows=(4096,) * arch.num_layers)
        assert "the window of 4096 is not passed" in make_prompts(far, None, 8, None).description


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "no text"),
        ("p.jsonl", '{"prompt": "a"}\n{"other": "b"}\n', "line 2"),
        ("p.jsonl", "[1]\n", "line 1"),
        ("p.jsonl", "not json\n", "line 1"),
        ("p.txt", "x\n" * 65, "65 prompts"),
    ],
)
def test_bad_prompts_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    """One line that names file and line."""
    tiny_hf_model("llama", tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        make_prompts(read_architecture(tmp_path), tiny_tokenizer(), 8, tmp_path / name)


def test_prompts_are_read(tmp_path: Path) -> None:
    """Lines of text, or of json."""
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    assert list(read_texts(tmp_path / "p.txt")) == list(read_texts(tmp_path / "p.jsonl")) == ["one", "two"]


def test_no_number_is_never_equal() -> None:
    """A state or logit that is not finite on one side is an infinite difference; each token is measured by itself."""
    a = torch.ones(40, 8)
    a[0] *= 1000  # an attention sink
    b = a.clone()
    b[7, 0] += 0.5
    found = compare_states(a, b)
    assert (found.max_abs, round(found.relative, 4)) == (0.5, round(0.5 / 8**0.5, 4)) and 0.9 < found.cosine < 1
    b[33, 0] = torch.nan
    assert compare_states(a, b).relative == float("inf") and compare_logits(a, b).max_kl == float("inf")
    assert compare_states(a, a).relative == 0 and compare_logits(a, a).kl == 0


def test_kept_states_come_back_in_order() -> None:
    """Whatever their shapes."""
    states = [torch.randn(size, 3) for size in (4, 1, 7)]
    with StateFile() as kept:
        for each in states:
            kept.append(each)
        kept.rewind()
        assert all(torch.equal(kept.next_like(each), each) for each in states)


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
