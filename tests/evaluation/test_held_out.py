"""Held-out evaluation: KL, cross-entropy, entropies, overlap and cosine against plain Hugging Face arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

import oprd_megatron.evaluation.outputs
from oprd_megatron.config import parse_config
from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.evaluation.held_out import HeldOut, evaluate
from oprd_megatron.evaluation.outputs import TOP, OutputMeasures
from oprd_megatron.placing import build_models
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from oprd_megatron.representation.positions import supervised_positions
from oprd_megatron.rollout.build import build_hf_engine
from oprd_megatron.rollout.weight_sync import sync_weights
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, num_ranks, with_layout

LAYOUTS = {
    "single": {},
    "tp2": {"tp": 2},
    "tp2sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp2pp2": {"tp": 2, "pp": 2},
}
RELATIVE = 1e-5
"""fp32 sums in another order."""


def answers(vocab: int) -> list[Sample]:
    """Seven ragged answers, one of them empty: with micro-batches of 2 the last is filled up."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: tuple(torch.randint(0, vocab, (n,), generator=generator).tolist())  # noqa: E731
    return [Sample(draw(p), draw(r)) for p, r in [(5, 7), (3, 1), (8, 12), (2, 4), (6, 0), (7, 9), (1, 6)]]


def scored(values: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    oprd_megatron.evaluation.outputs.CHUNK_TOKENS = 5  # logits of a few tokens at a time
    config = parse_config(values, "test")
    platform = select_platform("cpu")
    teacher, student = build_models(preflight(config, dist.get_world_size()), platform)
    outputs = OutputMeasures(teacher, student, platform.device, comparable=True)
    alignment = Alignment(teacher, student, config.distill, platform, 2, signal=outputs.signal)
    return evaluate(alignment, outputs, samples, step=3)


def reference(values: dict[str, Any], samples: list[Sample], vocab: int) -> dict[str, Any]:
    """The same averages, answer by answer on transformers' models; probabilities are over the first `vocab` ids."""
    distill = DistillConfig(**values.get("distill", {}))
    models = [AutoModelForCausalLM.from_pretrained(values[name]["path"], dtype=torch.float32)
              for name in ("teacher", "student")]  # fmt: skip
    pairs = resolve_layer_pairs(distill, *(model.config.num_hidden_layers for model in reversed(models)))
    divergence = cross_entropy = 0.0
    entropies, overlap = [0.0, 0.0], 0.0
    tokens, cosines, supervised = 0, [0.0] * len(pairs), 0
    for sample in samples:
        prompt, response = len(sample.prompt_ids), len(sample.response_ids)
        if response == 0:
            continue
        with torch.no_grad():
            outputs = [model(torch.tensor([sample.ids]), output_hidden_states=True) for model in models]
        log_p, log_q = (output.logits[0, prompt - 1 : -1, :vocab].double().log_softmax(-1) for output in outputs)
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        cross_entropy -= log_q.gather(-1, torch.tensor(sample.response_ids)[:, None]).sum().item()
        entropies = [sum_ - (log.exp() * log).sum().item() for sum_, log in zip(entropies, (log_p, log_q), strict=True)]
        tops = [log.topk(TOP).indices.tolist() for log in (log_p, log_q)]
        overlap += sum(len(set(a) & set(b)) / TOP for a, b in zip(*tops, strict=True))
        tokens += response
        positions = list(supervised_positions(prompt, response, distill))
        supervised += len(positions)
        for index, pair in enumerate(pairs):
            h_t = outputs[0].hidden_states[pair.teacher_layer][0, positions]
            h_s = outputs[1].hidden_states[pair.student_layer][0, positions]
            cosines[index] += cosine_similarity(h_s, h_t, dim=-1).sum().item()
    return {
        "kl": divergence / tokens,
        "cross_entropy": cross_entropy / tokens,
        "teacher_entropy": entropies[0] / tokens,
        "student_entropy": entropies[1] / tokens,
        "top_overlap": overlap / tokens,
        "tokens": tokens,
        "cosine": [total / supervised for total in cosines],
        "pairs": [(pair.student_layer, pair.teacher_layer) for pair in pairs],
    }


def check(values: dict[str, Any], layout: dict[str, Any] | None, vocab: int) -> None:
    """`layout` for both models; None leaves those that `values` names."""
    samples = answers(vocab)
    expected = reference(values, samples, vocab)
    values = values if layout is None else with_layout(values, **layout)
    for record in run_ranks(num_ranks(values), scored, values, samples):
        assert (record["kind"], record["step"], record["tokens"]) == ("eval", 3, expected["tokens"])
        for name in ("kl", "cross_entropy", "student_entropy", "teacher_entropy", "top_overlap"):
            assert record[name] == pytest.approx(expected[name], rel=RELATIVE), name
        layers = record["layers"]
        assert list(zip(layers["student"], layers["teacher"], strict=True)) == expected["pairs"]
        assert layers["cosine"] == pytest.approx(expected["cosine"], rel=RELATIVE)
        assert record["cosine"] == pytest.approx(sum(expected["cosine"]) / len(expected["cosine"]), rel=RELATIVE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_equals_hugging_face(values: dict[str, Any], layout: str, tied: bool) -> None:
    """Seven answers (no multiple of the micro-batch), 300 ids (no multiple of the padding), in every layout."""
    for name, layers, seed in (("teacher", 5, 1), ("student", 4, 2)):
        tiny_hf_model("llama", values[name]["path"], num_layers=layers, seed=seed, std=0.1, vocab_size=300, tied=tied)
    check(values, LAYOUTS[layout], vocab=300)


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
@pytest.mark.parametrize(("teacher_vocab", "student_vocab"), [(300, 290), (290, 300), (600, 290)])
def test_vocabularies_of_different_size(
    values: dict[str, Any], layout: str, teacher_vocab: int, student_vocab: int
) -> None:
    """Both distributions are over the ids that both heads have, renormalised, whatever either head is padded to."""
    for name, layers, seed, vocab in (("teacher", 5, 1, teacher_vocab), ("student", 4, 2, student_vocab)):
        tiny_hf_model(
            "llama", values[name]["path"], num_layers=layers, seed=seed, std=0.1, vocab_size=vocab, tied=False
        )
    check(values, LAYOUTS[layout], vocab=290)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ({"tp": 2}, {"pp": 2}),
        ({"pp": 2}, {"tp": 2, "sp": True}),
        ({"dp": 2}, {"tp": 2}),
        ({"tp": 2, "sp": True}, {"dp": 2}),
        ({"tp": 2, "pp": 2}, {"dp": 2, "tp": 2}),
        ({"ranks": "0-0"}, {"tp": 2, "ranks": "1-2"}),
    ],
    ids=str,
)
def test_a_teacher_in_another_layout(values: dict[str, Any], teacher: dict[str, Any], student: dict[str, Any]) -> None:
    """The teacher's final states travel to the student's last stage and meet the teacher's head there."""
    for name, layers, seed in (("teacher", 5, 1), ("student", 4, 2)):
        tiny_hf_model("llama", values[name]["path"], num_layers=layers, seed=seed, std=0.1, vocab_size=300, tied=False)
    check(changed(with_layout(values, **student), teacher={"parallel": teacher}), None, vocab=300)


