"""Runs of models whose tokenizers differ, and what the states of such a run are compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from tests.cross_tokenizer.small_tokenizers import KINDS
from tests.tiny_models import CHAT_TEMPLATE, tiny_hf_model, tiny_tokenizer
from tests.training.runs import changed, tiny_run

BRACKETS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[model]\n{% endif %}"
)
"""A chat template unlike ChatML, and shorter."""
Pair = tuple[int, int]
"""Sequence indices of two states that are compared: the teacher's, the student's."""


def tokenizer_of(kind: str, template: str | None = BRACKETS) -> PreTrainedTokenizerFast:
    """One of the small tokenizers with a chat template, or "bytes": the tiny models' own, one token a byte, with ChatML."""
    if kind == "bytes":
        return tiny_tokenizer()
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = template
    return tokenizer


def give_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put a tokenizer into a model's directory; it ends a text as the tokenizer says."""
    tokenizer.save_pretrained(folder)
    for path in (folder / "config.json", folder / "generation_config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": tokenizer.eos_token_id}))


def cross_run(
    folder: Path, teacher: str = "gemma_like", student: str = "bytes", teacher_width: int = 32, **distill: Any
) -> dict[str, Any]:
    """`tiny_run` of two tokenizers; its prompts are words and some are longer than others."""
    values = tiny_run(folder)
    for name, kind, layers, seed, width in (("teacher", teacher, 5, 1, teacher_width), ("student", student, 4, 2, 32)):
        tokenizer = tokenizer_of(kind)
        tiny_hf_model(
            "llama",
            folder / name,
            num_layers=layers,
            seed=seed,
            std=0.1,
            vocab_size=len(tokenizer) + 3,
            hidden_size=width,
        )
        give_tokenizer(folder / name, tokenizer)
    for name, first in (("train", 0), ("held_out", 50)):
        lines = [
            json.dumps({"prompt": f"the cat {'sat there ' * (number % 4)}{number}"})
            for number in range(first, first + 12)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {**changed(values, rollout={"max_response_tokens": 12}), "distill": {"cross_tokenizer": True, **distill}}


def load_tokenizers(values: dict[str, Any]) -> list[PreTrainedTokenizerFast]:
    """The teacher's and the student's."""
    return [AutoTokenizer.from_pretrained(values[name]["path"]) for name in ("teacher", "student")]


def load_models(values: dict[str, Any]) -> list[torch.nn.Module]:
    """The teacher and the student, in transformers."""
    return [
        AutoModelForCausalLM.from_pretrained(values[name]["path"], dtype=torch.float32)
        for name in ("teacher", "student")
    ]


def plain_loss(
    teacher: Any,
    student: Any,
    texts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[Pair]]],
    distill: DistillConfig,
) -> torch.Tensor:
    """Eq. 6 with two tokenisations, written out: each model reads its own ids, states are compared pair by pair.

    Args:
        teacher, student: transformers' models of equal width.
        texts: (the teacher's ids, the student's ids, supervised pairs) of each rollout.
        distill: layer map, final state, normalisation.
    """
    pairs = resolve_layer_pairs(distill, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    before_norm: dict[int, torch.Tensor] = {}
    hooks = [
        model.model.norm.register_forward_pre_hook(
            lambda _, inputs, which=which: before_norm.update({which: inputs[0]})
        )
        for which, model in enumerate((teacher, student))
    ]
    total, count = torch.zeros(()), 0
    for teacher_ids, student_ids, supervised in texts:
        if not supervised:
            continue
        states = []
        for which, (model, ids) in enumerate(((teacher, teacher_ids), (student, student_ids))):
            output = list(model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states[1:])
            if distill.final_state == "pre_norm":
                output[-1] = before_norm[which]
            states.append(output)
        at_teacher, at_student = ([pair[side] for pair in supervised] for side in (0, 1))
        count += len(supervised)
        for pair in pairs:
            h_t = states[0][pair.teacher_layer - 1][0, at_teacher].detach()
            h_s = states[1][pair.student_layer - 1][0, at_student]
            if distill.normalization == "l2":
                h_t, h_s = (torch.nn.functional.normalize(h, dim=-1) for h in (h_t, h_s))
            total = total + (h_s - h_t).square().mean(-1).sum() / len(pairs)
    for hook in hooks:
        hook.remove()
    return distill.coefficient * total / count


def chosen(pairs: Sequence[Pair], distill: DistillConfig) -> list[Pair]:
    """The supervised ones of a rollout's aligned pairs, in order."""
    if distill.positions == "all":
        return list(pairs)
    k = 1 if distill.positions == "last" else distill.k
    return list(pairs[:k]) if distill.positions == "first_k" else list(pairs[-k:])


__all__ = ["BRACKETS", "CHAT_TEMPLATE", "chosen", "cross_run", "give_tokenizer", "load_models", "load_tokenizers",
           "plain_loss", "tokenizer_of"]  # fmt: skip
