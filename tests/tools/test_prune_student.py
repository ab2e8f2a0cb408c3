"""tools/prune_student.py: the student is the teacher where that is possible, and close to it where it is not."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from checkpoints_conversion import check_model
from tests.tiny_models import Family, tiny_hf_model
from tools.prune_student import Batch, Ridge, build_student, main, make_batch, student_shape, survey, teacher_text

FULL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
SMALLER = ["--width", "16", "--layers", "3"]
IDS = torch.tensor([[5, 70, 80, 9, 200, 31, 7, 7, 150, 90], [4, 4, 120, 60, 33, 259, 0, 18, 77, 45]])


def load(hf_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).requires_grad_(False)


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def divergence(teacher: PreTrainedModel, student: PreTrainedModel, text: list[Batch], part: str) -> float:
    """KL(teacher || student), nats a token, of the `part` "real" (all tokens) or "answer"."""
    expected, got = (
        torch.cat([logits(model, batch.ids)[getattr(batch, part)] for batch in text]).log_softmax(-1)
        for model in (teacher, student)
    )
    return kl_div(got, expected, log_target=True, reduction="batchmean").item()


def prompt_file(folder: Path, count: int = 24) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{'word ' * (i % 7)}number {i}?"}) + "\n" for i in range(count)))
    return path


def random_text(count: int = 24, length: int = 24, seed: int = 0) -> list[Batch]:
    """Texts of random tokens, 8 a batch."""
    rows = torch.randint(0, 288, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [make_batch([(row[:8], row[8:]) for row in rows[first : first + 8]]) for first in range(0, count, 8)]


def command(folder: Path, *extra: str) -> list[str]:
    """A command line for the teacher `folder`/teacher and its prompts; later flags win."""
    prompts = ["--calibration", str(folder / "prompts.jsonl"), "--answer-tokens", "12"]
    return [str(folder / "teacher"), str(folder / "student"), *SMALLER, *prompts, *extra]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_hf_model("llama", tmp_path / "teacher")
    prompt_file(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False), ("mistral", True)]
)
def test_a_student_of_full_size_is_the_teacher_rotated(tmp_path: Path, family: Family, tied: bool) -> None:
    """With nothing pruned, logits of text outside the calibration are equal to 1e-4 (fp32 sums in another order), though
    every matrix differs."""
    tiny_hf_model(family, tmp_path, tied=tied)
    teacher = load(tmp_path)
    student, kept, answers = build_student(teacher, check_model(tmp_path), FULL, random_text())
    assert kept == [1, 2, 3, 4]
    assert not torch.allclose(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight, atol=0.1)
    assert torch.allclose(logits(student), logits(teacher), rtol=0, atol=1e-4)
    assert not student.config.tie_word_embeddings
    text = random_text()
    with torch.no_grad():
        expected = teacher.lm_head(answers[1])
    assert torch.allclose(expected, logits(teacher, text[1].ids)[text[1].answer], rtol=0, atol=1e-4)


def confine(teacher: PreTrainedModel, basis: Tensor) -> None:
    """Project everything that writes the stream to the columns of `basis`, and make every head group after the first and
    every MLP channel after the sixteenth write nothing."""
    projector = basis @ basis.T
    with torch.no_grad():
        embedding = teacher.model.embed_tokens.weight
        embedding.copy_(embedding @ projector)
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight[:, 16:] = 0
            layer.mlp.down_proj.weight[:, 16:] = 0
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(projector @ linear.weight)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_the_teacher_does_not_use_is_what_goes(tmp_path: Path, family: Family) -> None:
    """A teacher whose stream lives in 12 of 32 dimensions, whose second layer does nothing, and half of whose heads and
    three quarters of whose channels write nothing: a student of that size is exact, on other text too."""
    tiny_hf_model(family, tmp_path, tied=False)
    teacher = load(tmp_path)
    confine(teacher, torch.linalg.qr(torch.randn(32, 12, generator=torch.Generator().manual_seed(3))).Q)
    for linear in (teacher.model.layers[1].self_attn.o_proj, teacher.model.layers[1].mlp.down_proj):
        linear.weight.zero_()
    shape = dict(zip(FULL, (12, 3, 2, 1, 16), strict=True))
    student, kept, _ = build_student(teacher, check_model(tmp_path), shape, random_text())
    assert kept == [1, 3, 4]
    assert torch.allclose(logits(student), logits(teacher), rtol=0, atol=1e-3)


def test_kept_parts_need_not_come_first(tmp_path: Path) -> None:
    """The second KV group and the last channels are found where only they write."""
    tiny_hf_model("llama", tmp_path)
    teacher = load(tmp_path)
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight[:, :16] = 0
        layer.mlp.down_proj.weight[:, :40] = 0
    shape = FULL | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    student, _, _ = build_student(teacher, check_model(tmp_path), shape, random_text())
    assert torch.allclose(logits(student), logits(teacher), rtol=0, atol=2e-4)


def test_the_survey_measures_the_teacher(tmp_path: Path) -> None:
    """Influence is the mean turn of a layer's input by transformers' hidden states, padding left out."""
    tiny_hf_model("llama", tmp_path)
    teacher = load(tmp_path)
    text = [make_batch([([5, 6, 7], [8, 9]), ([10, 11], [12, 13, 14, 15, 16, 17])])]
    influence, moments = survey(teacher, text)
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for layer in teacher.model.layers
    ]
    teacher(text[0].ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    turn = 1 - torch.cosine_similarity(states[1], states[2], dim=-1)
    assert influence[1].item() == pytest.approx((turn[0, :5].sum() + turn[1].sum()).item(), rel=1e-5)
    assert moments[2].trace().item() == pytest.approx(13 * 32, rel=1e-3)


def test_answers_are_found_in_padded_batches() -> None:
    """`answer` marks the positions that predict the answer's tokens, `real` all tokens."""
    batch = make_batch([([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14, 15])])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 0], [10, 11, 12, 13, 14, 15]]
    assert batch.real.sum(1).tolist() == [5, 6]
    assert batch.answer.nonzero().tolist() == [[0, 2], [0, 3], *[[1, place] for place in range(5)]]


