"""Where the student's text comes from: prompts, engine, sampling, and what is done with what comes back."""

from __future__ import annotations

from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from oprd_megatron.config.base import Strict


def template_fields(template: str) -> list[str]:
    """Fields of a row that a template names: `answer` of {answer}, `reward_model` of {reward_model[ground_truth]}."""
    return [name.split("[")[0].split(".")[0] for _, name, _, _ in Formatter().parse(template) if name is not None]


class PromptsConfig(Strict):
    """A file of prompts: .jsonl, .json (a list) or .parquet."""

    path: Path
    """The file."""
    field: str = "prompt"
    """Name of the field or column that holds the prompt: a string, or a list of chat messages (role, content)."""
    limit: PositiveInt | None = None
    """Use only the first so many prompts."""
    chat_template: bool = True
    """Wrap the prompt in the tokenizer's chat template; false feeds the raw text."""
    max_tokens: PositiveInt = 1024
    """Prompts longer than this many tokens are left out (the number left out is logged)."""
    teacher_template: str | None = None
    """What the teacher reads instead of the prompt, for self-distillation with privileged text: {prompt} and any other field of
    the row, such as {answer} or {reward_model[ground_truth]}. The response's tokens are the same for both."""

    @model_validator(mode="after")
    def _check(self) -> PromptsConfig:
        if self.teacher_template is not None and "prompt" not in template_fields(self.teacher_template):
            raise ValueError("teacher_template: has no {prompt}, so the teacher would not see the question; put it in")
        return self


class VLLMConfig(Strict):
    """How vLLM runs, in this process or as servers that the run starts."""

    tp: PositiveInt = 1
    """Tensor-parallel size of an engine. Colocated engines are on this many consecutive ranks each."""
    max_model_len: PositiveInt | None = None
    """Context of the engine; left out, the longest prompt and response."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of a GPU's memory for weights and cache. A colocated engine gives it back while the student trains."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    cuda_graph_sizes: list[PositiveInt] = []  # noqa: RUF012 (pydantic copies it)
    """Batch sizes that CUDA graphs are captured for; empty, vLLM's own."""
    args: dict[str, Any] = {}  # noqa: RUF012
    """More of vLLM's engine arguments, under its own names with underscores."""


class ServerConfig(Strict):
    """vLLM as OpenAI-compatible servers."""

    urls: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Servers that run already (`oprd rollout serve`), http://host:port each. Empty: the run starts its own."""
    start: PositiveInt = 1
    """Servers that the run starts on its first machine, where `urls` is empty."""
    python: Path | None = None
    """Python of an environment with vLLM, for servers that the run starts; left out, the one that runs this."""
    port: PositiveInt = 8100
    """Port on loopback of the first server that the run starts; the others follow."""
    ready_seconds: PositiveFloat = 900
    """A server that does not answer for so long after its start is an error."""
    request_seconds: PositiveFloat = 600
    """A request without a token for so long is taken from its server and asked elsewhere."""
    retries: NonNegativeInt = 3
    """Times that a request is asked again after a failure, with a longer wait each time."""
    inflight_tokens: PositiveInt = 65536
    """Prompt and response tokens that may be asked of one server at a time; the rest waits here."""
    transfer: Literal["auto", "shm", "disk", "nccl"] = "auto"
    """How weights travel. shm: shared memory of one machine; disk: a directory that all servers see; nccl: between GPUs, by
    vLLM's own weight transfer. auto: nccl from GPUs, shm to servers on loopback, else disk."""
    transfer_dir: Path | None = None
    """Directory for disk; left out, one in run.dir."""
    bucket_bytes: ByteSize = ByteSize(256 * 2**20)
    """Weights travel in buckets of about this size (bytes, or 256MiB); at most two exist at a time."""


class MismatchConfig(Strict):
    """How far the engine's log-probabilities of the rollouts are from the trainer's own."""

    every: NonNegativeInt = 0
    """Measure every so many steps; costs a forward pass of the student and its head. 0 never."""
    gate: Literal["none", "mask", "stop"] = "none"
    """What to do above `limit`. none: nothing; mask: the response is not trained on; stop: the run stops. mask and stop measure
    every step."""
    limit: PositiveFloat = 0.5
    """Mean |difference| over a response's tokens, in nats."""


