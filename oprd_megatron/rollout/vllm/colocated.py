"""vLLM in the trainer's own processes: engines on groups of `rollout.vllm.tp` consecutive ranks, which take turns with the
models.

torchrun started the ranks, so vLLM is told that its launcher is external: each rank has a scheduler of its own, the ranks of a
group schedule the same requests alike. vLLM is told nothing of data parallelism: it would make the groups count each other's
requests at every token, and a group without requests, which does not ask its engine, would hang the others.

An engine gives its memory back after it has written (on GPUs: weights to host memory, cache dropped) and takes it again when it
is asked something.

Run on CPU; not yet run on a GPU.
"""

from __future__ import annotations

import gc
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from oprd_megatron.config.rollout import RolloutConfig
from oprd_megatron.errors import ConfigError, WeightSyncError
from oprd_megatron.parallel.activity import here
from oprd_megatron.rollout.engine import Request, Rollout, SamplingParams
from oprd_megatron.rollout.probe import PROBE_STEP
from oprd_megatron.rollout.sampling import sample_seed
from oprd_megatron.rollout.vllm.client import Vocabulary
from oprd_megatron.rollout.vllm.processes import engine_options
from oprd_megatron.rollout.vllm.weight_transfer import SHARED_MEMORY

KV_CACHE_GIB = "1"
"""Cache of an engine on CPU where VLLM_CPU_KVCACHE_SPACE is not set; vLLM's own is most of the machine's memory."""

SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
"""vLLM's arguments that groups of `rollout.vllm.tp` ranks leave no choice of."""