def test_a_ridge_regression_starts_from_its_prior() -> None:
    """Its gradient is zero: X^T (X W^T - Y) + damping (W - prior)^T; without errors it is the prior bit for bit."""
    generator = torch.Generator().manual_seed(0)
    inputs, prior, noise = (torch.randn(shape, generator=generator) for shape in [(50, 6), (4, 6), (50, 4)])
    fit = Ridge(prior)
    fit.add(inputs[:20], inputs[:20] @ prior.T + noise[:20])
    fit.add(inputs[20:], inputs[20:] @ prior.T + noise[20:])
    weights = fit.solve()
    damping = 0.1 * inputs.square().sum() / 6
    gradient = (inputs @ (weights - prior).T - noise).T @ inputs + damping * (weights - prior)
    assert gradient.abs().max() < 1e-3 and (weights - prior).abs().max() > 0.01
    exact = Ridge(prior)
    exact.add(inputs, inputs @ prior.T)
    assert torch.equal(exact.solve(), prior)


def test_the_command_writes_a_model_that_all_can_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shape, config, tokenizer and origin agree; transformers and the importer load it; nothing staged is left."""
    assert main(command(folder)) == 0
    out = folder / "student"
    arch = check_model(out)
    assert (arch.hidden_size, arch.num_layers, arch.ffn_hidden_size, arch.head_dim) == (16, 3, 32, 8)
    assert (arch.num_attention_heads, arch.num_query_groups, arch.tie_word_embeddings) == (2, 1, False)
    student = load(out)
    assert logits(student).shape == (2, 10, 288)
    assert student.model.layers[2].self_attn.q_proj.weight.shape == (16, 16)
    origin = json.loads((out / "layer_origin.json").read_text())
    assert origin["source"] == str(folder / "teacher") and list(origin["layers"]) == ["1", "2", "3"]
    assert origin["layers"]["1"] == 1 and origin["layers"]["3"] == 4
    assert len(AutoTokenizer.from_pretrained(out)) == 260
    assert (out / "generation_config.json").is_file() and not (folder / "student.tmp").exists()
    assert "hidden_size" in capsys.readouterr().out


def test_equal_arguments_give_equal_students(folder: Path) -> None:
    """Two runs agree bit for bit, healing included; another seed gives another text and so another student."""
    students: list[dict[str, Tensor]] = []
    for name, flags in [("a", "1 --heal-steps 3"), ("b", "1 --heal-steps 3"), ("c", "1"), ("d", "2")]:
        arguments = command(folder, "--seed", *flags.split())
        arguments[1] = str(folder / name)
        assert main(arguments) == 0
        students.append(load_file(folder / name / "model.safetensors"))
    first, second, *others = students
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(others[0]["lm_head.weight"], others[1]["lm_head.weight"])


def test_repair_and_healing_bring_the_student_closer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the text of the calibration, KL(teacher || student) falls from pruning to repair over all tokens, and from repair
    to healing over the answers."""
    teacher, options = load(folder / "teacher"), Namespace(source=folder / "teacher", answers=1, seed=1234)
    options.calibration, options.answer_tokens = folder / "prompts.jsonl", 12
    text, students = teacher_text(teacher, options), {}
    for name, flags, ridge in [("pruned", [], 1e9), ("repaired", [], 0.1), ("healed", ["--heal-steps", "40"], 0.1)]:
        monkeypatch.setattr("tools.prune_student.RIDGE", ridge)
        arguments = command(folder, *flags, "--lr", "5e-3")
        arguments[1] = str(folder / name)
        assert main(arguments) == 0
        students[name] = load(folder / name)
    pruned, repaired = (divergence(teacher, students[name], text, "real") for name in ("pruned", "repaired"))
    assert repaired < 0.7 * pruned
    repaired, healed = (divergence(teacher, students[name], text, "answer") for name in ("repaired", "healed"))
    assert healed < 0.7 * repaired


