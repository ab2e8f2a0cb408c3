"""Kill one of two real vLLM servers with -9 in the middle of a generation, again and again, and count what came back.

    python tools/kill_servers.py models/smollm2-135m-instruct --vllm-python .venv-vllm/bin/python --kills 20

Each round starts a generation over both servers, kills one when it has been asked, takes all responses, starts the server again
and sends weights to both. Greedy text must be that of an undisturbed generation (in fp32 a batch of another size may still
decide a tie of two tokens differently: the table counts such responses). At the end the rate of one server and of two.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoints_conversion import HFReader, check_model, mappings_for
from oprd_megatron.config.rollout import RolloutConfig
from oprd_megatron.errors import UserError
from oprd_megatron.rollout.engine import Request, Rollout, SamplingParams
from oprd_megatron.rollout.hf_engine import eos_ids
from oprd_megatron.rollout.prompts import Prompt
from oprd_megatron.rollout.tokenizer import load_tokenizer
from oprd_megatron.rollout.vllm.client import ServerClient, Vocabulary
from oprd_megatron.rollout.vllm.processes import ServerProcess, start_server, wait_ready
from oprd_megatron.rollout.vllm.server_checks import check_servers
from oprd_megatron.rollout.vllm.server_engine import ServerEngine
from oprd_megatron.rollout.vllm.weight_transfer import SHARED_MEMORY, BucketSender, TransferFolder

HOST, CONTEXT, NUM_SERVERS, MIB = "127.0.0.1", 1024, 2, 2**20
KILL_SECONDS = 120.0


class Rounds:
    """Two servers, an engine on them, and one set of requests.

    Args:
        model_dir: the student.
        config: `rollout`.
        num_prompts: requests in a generation.
        logs: folder for the servers' output.
    """

    def __init__(self, model_dir: Path, config: RolloutConfig, num_prompts: int, logs: Path) -> None:
        self.model_dir, self.config, self.logs = model_dir, config, logs
        self.architecture = check_model(model_dir)
        tokenizer = load_tokenizer(model_dir)
        vocabulary = Vocabulary(self.architecture.vocab_size, tuple(eos_ids(model_dir, tokenizer.eos_token_id)))
        self.params = SamplingParams(temperature=0.0, max_response_tokens=config.max_response_tokens)
        texts = [f"Tell me a story about the number {number}." for number in range(num_prompts)]
        chats = [[{"role": "user", "content": text}] for text in texts]
        ids: list[Any] = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
        ]
        self.requests = [
            Request(Prompt(index, text, tuple(prompt)), index)
            for index, (text, prompt) in enumerate(zip(texts, ids, strict=True))
        ]
        self.servers = [self.start(index) for index in range(NUM_SERVERS)]
        try:
            wait_ready(self.servers, config.server.ready_seconds)
            clients = [ServerClient(server.url, vocabulary) for server in self.servers]
            check_servers(clients, model_dir, tokenizer, max(map(len, ids)) + config.max_response_tokens)
            sender = BucketSender(clients, TransferFolder(SHARED_MEMORY), config.server.bucket_bytes, 300)
            self.engine = ServerEngine(clients, config, sender)
        except BaseException:
            self.stop()
            raise
        self.version = 0

    def start(self, index: int) -> ServerProcess:
        """Start server `index`; it is not ready yet."""
        port = self.config.server.port + index
        log = self.logs / f"server-{port}.log"
        return start_server(
            self.model_dir, self.config.vllm, self.config.server, HOST, port, log, "fp32", CONTEXT, seed=0
        )

    def stop(self) -> None:
        """End the servers."""
        for server in self.servers:
            server.stop()

    def sync(self) -> None:
        """Send the student's weights to all servers that answer."""
        self.version += 1
        self.engine.update_weights(self.version, self._tensors())

    def undisturbed(self) -> tuple[list[Rollout], float]:
        """A generation, and its tokens a second once the servers are warm."""
        self.engine.generate(self.requests, self.params, 0)
        begun = time.perf_counter()
        rollouts = self.engine.generate(self.requests, self.params, 0)
        return rollouts, sum(len(rollout.response_ids) for rollout in rollouts) / (time.perf_counter() - begun)

    def kill(self, index: int) -> tuple[list[Rollout], int]:
        """A generation with a kill in its middle; its responses, and how many were asked again."""
        writing = self.engine.start(self.requests, self.params, 0)
        deadline = time.monotonic() + KILL_SECONDS
        while writing.last_token == writing.started:
            if time.monotonic() > deadline:
                raise UserError(f"no token came for {KILL_SECONDS:g} s; look at the logs in {self.logs}")
            time.sleep(0.02)
        time.sleep(1.0)
        os.killpg(self.servers[index].pid, signal.SIGKILL)
        return writing.take(), writing.num_asked_again

    def restart(self, index: int) -> None:
        """Bring a killed server back, weights and all."""
        self.servers[index].stop()
        self.servers[index] = self.start(index)
        wait_ready([self.servers[index]], self.config.server.ready_seconds)
        self.sync()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        with HFReader(self.model_dir) as reader:
            for mapping in mappings_for(self.architecture).values():
                for name, shape in mapping.hf_shapes.items() if mapping.exported else ():
                    yield name, reader.read(name, 0, shape[0])


def run(rounds: Rounds, kills: int) -> bool:
    """Print the table; whether nothing was lost or came twice."""
    rounds.sync()
    calm, rate_of_two = rounds.undisturbed()
    expected = {rollout.sample_index: rollout.response_ids for rollout in calm}
    print("kill  asked  answered  twice  lost  asked again  other text  servers left  seconds", flush=True)
    is_good = True
    for number in range(kills):
        begun = time.perf_counter()
        rollouts, again = rounds.kill(number % NUM_SERVERS)
        seconds, left = time.perf_counter() - begun, len(rounds.engine.fleet.alive)
        times = Counter(rollout.sample_index for rollout in rollouts)
        twice, lost = sum(count > 1 for count in times.values()), len(expected.keys() - times.keys())
        other = sum(rollout.response_ids != expected[rollout.sample_index] for rollout in rollouts)
        is_good = is_good and not twice and not lost
        print(
            f"{number + 1:4}  {len(expected):5}  {len(rollouts):8}  {twice:5}  {lost:4}  {again:11}  {other:10}  {left:12}  "
            f"{seconds:7.1f}",
            flush=True,
        )
        rounds.restart(number % NUM_SERVERS)
    rounds.servers[1].stop()
    rounds.sync()  # the other one stays
    _, rate_of_one = rounds.undisturbed()
    print(f"tokens/s: one server {rate_of_one:.1f}, two {rate_of_two:.1f} on {os.cpu_count()} cores")
    return is_good


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory of the student")
    parser.add_argument("--vllm-python", type=Path, required=True, help="Python of an environment with vLLM")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of a response, at most")
    parser.add_argument("--port", type=int, default=8300)
    args = parser.parse_args()
    config = RolloutConfig.model_validate(
        {
            "engine": "vllm_server",
            "prompts": {"path": "unused.jsonl"},
            "max_response_tokens": args.tokens,
            "vllm": {"enforce_eager": True},
            "server": {"python": args.vllm_python, "port": args.port, "bucket_bytes": 64 * MIB},
        }
    )
    try:
        with tempfile.TemporaryDirectory() as logs:
            rounds = Rounds(args.model, config, args.prompts, Path(logs))
            try:
                is_good = run(rounds, args.kills)
            finally:
                rounds.engine.close()
                rounds.stop()
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
