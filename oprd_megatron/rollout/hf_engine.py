"""The simplest engine: transformers' `generate` in the trainer's process.

It holds a second copy of the student, built empty from config.json and filled by `update_weights`; the weights in the
directory are never read. Slow next to a serving engine, but exact, without further dependencies and the same on CPU.

Shapes: B sequences of a batch, P columns of padded prompts, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, StopStringCriteria
from transformers.initialization import no_init_weights

from checkpoints_conversion.weights import hf_dir_of
from oprd_megatron.errors import CheckpointError, ConfigError, WeightSyncError
from oprd_megatron.rollout.checksum import checksum
from oprd_megatron.rollout.engine import Request, Rollout, SamplingParams
from oprd_megatron.rollout.file_views import as_in_files
from oprd_megatron.rollout.sampling import Draw, ResponseEnd, logits_processors
from oprd_megatron.rollout.tokenizer import load_tokenizer


class HFEngine:
    """A `RolloutEngine` on transformers.

    Args:
        hf_dir: Hugging Face directory, or a Megatron checkpoint with one beside it: config.json, generation_config.json
            (optional) and tokenizer files are read.
        dtype: Parameter and compute dtype; sampling and `score` work on fp32 logits.
        device: Where the copy of the model lives.
        batch_size: Sequences decoded or scored at a time.

    Raises:
        CheckpointError: the directory holds no causal language model that transformers knows.
    """

    replica: int | None = None

    def __init__(self, hf_dir: Path | str, dtype: torch.dtype, device: torch.device | str, batch_size: int) -> None:
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(hf_dir)
        self.eos_ids = eos_ids(Path(hf_dir), self.tokenizer.eos_token_id)
        self._model = _empty_model(hf_dir_of(hf_dir), dtype, self.device)
        self._weights = as_in_files(self._model)  # a tied lm_head is not among them
        self._version: int | None = None
        # Nothing of the directory's sampling defaults may leak in: `generate` fills unset options from this one.
        self._model.generation_config = GenerationConfig()

    @torch.no_grad()
    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Copy every weight in place.

        Args:
            version: Number of this state of the weights; rollouts carry it.
            tensors: (Hugging Face name, full tensor of any dtype and device), each name once. A model with tied
                embeddings has no lm_head.weight.

        Raises:
            WeightSyncError: a name is missing, unknown or given twice, or a shape differs. The engine then refuses to
                generate until an update succeeds.
        """
        self._version = None
        missing = set(self._weights)
        for name, tensor in tensors:
            if name not in self._weights:
                raise WeightSyncError(f"weight sync: the engine's model has no weight {name!r}{self._tied_hint(name)}")
            if name not in missing:
                raise WeightSyncError(f"weight sync: {name!r} was sent twice")
            weight = self._weights[name]
            if tensor.shape != weight.shape:
                raise WeightSyncError(
                    f"weight sync: {name!r} has shape {list(tensor.shape)}, the engine's model has {list(weight.shape)}"
                )
            weight.copy_(tensor)
            missing.remove(name)
        if missing:
            raise WeightSyncError(f"weight sync: {len(missing)} weights were not sent, the first is {min(missing)!r}")
        self._version = version

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        """Write one response per request.

        Args:
            requests: Any number; decoded `batch_size` at a time, prompts of similar length together.
            params: How tokens are drawn.
            step: Training step, part of the random seed.

        Returns:
            Rollouts in the order of `requests`.

        Raises:
            WeightSyncError: no weights yet, or the last update failed.
            ConfigError: a prompt and its longest response do not fit the model's context.
        """
        rollouts = {place: rollout for batch in self._batches(requests, params, step) for place, rollout in batch}
        return [rollouts[place] for place in range(len(requests))]

    def start(self, requests: list[Request], params: SamplingParams, step: int) -> Batches:
        """The same in parts. Nothing is written until it is taken; then batches are decoded one after the other.

        Raises:
            As `generate`.
        """
        return Batches(self._batches(requests, params, step), len(requests))

    @torch.no_grad()
    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        """Log-probability of each token given those before it.

        Args:
            token_ids: Sequences of at least one token.

        Returns:
            One fp32 CPU tensor `[length - 1]` per sequence, of the untempered distribution.

        Raises:
            WeightSyncError: no weights yet, or the last update failed.
        """
        self._ready_version()
        scores = []
        for batch in _chunks(token_ids, self.batch_size):
            ids, mask = self._pad(batch, left=False)
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, sequence in zip(logits, batch, strict=True):
                targets = torch.tensor(sequence[1:], device=self.device)[:, None]
                scores.append(row[: len(targets)].float().log_softmax(-1).gather(-1, targets)[:, 0].cpu())
        return scores

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """`score`: there is one copy."""
        return {"": self.score(token_ids)}

    def checksums(self) -> dict[str, dict[str, int]]:
        """Of the weights as they are now."""
        return {"": {name: checksum(weight) for name, weight in self._weights.items()}}

    def close(self) -> None:
        """Free the model's memory."""
        self._version = None
        self._weights.clear()
        self._model.to("meta")  # type: ignore[arg-type]

    def _batches(
        self, requests: list[Request], params: SamplingParams, step: int
    ) -> Iterator[list[tuple[int, Rollout]]]:
        """(place in `requests`, rollout) of one batch after the other, decoded as they are asked for."""
        version = self._ready_version()
        self._check_length(requests, params)
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids), reverse=True)

        def decode() -> Iterator[list[tuple[int, Rollout]]]:
            for places in _chunks(by_length, self.batch_size):
                assert self._version == version, "weights were updated before all rollouts were taken"
                batch = self._generate_batch([requests[i] for i in places], params, step, version)
                yield list(zip(places, batch, strict=True))

        return decode()

    def _generate_batch(
        self, requests: list[Request], params: SamplingParams, step: int, version: int
    ) -> list[Rollout]:
        prompts = [request.prompt for request in requests]
        ids, mask = self._pad([prompt.token_ids for prompt in prompts], left=True)
        stop_strings = StopStringCriteria(self.tokenizer, list(params.stop)) if params.stop else None
        draw = Draw(params, step, [request.sample_index for request in requests], self.device)
        end = ResponseEnd(len(prompts), ids.shape[1], torch.tensor(self.eos_ids, device=self.device), stop_strings)
        output = self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=params.max_response_tokens, use_cache=True, pad_token_id=self.eos_ids[0]
            ),
            logits_processor=logits_processors(params, draw),
            stopping_criteria=[end],
        )
        responses, lengths, logprobs = (
            output[:, ids.shape[1] :].tolist(),
            end.lengths.tolist(),
            draw.logprobs().tolist(),
        )
        return [
            Rollout(
                prompt_index=request.prompt.index,
                sample_index=request.sample_index,
                prompt_ids=request.prompt.token_ids,
                response_ids=tuple(response[: length or len(response)]),
                weight_version=version,
                finished=length > 0,
                logprobs=tuple(of_response[: length or len(response)]),
            )
            for request, response, length, of_response in zip(requests, responses, lengths, logprobs, strict=True)
        ]

    def _pad(self, sequences: Iterable[Iterable[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask), both `[B, P]` int64. The padding id is any valid one: the mask hides it."""
        rows = [torch.tensor(list(sequence)) for sequence in sequences]
        side = "left" if left else "right"
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=self.eos_ids[0], padding_side=side)
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        return ids.to(self.device), mask.to(self.device)

    def _ready_version(self) -> int:
        if self._version is None:
            raise WeightSyncError("the engine has no weights, or its last update failed; call update_weights first")
        return self._version

    def _check_length(self, requests: list[Request], params: SamplingParams) -> None:
        context = self._model.config.max_position_embeddings
        longest = max((len(request.prompt.token_ids) for request in requests), default=0)
        if longest + params.max_response_tokens > context:
            raise ConfigError(
                f"a prompt of {longest} tokens and max_response_tokens {params.max_response_tokens} do not fit the "
                f"model's context of {context} tokens; lower max_response_tokens or prompts.max_tokens"
            )

    def _tied_hint(self, name: str) -> str:
        tied = name == "lm_head.weight" and self._model.config.tie_word_embeddings
        return " (its embeddings are tied: send only the embedding)" if tied else ""


class Batches:
    """A `Generation` of an `HFEngine`, which works only while it is waited for.

    Args:
        batches: of (place, rollout), decoded as they are asked for.
        count: rollouts in all of them.
    """

    def __init__(self, batches: Iterator[list[tuple[int, Rollout]]], count: int) -> None:
        self._batches, self._left = batches, count

    @property
    def is_taken(self) -> bool:
        """See `Generation.is_taken`."""
        return self._left == 0

    def take(self, min_tokens: int | None = None) -> list[Rollout]:
        """See `Generation.take`. Whole batches are given."""
        taken: list[Rollout] = []
        tokens = 0
        while not self.is_taken and (min_tokens is None or tokens < min_tokens):
            batch = [rollout for _, rollout in next(self._batches)]
            taken += batch
            tokens += sum(len(rollout.response_ids) for rollout in batch)
            self._left -= len(batch)
        return sorted(taken, key=lambda rollout: rollout.sample_index)


def _empty_model(hf_dir: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of config.json with uninitialised parameters, but with its buffers (rotary frequencies) computed."""
    try:
        config = AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
        with no_init_weights(), device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{hf_dir}: transformers cannot build a causal language model from it ({reason})"
        ) from None
    model.tie_weights()  # no_init_weights skips this too
    return model.eval().requires_grad_(False)


def eos_ids(hf_dir: Path, tokenizer_eos: int | None) -> list[int]:
    """End-of-sequence ids of generation_config.json, config.json and the tokenizer together (chat models often name the
    end of a turn in only one of them), the tokenizer's first.

    Raises:
        CheckpointError: none of them names one.
    """
    hf_dir, found = hf_dir_of(hf_dir), [] if tokenizer_eos is None else [tokenizer_eos]
    for name in ("generation_config.json", "config.json"):
        if (hf_dir / name).is_file():
            value = json.loads((hf_dir / name).read_text()).get("eos_token_id")
            found += value if isinstance(value, list) else [] if value is None else [value]
    if not found:
        raise CheckpointError(f"{hf_dir}: neither tokenizer nor config names an end-of-sequence token (eos_token_id)")
    return list(dict.fromkeys(found))


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))