def test_cosine_at_the_runs_own_positions(values: dict[str, Any]) -> None:
    """The cosine follows distill.positions and the layer map; KL and cross-entropy cover every response token."""
    distill = {"positions": "last_k", "k": 2, "layer_map": {1: 5, 3: 2}, "position_anchor": "predictor"}
    check({**values, "distill": distill}, LAYOUTS["tp2"], vocab=288)


def sampled(values: dict[str, Any]) -> dict[str, Any]:
    """The teacher's answers, and the record with the student's, as a run makes them."""
    config = parse_config(values, "test")
    platform = select_platform("cpu")
    checked = preflight(config, dist.get_world_size())
    teacher, student = build_models(checked, platform)
    held_out = HeldOut(checked, teacher, student, platform)
    engine = build_hf_engine(config, config.student, student.grid.layout, platform)
    sync_weights(engine, student, version=0)
    record = held_out.record(0, engine, samples=True)
    return {"answers": held_out.answers, "record": record}


def test_the_teacher_answers_once_and_alike(values: dict[str, Any]) -> None:
    """The answers to all held-out prompts are the same in every layout, and the record scores exactly them."""
    values = changed(values, eval={"samples": 2})
    (single,) = run_ranks(1, sampled, values)
    assert len(single["answers"]) == 12
    assert [len(answer.response_ids) > 0 for answer in single["answers"]] == [True] * 12
    expected = reference(values, single["answers"], vocab=288)
    assert single["record"]["kl"] == pytest.approx(expected["kl"], rel=RELATIVE)
    assert [sample["prompt"] for sample in single["record"]["samples"]] == ["say 50", "say 51"]
    for layout in ({"tp": 2}, {"pp": 2}, {"dp": 2}):
        for rank in run_ranks(2, sampled, with_layout(values, **layout)):
            assert rank["answers"] == single["answers"], layout
            assert rank["record"]["samples"] == single["record"]["samples"], layout
            assert rank["record"]["kl"] == pytest.approx(single["record"]["kl"], rel=RELATIVE)
