"""`oprd rollout` writes what training sees in its first steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oprd_megatron.config import parse_config
from oprd_megatron.rollout.record import record_rollouts
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
