"""Servers that run already: are they there, and were they started for this student? Asked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from oprd_megatron.errors import ConfigError
from oprd_megatron.rollout.tokenizer import PROBE
from oprd_megatron.rollout.vllm.client import MalformedReply, RequestRefused, ServerClient, ServerError

CHECK_SECONDS = 60.0
SERVE = "start it with `oprd rollout serve`"


def check_servers(
    clients: Sequence[ServerClient],
    student_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
) -> None:
    """Refuse servers that cannot write this student's text.

    What a server does not tell, such as the shapes of its weights, is compared when weights are sent.

    Args:
        clients: one a server.
        student_dir: the student's directory. A server's model must have its name; the path before it may differ, since the
            server may be another machine.
        tokenizer: the student's.
        context: tokens of the longest prompt with its response.

    Raises:
        UserError: one does not fit; the message names it and says in what.
    """
    for client in clients:
        _check_reachable(client)
        _check_model(client, student_dir, context)
        _check_tokenizer(client, student_dir, tokenizer)
        _check_options(client)


def _check_reachable(client: ServerClient) -> None:
    try:
        client.get("/health", CHECK_SECONDS)
    except ServerError as error:
        raise ServerError(f"rollout.server: {error}; {SERVE}, or correct its url") from None


def _check_model(client: ServerClient, student_dir: Path, context: int) -> None:
    reply = client.get("/v1/models", CHECK_SECONDS)
    try:
        card = reply["data"][0]
        name, served, held = str(card["id"]), str(card.get("root") or card["id"]), int(card["max_model_len"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise MalformedReply(f"{client.url}: /v1/models is not as vLLM writes it; {SERVE}") from None
    wanted = student_dir.resolve().name
    if wanted not in (Path(name).name, Path(served).name):
        raise ConfigError(
            f"rollout.server: {client.url} serves {served!r}, and student.path is {wanted!r}; {SERVE} on the student, or "
            "copy it there under the same name"
        )
    if held < context:
        raise ConfigError(
            f"rollout.server: {client.url} has a context of {held} tokens, but the longest prompt with its response has "
            f"{context}; set rollout.vllm.max_model_len: {context} where it is started, or lower max_response_tokens or "
            "prompts.max_tokens"
        )


def _check_tokenizer(client: ServerClient, student_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    theirs = client.post("/tokenize", {"prompt": PROBE, "add_special_tokens": False}, CHECK_SECONDS).get("tokens")
    mine = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if theirs != mine:
        count = len(theirs) if isinstance(theirs, list) else 0
        raise ConfigError(
            f"rollout.server: {client.url} has another tokenizer than {student_dir}: {PROBE[:27]!r}.. is {count} tokens there "
            f"and {len(mine)} here, or other ids; {SERVE} on the student's directory"
        )


def _check_options(client: ServerClient) -> None:
    try:
        client.get("/weight_info", CHECK_SECONDS)
        options = client.get("/server_info?config_format=json", CHECK_SECONDS)["vllm_config"]
        transfer, logprobs = options["weight_transfer_config"], options["model_config"]["logprobs_mode"]
    except RequestRefused:
        raise ConfigError(
            f"rollout.server: {client.url} has no routes for weights (VLLM_SERVER_DEV_MODE=1 opens them); {SERVE}"
        ) from None
    except (KeyError, TypeError):
        raise MalformedReply(f"{client.url}: /server_info is not as vLLM 0.32 writes it; {SERVE}") from None
    if transfer is None:
        raise ConfigError(
            f"rollout.server: {client.url} was started without --weight-transfer-config, so it takes no weights; {SERVE}"
        )
    if logprobs != "processed_logprobs":
        raise ConfigError(
            f"rollout.server: {client.url} has logprobs_mode {logprobs!r}, which leaves out the temperature; {SERVE}, or with "
            "--logprobs-mode processed_logprobs"
        )