def test_per_layer_settings_follow_their_layer(tmp_path: Path) -> None:
    """Lists with one entry a layer keep those of the kept layers; max_window_layers counts kept bottom layers."""
    tiny_hf_model("qwen2", tmp_path, num_layers=5)
    teacher = load(tmp_path)
    teacher.config.max_window_layers = 4
    shape = FULL | {"num_hidden_layers": 3}
    student, kept, _ = build_student(teacher, check_model(tmp_path), shape, random_text(8))
    assert len(student.config.layer_types) == 3
    assert student.config.max_window_layers == sum(layer <= 4 for layer in kept) == 2


def test_parts_follow_the_width() -> None:
    """What is not asked for is in proportion, and heads come in whole groups: the shape of the README's student."""
    arch: Any = Namespace(family="llama", hidden_size=576, num_layers=30, heads_per_group=3, ffn_hidden_size=1536)
    arch.num_attention_heads, arch.num_query_groups = 9, 3
    options = Namespace(source="x", width=384, layers=20, heads=None, kv_heads=None, ffn=None)
    assert list(student_shape(arch, options).values()) == [384, 20, 6, 2, 1024]
    options.heads, options.ffn = 3, 700
    assert list(student_shape(arch, options).values()) == [384, 20, 3, 1, 700]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "33"], "--width 33: this teacher allows 1 to 32"),
        (["--width", "0"], "--width 0: this teacher allows 1 to 32"),
        (["--width", "32", "--layers", "4"], "--width 32 --layers 4: the teacher's own shape; lower one"),
        (["--layers", "5"], "--layers 5: this teacher allows 2 to 4"),
        (["--layers", "1"], "--layers 1: this teacher allows 2 to 4"),
        (["--heads", "3", "--kv-heads", "1"], "--heads 3: a KV head keeps its 2 query heads; 1 take 2"),
        (["--heads", "3"], "--heads 3: a KV head keeps its 2 query heads; 1 take 2"),
        (["--kv-heads", "3"], "--heads 6: this teacher allows 2 to 4"),
        (["--ffn", "65"], "--ffn 65: this teacher allows 1 to 64"),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    """Refused with code 2 before anything is written or sampled."""
    assert main(command(folder, *flags)) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (folder / "student").exists() and not (folder / "student.tmp").exists()


def test_bad_paths_and_families_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output that exists, no calibration file, no model, a family of another structure; nothing is overwritten."""

    def refused(arguments: list[str]) -> str:
        assert main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and not (folder / "student.tmp").exists()
        return lines[0]

    assert "nowhere.jsonl" in refused(command(folder, "--calibration", str(folder / "nowhere.jsonl")))
    tiny_hf_model("phi3", folder / "phi")
    assert "phi3 models are not supported, only llama" in refused([str(folder / "phi"), *command(folder)[1:]])
    assert "config.json" in refused([str(folder / "empty"), *command(folder)[1:]])
    (folder / "student").mkdir()
    (folder / "student" / "notes.txt").write_text("mine")
    assert "exists already; remove it" in refused(command(folder))
    assert (folder / "student" / "notes.txt").read_text() == "mine"
    with pytest.raises(SystemExit) as stopped:
        main(["a", "b", "--width", "x"])
    assert stopped.value.code == 2
