"""`oprd rollout` writes what training sees in its first steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oprd_megatron.config import parse_config
from oprd_megatron.errors import DataError
from oprd_megatron.rollout.file_engine import FileEngine, check_recorded
from oprd_megatron.rollout.on_policy import OnPolicy
from oprd_megatron.rollout.prompts import load_prompts
from oprd_megatron.rollout.record import record_rollouts
from oprd_megatron.rollout.recorded import open_recorded
from oprd_megatron.rollout.tokenizer import load_tokenizer
from tests.cross_tokenizer.cross_runs import cross_run, load_tokenizers
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed
from tests.training.test_steps import make_trainer

STEPS = 3
"""A run has 12 prompts, 4 a step: the first three steps see all that are not left out."""


def seen(values: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, response) of the first steps, as a trainer gets them. The student stays as it is."""
    trainer = make_trainer(values)
    return [(r.prompt_ids, r.response_ids) for step in range(STEPS) for r in trainer.text.rollouts(step)]


def written(values: dict[str, Any], out: Path) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    config = parse_config(values, "test")
    count = record_rollouts(config, config.student.path, out, STEPS)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == count
    return [(tuple(line["prompt_ids"]), tuple(line["response_ids"])) for line in lines]


@pytest.mark.parametrize("teacher", ["char_level", "few_ids"])
def test_what_is_written_is_what_training_sees(tmp_path: Path, teacher: str, values: dict[str, Any]) -> None:
    """With two tokenizers, prompts that only the teacher's makes too long are left out; with one, ids that the teacher does
    not have are not written."""
    if teacher == "few_ids":
        tiny_hf_model("llama", tmp_path / "teacher", num_layers=5, vocab_size=260, seed=1, std=0.1)
        tiny_hf_model("llama", tmp_path / "student", num_layers=4, vocab_size=2000, seed=2, std=0.1)
        values = changed(values, rollout={"max_response_tokens": 8})
        values["rollout"]["top_p"] = 1.0
    else:
        values = cross_run(tmp_path, teacher="bytes", student="gemma_like")
        limit = too_long_for_one(values)
        values["rollout"]["prompts"]["max_tokens"] = limit
    assert written(values, tmp_path / "rollouts.jsonl") == run_ranks(1, seen, values)[0]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_run_reads_what_it_would_have_written(tmp_path: Path, values: dict[str, Any], suffix: str) -> None:
    """Either format passes the check before the run and gives every step the rollouts of the embedded engine, log-probabilities
    included; its text is that of the ids. The file engine in the embedded one's place writes the same file again."""
    config, out = parse_config(values, "test"), tmp_path / f"rollouts{suffix}"
    assert record_rollouts(config, config.student.path, out, STEPS) == STEPS * 8
    tokenizer, rows = load_tokenizer(config.student.path), list(open_recorded(out).read(range(STEPS * 8)))
    prompts = load_prompts(config.rollout.prompts, tokenizer)
    check_recorded(config, out, 288, prompts)
    text = OnPolicy(config, prompts, FileEngine(out), 288)
    for step in range(STEPS):
        asked = text.source.batch(step, 4)
        for number, row in enumerate(rows[8 * step : 8 * step + 8]):
            assert (row.step, row.sample_index, row.weight_version) == (step, number, 0)
            assert (row.prompt, row.prompt_ids) == (asked[number // 2].text, asked[number // 2].token_ids)
            assert row.response == tokenizer.decode(list(row.response_ids), skip_special_tokens=True)
            assert row.logprobs is not None and len(row.logprobs) == len(row.response_ids)
    again = tmp_path / f"again{suffix}"
    record_rollouts(config, config.student.path, again, STEPS, FileEngine(out))
    assert again.read_bytes() == out.read_bytes()
    other = changed(values, run={"seed": 6})
    with pytest.raises(DataError, match=r"step 0, sample \d answers another prompt"):
        check_recorded(parse_config(other, "test"), out, 288, prompts)
    check_recorded(parse_config(other, "test"), out, 288)
    with pytest.raises(DataError, match=r"step 0, sample \d answers another prompt"):
        record_rollouts(parse_config(other, "test"), config.student.path, tmp_path / "no.jsonl", 1, FileEngine(out))


def test_both_formats_hold_the_same(tmp_path: Path, values: dict[str, Any]) -> None:
    """Row by row, to the last bit of a log-probability; a file that is there is not written over, and another ending is refused
    before the model is loaded."""
    config = parse_config(values, "test")
    files = [tmp_path / "rollouts.parquet", tmp_path / "rollouts.jsonl"]
    for out in files:
        record_rollouts(config, config.student.path, out, 1)
    one, other = (list(open_recorded(out).read(range(8))) for out in files)
    assert one == other
    assert one != [replace(row, logprobs=None) for row in one]
    with pytest.raises(DataError, match=r"rollouts\.jsonl: exists already"):
        record_rollouts(config, config.student.path, files[1], 1)
    with pytest.raises(DataError, match=r"\.parquet or \.jsonl"):
        record_rollouts(config, tmp_path / "no_model", tmp_path / "rollouts.csv", 1)
    assert not (tmp_path / "rollouts.csv").exists()


def too_long_for_one(values: dict[str, Any]) -> int:
    """A length that all prompts have in the student's tokens, but only some in the teacher's."""
    texts = [json.loads(line)["prompt"] for line in Path(values["rollout"]["prompts"]["path"]).read_text().splitlines()]
    lengths = [
        sorted(
            len(
                tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
                    "input_ids"
                ]
            )
            for text in texts
        )
        for tokenizer in load_tokenizers(values)
    ]
    limit = lengths[0][len(texts) // 2]
    assert lengths[1][-1] <= limit < lengths[0][-1]
    return limit
