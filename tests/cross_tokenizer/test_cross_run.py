"""Whole runs of models whose tokenizers differ: what they compute, what they show, and what is refused before they start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Regex, normalizers
from torch.nn.functional import cosine_similarity

from oprd_megatron.bridge.artefact import read_info
from oprd_megatron.bridge.stage1 import fit
from oprd_megatron.config import dump_config, parse_config
from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import DataError, UserError
from oprd_megatron.evaluation.comparison import before_after_table, eval_table
from oprd_megatron.evaluation.held_out import HeldOut, evaluate
from oprd_megatron.evaluation.report import write_report
from oprd_megatron.placing import build_models
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from oprd_megatron.rollout import Rollout
from oprd_megatron.trainer import Trainer
from tests.cross_tokenizer.cross_runs import (
    Pair,
    chosen,
    cross_run,
    give_tokenizer,
    load_models,
    load_tokenizers,
    plain_loss,
    tokenizer_of,
)
from tests.cross_tokenizer.slow_reference import reference, student_bytes, text_of
from tests.ranks import run_ranks
from tests.tiny_models import tiny_tokenizer
from tests.training.runs import changed, num_ranks, student_tensors, train_records, train_run, with_layout

Values = dict[str, Any]
KINDS = {"teacher": "gemma_like", "student": "byte_level"}
UNEQUAL = {"teacher": {"tp": 2}, "student": {"pp": 2}}


def words(values: Values, prompt: str, side: int) -> tuple[int, ...]:
    """The prompt as the teacher's (0) or the student's (1) own chat template and tokenizer have it."""
    tokenizer = load_tokenizers(values)[side]
    messages = [{"role": "user", "content": prompt}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def both_texts(
    values: Values, prompt: str, response: Sequence[int], writer: int, anchor: str
) -> tuple[tuple[int, ...], tuple[int, ...], list[Pair]]:
    """(the teacher's ids, the student's ids, all aligned pairs) of a response that model `writer` wrote, found the slow way."""
    kinds, tokenizers = [KINDS["teacher"], KINDS["student"]], load_tokenizers(values)
    mine, other = tokenizers[writer], tokenizers[1 - writer]
    ended = response[-1] == mine.eos_token_id
    body = [
        token if token < len(mine) else mine.eos_token_id for token in response
    ]  # ids without a token have no text either
    body = body[:-1] if ended else body
    text = text_of(b"".join(student_bytes(kinds[writer], mine, token) for token in body))
    read = other(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ends, starts = reference(kinds[writer], mine, kinds[1 - writer], other, body, read, ended)
    responses = [tuple(response), (*read, *[other.eos_token_id] * ended)]
    pairs = ends if anchor == "token" else [(i - 1, j - 1) for i, j in starts]
    if writer == 1:
        responses.reverse()
        pairs = [(j, i) for i, j in pairs]
    prompts = [words(values, prompt, side) for side in (0, 1)]
    placed = [(len(prompts[0]) + i, len(prompts[1]) + j) for i, j in pairs]
    return (*prompts[0], *responses[0]), (*prompts[1], *responses[1]), placed


def one_step(values: Values) -> dict[str, Any]:
    """The first step's rollouts and record, the teacher's answers, and the evaluation of the student as it was."""
    config, platform = parse_config(values, "test"), select_platform("cpu")
    checked = preflight(config, dist.get_world_size())
    teacher, student = build_models(checked, platform)
    held_out, trainer = HeldOut(checked, teacher, student, platform), Trainer(checked, teacher, student, platform)
    trainer.sync(0)
    return {
        "evaluation": evaluate(held_out.alignment, held_out.outputs, held_out.answers, 0),
        "answers": held_out.answers,
        "rollouts": trainer.text.rollouts(0),
        "record": trainer.step(0),
    }


@pytest.mark.parametrize("anchor", ["token", "predictor"])
def test_a_step_equals_the_plain_reference(tmp_path: Path, anchor: str) -> None:
    """From prompts to loss and held-out figures: each model fed its own template's prompt and its own tokens of the response,
    states compared after the same bytes. To 1e-6 and 1e-5, in one process and with the models in different layouts."""
    distill = {"positions": "last_k", "k": 6, "position_anchor": anchor, "layer_map": {1: 2, 3: 3, 4: 5}}
    values = cross_run(tmp_path, KINDS["teacher"], KINDS["student"], **distill)
    prompts = {name: [json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
               for name in ("train", "held_out")}  # fmt: skip
    teacher, student = load_models(values)
    config = DistillConfig(**values["distill"])
    layouts = [values, with_layout(values, **UNEQUAL)] if anchor == "token" else [with_layout(values, **UNEQUAL)]
    for number, run in enumerate(layouts):
        ranks = run_ranks(num_ranks(run), one_step, changed(run, run={"dir": str(tmp_path / f"run_{number}")}))
        rollouts: list[Rollout] = ranks[0]["rollouts"]
        texts = [both_texts(values, prompts["train"][r.prompt_index], r.response_ids, 1, anchor) for r in rollouts]
        assert [text[1] for text in texts] == [r.prompt_ids + r.response_ids for r in rollouts]
        aligned = sum(len(pairs) for _, _, pairs in texts)
        texts = [(theirs, mine, chosen(pairs, config)) for theirs, mine, pairs in texts]
        expected = plain_loss(teacher, student, texts, config).item()
        answers = ranks[0]["answers"]
        asked = zip(answers, prompts["held_out"], strict=True)
        written = [sample.teacher.ids[len(words(values, prompt, 0)) :] for sample, prompt in asked]
        held_out = [both_texts(values, *pair, 0, anchor) for pair in zip(prompts["held_out"], written, strict=True)]
        assert [(sample.teacher.ids, sample.ids) for sample in answers] == [text[:2] for text in held_out]
        figures = held_out_figures(values, held_out, config)
        for rank in ranks:
            record, evaluation = rank["record"], rank["evaluation"]
            assert record["loss"] == pytest.approx(expected, rel=1e-6)
            assert record["supervised_tokens"] == sum(len(pairs) for _, _, pairs in texts)
            assert record["aligned_fraction"] == pytest.approx(aligned / sum(len(r.response_ids) for r in rollouts))
            assert all(evaluation[name] is None for name in ("kl", "teacher_entropy", "top_overlap"))
            assert evaluation["tokens"] == figures["tokens"]
            assert evaluation["student_entropy"] == pytest.approx(figures["student_entropy"], rel=1e-5)
            assert evaluation["cross_entropy"] == pytest.approx(figures["cross_entropy"], rel=1e-5)
            assert evaluation["layers"]["cosine"] == pytest.approx(figures["cosine"], rel=1e-5, abs=1e-7)


def partly_aligned(values: Values) -> list[Any]:
    """The evaluation of the teacher's answers two at a time, of the first two alone, and with the others' pairs taken away; and
    what is said where no pair is left."""
    config, platform = parse_config(values, "test"), select_platform("cpu")
    checked = preflight(config, dist.get_world_size())
    teacher, student = build_models(checked, platform)
    held_out = HeldOut(checked, teacher, student, platform)
    bare = [replace(answer, kept=()) for answer in held_out.answers]
    found: list[Any] = [
        evaluate(held_out.alignment, held_out.outputs, answers, 0)
        for answers in (held_out.answers[:2], held_out.answers[:2] + bare[2:])
    ]
    with pytest.raises(DataError) as caught:
        evaluate(held_out.alignment, held_out.outputs, bare, 0)
    return [*found, str(caught.value)]


def test_answers_without_a_pair_do_not_stop_the_evaluation(tmp_path: Path) -> None:
    """Where none of the answers scored together has an aligned token they are left out; if none has one at all, it is said."""
    values = changed(cross_run(tmp_path), eval={"micro_batch_size": 2})
    (first, all_answers, message), *_ = run_ranks(1, partly_aligned, values)
    assert {**all_answers, "seconds": 0} == {**first, "seconds": 0}
    assert first["tokens"] > 0 and "no token of this batch is supervised" in message


@torch.no_grad()
def held_out_figures(
    values: Values, texts: Sequence[tuple[Sequence[int], Sequence[int], list[Pair]]], config: DistillConfig
) -> dict[str, Any]:
    """Cross-entropy and entropy over the student's response tokens and the cosine of each pair of layers, one answer at a
    time."""
    teacher, student = load_models(values)
    pairs = resolve_layer_pairs(config, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    prompts = [json.loads(line)["prompt"] for line in Path(values["eval"]["prompts"]["path"]).read_text().splitlines()]
    cross_entropy, entropy, tokens, cosines, count = 0.0, 0.0, 0, [0.0] * len(pairs), 0
    for prompt, (theirs, mine, aligned) in zip(prompts, texts, strict=True):
        outputs = [
            model(torch.tensor([ids]), output_hidden_states=True) for model, ids in ((teacher, theirs), (student, mine))
        ]
        start = len(words(values, prompt, 1))
        log_q = outputs[1].logits[0, start - 1 : -1].double().log_softmax(-1)
        cross_entropy -= log_q.gather(-1, torch.tensor(mine[start:])[:, None]).sum().item()
        entropy -= (log_q.exp() * log_q).sum().item()
        tokens += len(mine) - start
        supervised = chosen(aligned, config)
        count += len(supervised)
        for index, pair in enumerate(pairs):
            h_t = outputs[0].hidden_states[pair.teacher_layer][0, [t for t, _ in supervised]]
            h_s = outputs[1].hidden_states[pair.student_layer][0, [s for _, s in supervised]]
            cosines[index] += cosine_similarity(h_s, h_t, dim=-1).sum().item()
    return {
        "tokens": tokens,
        "cross_entropy": cross_entropy / tokens,
        "student_entropy": entropy / tokens,
        "cosine": [total / count for total in cosines],
    }


def test_a_run_trains_resumes_and_reports(tmp_path: Path) -> None:
    """Two steps in one process and two more in another are four steps on two ranks, to 1e-5; the held-out figures have no KL,
    and report, table and summary are made without one."""
    values = changed(cross_run(tmp_path, "llama_like", "bytes"), run={"steps": 4}, logging={"tensorboard": True})
    parts = changed(values, run={"dir": str(tmp_path / "parts")})
    train_run(changed(parts, run={"stop_at": 2}))
    run_dir = train_run(parts)
    whole = train_run(with_layout(changed(values, run={"dir": str(tmp_path / "whole")}), {"dp": 2}, {"tp": 2}))
    for name, tensor in student_tensors(whole).items():
        assert (tensor - student_tensors(run_dir)[name]).abs().max().item() <= 1e-5, name
    records = train_records(run_dir)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(0.3 < record["aligned_fraction"] <= 1 for record in records)
    evals = train_records(run_dir, "eval")
    assert [record["step"] for record in evals] == [0, 2, 4]
    assert all(record["kl"] is None and record["cross_entropy"] > 0 and -1 <= record["cosine"] <= 1 for record in evals)
    table = before_after_table(evals[0], evals[-1])
    assert re.search(r"^KL.* - +- +-$", table, re.M) and "nan" not in table and "None" not in table
    for text in (eval_table(evals[0]), write_report(run_dir).read_text()):
        assert "nan" not in text.lower() and "None" not in text and "KL(" not in text
    assert list((run_dir / "tensorboard").iterdir())


def fit_on_rank(values: Values, out: Path) -> None:
    fit(parse_config(values, "test"), out)


def refusal(values: Values) -> str:
    """The one line with which the run is refused before it starts."""
    with pytest.raises(UserError) as caught:
        preflight(parse_config(values, "test"), 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bridge_belongs_to_its_two_tokenizers(tmp_path: Path) -> None:
    """Fitted on aligned rows of models of unequal widths, and trained through; refused once the teacher's tokenizer changes."""
    values = cross_run(tmp_path, "qwen_like", "gemma_like", teacher_width=64)
    assert "differ in width" in refusal(values)
    out = tmp_path / "bridge.safetensors"
    settings = {"bridge": {"rank": 4, "prompts": 12, "max_rank": 8}}
    run_ranks(2, fit_on_rank, with_layout({**values, **settings, "eval": None}, {"tp": 2}, {"dp": 2}), out)
    info = read_info(out)
    assert info.rank == 4 and info.fingerprints.teacher_tokenizer != info.fingerprints.student_tokenizer
    assert 0 < info.fit["rows"] < 8 * 3 * 12
    with_bridge = {**values, "distill": {**values["distill"], "bridge": str(out)}}
    run = changed(with_bridge, run={"steps": 1})
    record = train_records(train_run(run))[0]
    assert record["cosine"] > 0.2 and record["aligned_fraction"] > 0.3
    theirs = tokenizer_of("qwen_like")
    theirs.add_tokens(["zzz"])
    give_tokenizer(Path(values["teacher"]["path"]), theirs)
    again = changed(with_bridge, run={"dir": str(tmp_path / "again")})
    assert "was fitted with another teacher tokenizer; fit it again" in refusal(again)


