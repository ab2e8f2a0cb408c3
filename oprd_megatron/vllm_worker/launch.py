"""Runs vLLM's OpenAI-compatible server in this process, for as long as its owner lives.

    python -m oprd_megatron.vllm_worker.launch OWNER_PID VLLM_ARGUMENTS...

It must be the leader of its process group (`oprd_megatron.rollout.vllm.processes` starts it so).
"""

from __future__ import annotations

import os
import runpy
import sys

from oprd_megatron.vllm_worker.watch import SERVER_PID, die_with


def main() -> None:
    """Watch the owner, then become the server."""
    die_with(int(sys.argv.pop(1)))
    os.environ[SERVER_PID] = str(os.getpid())
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
