"""Benchmarks: problems with known answers, how the student is asked, and how its answers are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from oprd_megatron.config.base import NonNegative, Strict

TEMPLATE = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


class BenchmarkConfig(Strict):
    """Math problems that the student answers several times each, graded against their answers."""

    files: Annotated[list[Path], Field(min_length=1)]
    """Problem files: .jsonl, .json (a list) or .parquet, a row for each problem. A file's name without ending is its
    benchmark's."""
    problem_field: str | None = None
    """Field that holds the problem; left out, problem, question or prompt, whichever a file has."""
    answer_field: str | None = None
    """Field that holds the right answer, dots lead into objects; left out, answer, reward_model.ground_truth or solution."""
    limit: PositiveInt | None = None
    """Use only the first so many problems of each file."""
    skip_unparsable: bool = False
    """Leave out problems whose answer math-verify cannot read; else they are an error."""
    template: str = TEMPLATE
    """What the student is asked: {problem} stands for the problem. A problem that says \\boxed itself is asked as it is."""
    chat_template: bool = True
    """Wrap the question in the tokenizer's chat template; false feeds the raw text, to a base model for example."""
    samples: PositiveInt = 16
    """Answers to each problem, the k of Avg@k."""
    temperature: NonNegative = 0.7
    """Sampling temperature; 0 is greedy, and then one sample is all there is."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; 1 samples from the whole vocabulary."""
    max_response_tokens: PositiveInt | None = None
    """Answers are cut at this many tokens; left out, rollout.max_response_tokens."""
    seed: NonNegativeInt = 0
    """Of sampling. The same for all checkpoints, so that they are compared on the same draws."""
    boxed_only: bool = False
    """Only a \\boxed answer counts; else, where there is none, the last expression of the response does."""
    answer_seconds: PositiveFloat = 5.0
    """Time to read and compare one answer; beyond it, it is wrong."""
    every: NonNegativeInt = 50
    """While training: every so many steps, besides before the first and after the last; 0 turns the ones between off."""

    @model_validator(mode="after")
    def _check(self) -> BenchmarkConfig:
        if "{problem}" not in self.template:
            raise ValueError("template: has no {problem}, so the student would not see the question; put it in")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples: {self.samples} greedy answers would all be the same; set samples: 1, or a temperature above 0"
            )
        names = [path.stem for path in self.files]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"files: two are called {twice!r}, and results go by that name; rename one")
        return self