def test_two_tokenizers_have_to_be_asked_for(tmp_path: Path) -> None:
    """Without `cross_tokenizer` they are refused, and the line names the option; with it, and equal ones, all is aligned."""
    values = cross_run(tmp_path)
    assert "distill.cross_tokenizer: true" in refusal({**values, "distill": {}})
    give_tokenizer(tmp_path / "teacher", tiny_tokenizer())
    checked = preflight(parse_config({**values, "distill": {"cross_tokenizer": True, "min_aligned": 1.0}}, "test"), 1)
    assert checked.two_tokenizers
    assert all(prompt.teacher_ids == prompt.token_ids for prompt in checked.prompts)


def test_a_floor_that_the_prompts_miss_is_refused(tmp_path: Path) -> None:
    """`min_aligned` is compared with the prompts' texts before anything is loaded; a floor that they meet is not refused."""
    values = cross_run(tmp_path)
    message = refusal({**values, "distill": {"cross_tokenizer": True, "min_aligned": 0.95}})
    share = float(re.search(r"only ([\d.]+) of the student's tokens end where one of the teacher's does", message)[1])
    assert 0.1 < share < 0.95
    for floor in (round(share - 0.01, 3), 0.0):
        preflight(parse_config({**values, "distill": {"cross_tokenizer": True, "min_aligned": floor}}, "test"), 1)


def test_tokenizers_without_a_shared_boundary_end_the_command_with_code_2(tmp_path: Path) -> None:
    """One line on stderr, exit code 2, and no run directory."""
    values = cross_run(tmp_path)
    collapsing = tiny_tokenizer()
    collapsing.backend_tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    give_tokenizer(tmp_path / "teacher", collapsing)
    prompts = [json.dumps({"prompt": f"say  {number}"}) for number in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(prompts))
    (tmp_path / "run.yaml").write_text(dump_config(parse_config(values, "test")))
    done = subprocess.run(
        [sys.executable, "-m", "oprd_megatron.train", str(tmp_path / "run.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "error: the student's and the teacher's tokenizers share no boundary inside any of 9 texts" in done.stderr
    assert not (tmp_path / "run").exists()
