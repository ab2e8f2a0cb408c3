"""A student on a benchmark: ask every problem k times, keep the responses as they come, grade, write the folder.

Shapes: P problems, k samples each; response number `i * k + s` is sample s of problem i.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jinja2
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from oprd_megatron.benchmarks.folder import write_folder
from oprd_megatron.benchmarks.grading import Grader, keep_parsable
from oprd_megatron.benchmarks.problems import Problem, read_problems
from oprd_megatron.benchmarks.responses import ResponseFile
from oprd_megatron.benchmarks.results import Response, grade_all
from oprd_megatron.config.benchmark import BenchmarkConfig
from oprd_megatron.errors import DataError
from oprd_megatron.rollout.engine import Generation, Request, Rollout, RolloutEngine, SamplingParams, make_requests
from oprd_megatron.rollout.prompts import Prompt
from oprd_megatron.rollout.recorded_row import Recorded

AT_ONCE = 256
"""Responses asked at a time of an engine that gives all of a call at its end."""


def load_benchmark(settings: BenchmarkConfig, grader: Grader) -> list[Problem]:
    """The problems whose answers can be read.

    Raises:
        DataError: a file is malformed, or an answer cannot be read and `skip_unparsable` is off.
    """
    problems = read_problems(settings.files, settings.problem_field, settings.answer_field, settings.limit)
    golds, places = [problem.gold for problem in problems], [problem.place for problem in problems]
    kept = keep_parsable(golds, places, grader, settings.skip_unparsable)
    return [problem for problem, good in zip(problems, kept, strict=True) if good]


def question(problem: Problem, template: str) -> str:
    """What the student is asked, without the chat before it; see `BenchmarkConfig.template`."""
    return problem.text if "\\boxed" in problem.text else template.replace("{problem}", problem.text)


def make_prompts(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, settings: BenchmarkConfig
) -> list[Prompt]:
    """One prompt a problem, in order.

    Raises:
        DataError: the tokenizer has no chat template, or refuses a problem.
    """
    if settings.chat_template and tokenizer.chat_template is None:
        raise DataError(
            "chat_template is true, but the tokenizer has no chat template; turn it off (--no-chat-template) to feed raw text"
        )
    prompts = []
    for index, problem in enumerate(problems):
        asked = question(problem, settings.template)
        messages = [*problem.messages[:-1], {**problem.messages[-1], "content": asked}]
        text = asked
        if settings.chat_template:
            try:
                text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            except jinja2.TemplateError as error:
                raise DataError(f"{problem.place}: the tokenizer's chat template refuses it ({error})") from None
        ids = tokenizer(text, add_special_tokens=not settings.chat_template)["input_ids"]
        prompts.append(Prompt(index, asked, tuple(ids)))
    return prompts


def sampling(settings: BenchmarkConfig, max_response_tokens: int, vocab_size: int | None) -> SamplingParams:
    """How a benchmark's responses are drawn; `max_response_tokens` where the settings have none."""
    longest = settings.max_response_tokens or max_response_tokens
    return SamplingParams(settings.temperature, settings.top_p, longest, seed=settings.seed, vocab_size=vocab_size)


def run_benchmark(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    settings: BenchmarkConfig,
    params: SamplingParams,
    out: Path,
    weights: str,
    grader: Grader,
) -> dict[str, Any]:
    """Ask, grade and write `out` (`folder` says what). Started again on the same `out`, it asks only for what is missing.

    Args:
        engine: this process's, with the student's weights.
        tokenizer: the student's.
        problems: from `load_benchmark`.
        settings: number of samples, template, how answers are read.
        params: from `sampling`.
        out: folder.
        weights: which weights the engine has; another word for them is refused in a folder that has responses.
        grader: reads answers.

    Returns:
        The summary.

    Raises:
        ConfigError: `out` holds responses that were made with other settings.
        DataError: `out` is damaged or in use, or a problem cannot be asked.
    """
    start = time.perf_counter()
    prompts = make_prompts(problems, tokenizer, settings)
    made_with = {
        "weights": weights,
        "benchmarks": [path.name for path in settings.files],
        "problems": _digest([(problem.benchmark, problem.id, problem.gold) for problem in problems]),
        "prompts": _digest([prompt.token_ids for prompt in prompts]),
        "samples": settings.samples,
        **vars(params),
    }
    with ResponseFile(out, made_with) as file:
        requests = make_requests(prompts, settings.samples)
        missing = [request for request in requests if request.sample_index not in file.found]
        with tqdm(total=len(requests), initial=len(requests) - len(missing), desc="responses", unit="response") as bar:
            for rollouts in written_by(engine, missing, params):
                file.add(_rows(rollouts, prompts, tokenizer))
                bar.update(len(rollouts))
        rows = [file.found[request.sample_index] for request in requests]
        seconds = {"generate": time.perf_counter() - start}
        found = [Response(row.response, row.response_ids, row.finished) for row in rows]
        responses = [found[i : i + settings.samples] for i in range(0, len(found), settings.samples)]
        with tqdm(desc="answers", unit="answer") as bar:
            results, grades = grade_all(problems, responses, grader, settings.boxed_only, bar.update)
        seconds["grade"] = time.perf_counter() - start - seconds["generate"]
        about = {
            "made_with": made_with,
            "boxed_only": settings.boxed_only,
            "seconds": seconds,
            "generated": len(missing),
        }
        return write_folder(out, problems, responses, results, grades, about)


@runtime_checkable
class _Starts(Protocol):
    def start(self, requests: list[Request], params: SamplingParams, step: int) -> Generation: ...


def written_by(engine: RolloutEngine, requests: list[Request], params: SamplingParams) -> Iterator[list[Rollout]]:
    """Responses as an engine finishes them; of one that gives all of a call at its end, `AT_ONCE` a call."""
    if isinstance(engine, _Starts):
        generation = engine.start(requests, params, 0)
        while not generation.is_taken:
            yield generation.take(min_tokens=1)
        return
    for first in range(0, len(requests), AT_ONCE):
        yield engine.generate(requests[first : first + AT_ONCE], params, 0)


def _rows(rollouts: list[Rollout], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> Iterator[Recorded]:
    for rollout in rollouts:
        text = str(tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True))
        row = Recorded.of(rollout, 0, prompts[rollout.prompt_index].text, text)
        yield Recorded(**{**vars(row), "logprobs": None})


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
