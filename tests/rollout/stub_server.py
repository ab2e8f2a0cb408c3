"""A server that speaks vLLM's routes and writes a hash of prompt and seed, slowly: run as a process, `StubServer` from tests.

What it writes depends on prompt and seed alone, as a real server's text does. POST /stub changes how it behaves, GET /stub says
what it saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

VOCAB_SIZE, EOS, MOST_TOKENS = 1000, 2, 40


def response_of(prompt: list[int], seed: int, limit: int = MOST_TOKENS) -> list[int]:
    """The ids that the stub writes: up to `limit`, the last one EOS if it comes before."""
    rng = random.Random(hashlib.sha256(f"{prompt} {seed}".encode()).digest())
    return [*(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(4, MOST_TOKENS))), EOS][:limit]


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Stub:
    """The server's side."""

    def __init__(self, port: int, settings: dict) -> None:
        self.port = port
        self.settings: dict = {
            "version": "none",
            "token_seconds": 0.0,
            "fault": None,  # see `_piece` and `complete`
            "fault_share": 1.0,  # of the completions
            "fault_after": 2,  # tokens
            "health": 200,
            "max_model_len": 4096,
            "model": "stub",
            "tokens": [],  # of every text
            "dev_mode": True,
            **settings,
        }
        self.rng = random.Random(port)
        self.inflight: dict[int, int] = {}
        self.seen = {"num_asked": 0, "most_inflight": 0, "num_inflight": 0, "num_left": 0, "fewest_tokens": 10**9}

    async def serve(self) -> None:
        server = await asyncio.start_server(self.talk, "127.0.0.1", self.port)
        print("ready", flush=True)
        await server.serve_forever()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                _, path, _ = head.decode().split(" ", 2)
                fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                if path == "/v1/completions" and json.loads(body).get("stream"):
                    await self.watch(self.complete(json.loads(body), writer), reader)
                else:
                    self.answer(writer, *self.route(path, json.loads(body or b"{}")))
                await writer.drain()
        writer.close()

    async def watch(self, work, reader: asyncio.StreamReader) -> None:
        """Stop writing as soon as the client closes the connection, as vLLM does."""
        task, left = asyncio.ensure_future(work), asyncio.ensure_future(reader.read(1))
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if left.done():
            self.seen["num_left"] += not task.done()
            task.cancel()
            await asyncio.wait([task])
            raise ConnectionResetError from left.exception()
        left.cancel()
        await asyncio.wait([left])
        await task

    def route(self, path: str, body: dict) -> tuple[int, object]:
        settings = self.settings
        if path == "/stub":
            settings.update(body)
            return 200, {**self.seen, "num_inflight": len(self.inflight), "settings": settings}
        if path == "/health":
            return settings["health"], None
        if path == "/weight_info" and settings["dev_mode"]:
            return 200, {"weight_version": settings["version"]}
        if path == "/v1/models":
            card = {"id": settings["model"], "root": settings["model"], "max_model_len": settings["max_model_len"]}
            return 200, {"object": "list", "data": [card]}
        if path == "/tokenize":
            return 200, {"tokens": settings["tokens"], "max_model_len": settings["max_model_len"]}
        if path == "/server_info?config_format=json" and settings["dev_mode"]:
            return 200, settings.get("server_info", {})
        if path == "/collective_rpc" and "held" in settings:
            return 200, {"results": settings["held"]}
        if path == "/v1/completions":  # to score
            return 200, settings.get("scores", {"choices": []})
        return 404, {"detail": "Not Found"}

    def answer(self, writer: asyncio.StreamWriter, status: int, reply: object) -> None:
        data = b"" if reply is None else json.dumps(reply).encode()
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(data)) + data)

    async def complete(self, body: dict, writer: asyncio.StreamWriter) -> None:
        number = self.seen["num_asked"] = self.seen["num_asked"] + 1
        self.inflight[number] = len(body["prompt"]) + body["max_tokens"]
        self.seen["most_inflight"] = max(self.seen["most_inflight"], sum(self.inflight.values()))
        self.seen["fewest_tokens"] = min(self.seen["fewest_tokens"], body["max_tokens"])
        try:
            await self.write(body, writer)
        finally:
            del self.inflight[number]

    async def write(self, body: dict, writer: asyncio.StreamWriter) -> None:
        fault = self.settings["fault"] if self.rng.random() < self.settings["fault_share"] else None
        if isinstance(fault, list):
            fault = self.rng.choice(fault)
        if fault == "error500":
            return self.answer(writer, 500, {"error": {"message": "the engine is unwell"}})
        if fault == "refuse":
            return self.answer(writer, 400, {"error": {"message": "this prompt cannot be"}})
        ids = response_of(body["prompt"], body["seed"], body["max_tokens"])
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for place, token in enumerate(ids):
            await asyncio.sleep(self.settings["token_seconds"])
            is_faulty = fault is not None and place == min(self.settings["fault_after"], len(ids) - 1)
            if is_faulty and fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if is_faulty and fault == "reset":
                writer.transport.abort()
                raise ConnectionResetError
            if is_faulty and fault == "hang":
                while True:  # a keep-alive comment is no token
                    await self.chunk(writer, ": still here\n\n")
                    await asyncio.sleep(0.05)
            ended = None if place < len(ids) - 1 else "stop" if token == EOS else "length"
            event = self.piece(token, ended, fault if is_faulty else None)
            await self.chunk(writer, f"data: {event}\n\n")
            if is_faulty and fault == "end":
                break
        await self.chunk(writer, "data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    def piece(self, token: int, ended: str | None, fault: str | None) -> str:
        choice: dict = {
            "token_ids": [token],
            "logprobs": {"token_logprobs": [-token / VOCAB_SIZE]},
            "finish_reason": ended,
        }
        if fault == "malformed":
            return '{"choices": [{"tok'
        if fault == "few_logprobs":
            choice["logprobs"] = {"token_logprobs": []}
        if fault == "nan":
            choice["logprobs"] = {"token_logprobs": [None]}  # as vLLM writes it
        if fault == "nan_literal":
            choice["logprobs"] = {"token_logprobs": [float("nan")]}
        if fault == "positive":
            choice["logprobs"] = {"token_logprobs": [0.5]}
        if fault == "unknown_id":
            choice["token_ids"] = [VOCAB_SIZE]
        if fault == "not_an_id":
            choice["token_ids"] = ["7"]
        if fault == "cut":
            choice["finish_reason"] = "length"
        if fault == "abort":
            choice["finish_reason"] = "abort"
        if fault == "wrong_eos":
            choice["finish_reason"] = "stop"
        if fault == "error":
            return json.dumps({"error": {"message": "out of memory"}})
        return json.dumps({"choices": [choice]})

    async def chunk(self, writer: asyncio.StreamWriter, text: str) -> None:
        data = text.encode()
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()


class StubServer:
    """The test's side: a stub as a process, which can be killed and started again on its port."""

    def __init__(self, port: int, **settings: object) -> None:
        self.port, self.settings, self.url = port, settings, f"http://127.0.0.1:{port}"
        self.start()

    def start(self, **settings: object) -> None:
        program = [sys.executable, "-S", __file__, str(self.port), json.dumps({**self.settings, **settings})]
        self.process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def say(self, **settings: object) -> dict:
        """Change settings, and hear what it saw."""
        talk = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        talk.request("POST", "/stub", json.dumps(settings))
        reply = json.loads(talk.getresponse().read())
        talk.close()
        return reply

    def wait_until_asked(self, num: int, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while self.say()["num_asked"] < num:
            assert time.monotonic() < deadline, "the stub was not asked"
            time.sleep(0.005)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(Stub(int(sys.argv[1]), json.loads(sys.argv[2])).serve())