class RolloutConfig(Strict):
    """The student writes responses to prompts with its own current weights."""

    engine: Literal["hf", "vllm", "vllm_server", "file"] = "hf"
    """hf: transformers' generate in this process, fed from memory after every update. vllm: vLLM in this process, asleep while
    the student trains. vllm_server: vLLM servers, here or elsewhere. file: recorded rollouts (`file`), nothing is generated."""
    schedule: Literal["sync", "overlap", "one_step_off"] = "sync"
    """sync: all text of a step, then its update. overlap: responses are learned from as they finish, while others are still
    being written; the same update up to rounding. one_step_off: the next step's text is written during the update, by weights
    that are one version old. The last two need vllm_server."""
    max_staleness: NonNegativeInt = 1
    """Responses of weights that are more versions old are refused."""
    prompts: PromptsConfig
    """Training prompts."""
    prompts_per_step: PositiveInt = 8
    """Prompts in one training step."""
    responses_per_prompt: PositiveInt = 2
    """Responses sampled for each prompt."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; 1 samples from the whole vocabulary."""
    max_response_tokens: PositiveInt = 1024
    """Responses are cut at this many tokens."""
    stop: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Extra stop strings, besides the model's end-of-sequence tokens."""
    num_engines: PositiveInt | None = None
    """Ranks that hold an engine (a copy of the student); left out, all of them on GPUs, on CPU one for each core."""
    batch_size: PositiveInt = 64
    """Sequences one engine decodes at a time."""
    probe_tolerance: Annotated[float, Field(gt=0.0)] | None = None
    """Largest log-probability difference (nats) allowed between engine and trainer on the probe after a weight sync;
    left out, 1e-3 for an fp32 student and 0.35 for bf16."""
    overlap_tokens: PositiveInt | None = None
    """overlap: learn from finished responses as soon as they have so many tokens; left out, an eighth of the step's most."""
    truncated: Literal["keep", "mask", "drop"] = "keep"
    """Responses cut at max_response_tokens. keep: like others; mask: they teach nothing, but their tokens count in the loss's
    mean; drop: as if they had not been written."""
    duplicates: Literal["keep", "drop"] = "keep"
    """drop: of equal responses to a prompt in one step only the first is learned from."""
    empty: Literal["keep", "drop"] = "keep"
    """Responses that are an end-of-sequence token alone."""
    timeout_seconds: PositiveFloat | None = None
    """vllm_server: a response that is not done after so long is cut where it is. Left out, it is waited for."""
    buffer: bool = True
    """Keep finished responses in <run.dir>/rollouts until the next checkpoint, for a run that is killed."""
    file: Path | None = None
    """file: what `oprd rollout` wrote (.parquet or .jsonl)."""
    mismatch: MismatchConfig = MismatchConfig()
    """Engine against trainer on the rollouts."""
    vllm: VLLMConfig = VLLMConfig()
    """How vLLM runs."""
    server: ServerConfig = ServerConfig()
    """For vllm_server."""

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.schedule != "sync" and self.engine != "vllm_server":
            raise ValueError(
                f"schedule: {self.schedule} needs an engine that writes while the models train; set engine: vllm_server, or "
                "schedule: sync"
            )
        if self.schedule == "one_step_off" and self.max_staleness < 1:
            raise ValueError(
                "schedule: one_step_off trains on text of weights one version old; set max_staleness: 1 or more"
            )
        if self.temperature > 2 and self.engine in ("vllm", "vllm_server"):
            raise ValueError(
                f"temperature: {self.temperature:g} is above 2, which vLLM refuses; lower it, or use engine: hf"
            )
        if (self.engine == "file") != (self.file is not None):
            raise ValueError("engine: file and file: PATH go together; set both or neither")
        if self.timeout_seconds is not None and self.engine != "vllm_server":
            raise ValueError(
                f"timeout_seconds: engine {self.engine} cannot cut a response; leave it out, or use vllm_server"
            )
        if self.mismatch.gate != "none" and self.top_p < 1:
            raise ValueError(
                "mismatch.gate: with top_p below 1 the engine's log-probabilities are of the nucleus and the trainer's of the "
                "whole vocabulary; set top_p: 1 or gate: none"
            )
        return self