class ColocatedEngine:
    """A `RolloutEngine` on this rank and the others of its group. Every method is collective over the group.

    Args:
        model_dir: Hugging Face directory of the student.
        config: `rollout`.
        dtype: fp32 or bf16.
        vocabulary: the student's ids.
        context: longest prompt and response, where `vllm.max_model_len` does not say.
        seed: vLLM's.

    Attributes:
        replica: number of the group.

    Raises:
        ConfigError: vLLM is not installed here or refuses the model or an option, or the ranks are no multiple of a group.
    """

    def __init__(
        self, model_dir: Path, config: RolloutConfig, dtype: str, vocabulary: Vocabulary, context: int, seed: int
    ) -> None:
        tp, world = config.vllm.tp, dist.get_world_size()
        if world % tp:
            raise ConfigError(
                f"rollout.vllm.tp: {tp} does not divide the run's {world} ranks; engines are on groups of tp ranks"
            )
        for name in SIZES:
            if name in config.vllm.args:
                raise ConfigError(
                    f"rollout.vllm.args: {name} is not for colocated engines, which are on rollout.vllm.tp ranks each; leave "
                    "it out"
                )
        self.replica: int | None = dist.get_rank() // tp
        self._vocabulary = vocabulary
        self._version: int | None = None
        for name, value in {"RANK": dist.get_rank(), "LOCAL_RANK": 0, "WORLD_SIZE": world}.items():
            os.environ.setdefault(name, str(value))  # a run of one rank has no torchrun
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_CACHE_GIB)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
        except ImportError:
            raise ConfigError(
                "rollout.engine: vllm runs vLLM in the run's own environment, and it is not there; install "
                "oprd-megatron[vllm], or use engine: vllm_server"
            ) from None
        options = engine_options(config.vllm, dtype, context, seed)
        options |= {"distributed_executor_backend": "external_launcher", "enable_sleep_mode": torch.cuda.is_available()}
        self._sleeps, self._is_asleep = torch.cuda.is_available(), False
        try:
            self._llm = LLM(model=str(model_dir), **options)
        except ValueError as error:
            raise ConfigError(f"rollout.engine: vLLM does not start on {model_dir}: {_reason(error)}") from None
        except RuntimeError as error:
            if "SHMManager" not in str(error):
                raise
            raise ConfigError(
                f"rollout.vllm.tp: {tp}: on CPU the ranks of an engine meet in /dev/shm, under a name that all runs share; "
                "another run is starting here, or one was killed while it was: wait, or remove /dev/shm/*-cpushm_*"
            ) from None
        if tp > 1 and not torch.cuda.is_available():
            _free_names()

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        """One rollout per request, in their order; then the engine sleeps, unless this was the probe.

        Raises:
            WeightSyncError: no weights yet, or the last update failed.
        """
        version = self._ready_version()
        self._wake()
        asked = [self._sampling(params, sample_seed(params.seed, step, request.sample_index)) for request in requests]
        outputs = self._ask([list(request.prompt.token_ids) for request in requests], asked)
        if step != PROBE_STEP:
            self._sleep()
        return [self._rollout(request, output, version) for request, output in zip(requests, outputs, strict=True)]

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take every weight from this process's memory. The cached keys and values of the old ones are forgotten.

        Raises:
            WeightSyncError: tensors are missing, unknown, or of other shapes.
        """
        self._version = None
        self._wake()
        self._llm.collective_rpc(_load, args=(version, tensors))
        if not self._llm.reset_prefix_cache():
            raise WeightSyncError(
                f"weight sync of version {version}: vLLM's prefix cache cannot be emptied; start again"
            )
        self._version = version

    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        """See `RolloutEngine.score`; sequences have two tokens at least. The last one's is read through the prefix cache (see
        `scoring`)."""
        from vllm import SamplingParams as Sampling

        self._ready_version()
        self._wake()
        last = [Sampling(max_tokens=1, logprobs=1, logprob_token_ids=ids[-1:]) for ids in token_ids]
        cached = self._ask([ids[:-1] for ids in token_ids], last)  # first: the other would renew the cache
        whole = self._ask(token_ids, [Sampling(max_tokens=1, prompt_logprobs=0)] * len(token_ids))
        scores = []
        for ids, at_once, from_cache in zip(token_ids, whole, cached, strict=True):
            found = [place[token].logprob for place, token in zip(at_once.prompt_logprobs[1:], ids[1:], strict=True)]
            scores.append(torch.tensor([*found[:-1], from_cache.outputs[0].logprobs[0][ids[-1]].logprob]))
        return scores

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """`score`: a group has one copy."""
        return {str(self.replica): self.score(token_ids)}

    def checksums(self) -> dict[str, dict[str, int]]:
        """Of the weights as they came."""
        held = self._llm.collective_rpc("held_weights")
        return {str(self.replica): found["crc32"] for found in held}

    def close(self) -> None:
        """Give back a GPU's memory and vLLM's process groups; nothing can be asked afterwards. Collective over the world.

        vLLM's own shutdown is left out: it ends the run's process group too.
        """
        from vllm.distributed import destroy_model_parallel

        self._version = None
        self._sleep(level=2)
        self._llm.llm_engine.engine_core._finalizer.detach()
        gc.unfreeze()  # vLLM froze what there was at its start
        destroy_model_parallel()

    def _ask(self, prompts: list[list[int]], asked: list[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return self._llm.generate(inputs, asked, use_tqdm=_Marks) if inputs else []

    def _sampling(self, params: SamplingParams, seed: int) -> Any:
        from vllm import SamplingParams as Sampling

        limit = self._vocabulary.size if params.vocab_size is None else params.vocab_size
        return Sampling(
            max_tokens=params.max_response_tokens,
            seed=seed % 2**63,
            temperature=params.temperature,
            top_p=params.top_p,
            logit_bias={token: -100.0 for token in range(limit, self._vocabulary.size)} or None,
            stop=list(params.stop),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            stop_token_ids=list(self._vocabulary.eos_ids),
            logprobs=0,
        )

    def _rollout(self, request: Request, output: Any, version: int) -> Rollout:
        answer = output.outputs[0]
        ids = tuple(answer.token_ids)
        logprobs = tuple(place[token].logprob for place, token in zip(answer.logprobs, ids, strict=True))
        return Rollout(
            prompt_index=request.prompt.index,
            sample_index=request.sample_index,
            prompt_ids=request.prompt.token_ids,
            response_ids=ids,
            weight_version=version,
            finished=answer.finish_reason == "stop",
            logprobs=logprobs,
        )

    def _sleep(self, level: int = 1) -> None:
        """1 keeps the weights in host memory, 2 forgets them."""
        if self._sleeps and not self._is_asleep:
            self._llm.sleep(level=level)
            self._is_asleep = True

    def _wake(self) -> None:
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False

    def _ready_version(self) -> int:
        if self._version is None:
            raise WeightSyncError("the engine has no weights, or its last update failed; call update_weights first")
        return self._version


def _load(worker: Any, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Runs in vLLM's worker, which is in this process."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        worker.weight_transfer_engine.load_stream(version, tensors)


def _free_names() -> None:
    """The ranks of the engine have met: what they named in /dev/shm would stay there after a run that is killed, and the next
    run could not start."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    name = group.device_communicator.dist_module.group_name.lstrip("/")
    (SHARED_MEMORY / f"{name}_{group.rank_in_group}").unlink()


def _reason(error: ValueError) -> str:
    """In one line: without what pydantic puts around it."""
    text = re.sub(r"\s*\[type=.*", "", str(error), flags=re.DOTALL)
    return " ".join(re.sub(r"^.*Value error, ", "", text, flags=re.DOTALL).split())


class _Marks(tqdm):  # type: ignore[type-arg]
    """vLLM's progress bar, which nobody sees: every answer is a sign that the engine moves."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "file": io.StringIO()})

    def update(self, n: float | None = 1) -> bool | None:
        """See tqdm."""
        here.mark()
        return super().update(n)
