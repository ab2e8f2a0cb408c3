"""A small benchmark every so many steps of a run, by the run's own engine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from oprd_megatron.benchmarks.grading import Grader
from oprd_megatron.benchmarks.problems import Problem
from oprd_megatron.benchmarks.results import MEASURES, Response, grade_all, summarise_each
from oprd_megatron.benchmarks.run import load_benchmark, make_prompts, sampling
from oprd_megatron.config.benchmark import BenchmarkConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.parallel.agreement import together
from oprd_megatron.rollout.collect import collect_rollouts
from oprd_megatron.rollout.engine import RolloutEngine
from oprd_megatron.rollout.vllm.build import Student


class InLoop:
    """The benchmark of one run. Every method is collective.

    Args:
        settings: the run's `benchmark` section.
        tokenizer: the student's.
        max_response_tokens: where the settings have none.
        vocab_size: only ids below this are written.
        seed_step: step that random numbers are drawn as if of; the same every time, so that checkpoints meet the same draws.

    Raises:
        UserError: a problem file is malformed, or math-verify is not installed.
    """

    def __init__(
        self,
        settings: BenchmarkConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_response_tokens: int,
        vocab_size: int,
        seed_step: int = 0,
    ) -> None:
        self.settings, self.tokenizer, self.seed_step = settings, tokenizer, seed_step
        parcel: list[Any] = [None]
        with together("reading benchmarks"):
            if dist.get_rank() == 0:
                with Grader(settings.answer_seconds) as grader:
                    parcel = [load_benchmark(settings, grader)]
        dist.broadcast_object_list(parcel, src=0)
        self.problems: list[Problem] = parcel[0]
        with together("asking benchmarks"):
            self.prompts = make_prompts(self.problems, tokenizer, settings)
        self.params = sampling(settings, max_response_tokens, vocab_size)

    @property
    def context(self) -> int:
        """Tokens of the longest question with its response, which engine and student have to hold."""
        return max(len(prompt.token_ids) for prompt in self.prompts) + self.params.max_response_tokens

    def asked_of(self, writer: Student) -> Student:
        """The writer of a run with room for the problems.

        Raises:
            ConfigError: the student has not.
        """
        longest = writer.architecture.max_position_embeddings
        if self.context > longest:
            raise ConfigError(
                f"benchmark: the longest problem with its response has {self.context} tokens, and {writer.path} a context of "
                f"{longest}; lower benchmark.max_response_tokens, or leave that problem out"
            )
        return replace(writer, context=max(writer.context, self.context))

    def due(self, step: int, last: int) -> bool:
        """Whether to ask after `step` finished steps of a run of `last`."""
        return step == last or (self.settings.every > 0 and step % self.settings.every == 0)

    def record(self, step: int, engine: RolloutEngine | None) -> dict[str, Any]:
        """Ask and grade; engines share the work, rank 0 grades.

        Args:
            step: finished training steps.
            engine: this rank's engine with the student's weights, if it holds one.

        Returns:
            {"kind": "benchmark", "step", "seconds", "benchmarks": {name: {measure: mean}}}, the same on every rank.
        """
        start = time.perf_counter()
        samples = self.settings.samples
        rollouts = collect_rollouts(engine, self.prompts, samples, self.params, self.seed_step)
        parcel: list[Any] = [None]
        with together("grading"):
            if dist.get_rank() == 0:
                texts = self.tokenizer.batch_decode([list(r.response_ids) for r in rollouts], skip_special_tokens=True)
                found = [
                    Response(text, rollout.response_ids, rollout.finished)
                    for text, rollout in zip(texts, rollouts, strict=True)
                ]
                responses = [found[first : first + samples] for first in range(0, len(found), samples)]
                with Grader(self.settings.answer_seconds) as grader:
                    results, _ = grade_all(self.problems, responses, grader, self.settings.boxed_only)
                parcel = [{name: _means(of) for name, of in summarise_each(results).items()}]
        dist.broadcast_object_list(parcel, src=0)
        seconds = time.perf_counter() - start
        return {"kind": "benchmark", "step": step, "seconds": seconds, "benchmarks": parcel[0]}


def _means(summary: dict[str, Any]) -> dict[str, float | None]:
    found = {name: summary[name]["value"] for name in MEASURES}
    half = [(of["high"] - of["low"]) / 2 for of in (summary["accuracy"],) if of["low"] is not None]
    return {**found, "accuracy_half_interval": half[0] if half else None, "problems": summary["problems"]}
