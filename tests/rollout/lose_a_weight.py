"""A run whose engine gets a tensor that is not the trainer's, for an environment without pytest:

torchrun .. -m tests.rollout.lose_a_weight NAME CONFIG.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from oprd_megatron.config import load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries
from oprd_megatron.rollout import weight_sync


def losing(name: str) -> None:
    """From version 1 on, the tensor `name` is another on its way."""
    stream, calls = weight_sync.stream_hf_weights, []

    def broken(*args: Any) -> Iterator[tuple[str, Any]]:
        calls.append(1)
        for found, tensor in stream(*args):
            yield found, tensor + 0.05 if found == name and len(calls) > 1 else tensor

    weight_sync.stream_hf_weights = broken


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        from oprd_megatron.loop import train

        losing(sys.argv[1])
        train(load_config(sys.argv[2], []))
