"""Modules whose weights exist only while they run.

A model is built on torch's `meta` device, where parameters have shapes and no memory. A layer gets its weights just before
its forward and loses them just after it; of an embedding only the rows of the ids that occur are read; the head, often the
largest matrix of all, is applied to some of its rows at a time. What is computed is the modules' own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints_conversion.files.dtypes import TORCH_NAMES
from checkpoints_conversion.reader import read_rows
from checkpoints_conversion.verify.sides import Side

READ_BYTES = 16 * 2**20
HEAD_BYTES = 64 * 2**20
Fill = Callable[[str, Tensor], None]
"""`fill(name, parameter)`: put a parameter's values, given its name within the module, into memory."""
OnState = Callable[[int, Tensor], None]
"""(unit, states [N, D] in fp32): unit 0 is the embedding, 1 to L the layers, then final norm and logits."""


class Weights:
    """A side's tensors for a model to run with, rounded as the other side's are."""

    def __init__(self, side: Side, dtypes: dict[str, str], advance: Callable[[int], None]) -> None:
        """
        Args:
            side: the model.
            dtypes: what each tensor is rounded to, in safetensors' spelling.
            advance: told how many bytes were read.
        """
        self.names = side.names
        self._source, self._dtypes, self._advance = side.source, dtypes, advance

    def read(self, name: str, row: int, rows: int, columns: tuple[int, int] | None = None) -> Tensor:
        """See `read_rows`."""
        found = read_rows(self._source, name, row, rows, columns)
        self._advance(found.nbytes)
        return found.to(getattr(torch, TORCH_NAMES[self._dtypes[name]]))

    def copy_into(self, name: str, target: Tensor) -> None:
        """All of a tensor into one of its shape, some rows at a time."""
        step = max(1, READ_BYTES // max(1, target[:1].nbytes))
        for first in range(0, len(target), step):
            some = target[first : first + step]
            some.copy_(self.read(name, first, len(some)))

    def rows_of(self, name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Single rows [n, D] of a matrix."""
        return torch.cat([self.read(name, int(row), 1) for row in rows]).to(dtype)


def lend_weights(module: nn.Module, fill: Fill, dtype: torch.dtype) -> None:
    """Give a module on the meta device its weights for the length of every forward."""
    slots = [
        (owner, key, f"{prefix}.{key}" if prefix else key, parameter)
        for prefix, owner in module.named_modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None
    ]

    def before(module: nn.Module, arguments: Any) -> None:
        for owner, key, name, parameter in slots:
            weight = torch.empty(parameter.shape, dtype=dtype)
            fill(name, weight)
            owner._parameters[key] = nn.Parameter(weight, requires_grad=False)

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        for owner, key, _, parameter in slots:
            owner._parameters[key] = parameter

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def lend_rows(embedding: nn.Module, name: str, weights: Weights, dtype: torch.dtype) -> None:
    """Give an embedding the rows of the ids that it is called with, and ids that count within these."""
    whole = embedding._parameters["weight"]

    def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids, places = arguments[0].unique(return_inverse=True)
        module._parameters["weight"] = nn.Parameter(weights.rows_of(name, ids, dtype), requires_grad=False)
        return (places, *arguments[1:])

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        module._parameters["weight"] = whole

    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # it decides about gradients only, and is no row of these
    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after, always_call=True)


class StreamedHead(nn.Module):
    """Stands in for an output layer: applies it to some rows of its weight at a time, at some of the tokens."""

    def __init__(
        self, head: nn.Module, name: str, vocab_size: int, weights: Weights, dtype: torch.dtype, on_logits: OnLogits
    ) -> None:
        """
        Args:
            head: the layer, `torch.nn.Linear` or mcore's, whose output is a tuple.
            name: of its weight.
            vocab_size: rows of it, without padding.
            weights, dtype: of the model.
            on_logits: gets the logits [n, V] in fp32.
        """
        super().__init__()
        vars(head).pop("weight", None)  # mcore's tied layer has a plain attribute there, None
        self.head, self._name, self._vocab_size, self._weights = head, name, vocab_size, weights
        self._dtype, self._on_logits = dtype, on_logits
        self.positions: Tensor | slice = slice(None)
        """Which of the tokens."""

    def forward(self, hidden: Tensor, **ignored: Any) -> Any:
        """[.., D] -> [n, 1, V], within a tuple if the layer gives one."""
        tokens = hidden.reshape(-1, 1, hidden.size(-1))[self.positions]
        logits = torch.empty(len(tokens), self._vocab_size)
        step = max(1, HEAD_BYTES // (4 * hidden.size(-1)))
        for first in range(0, self._vocab_size, step):
            rows = self._weights.read(self._name, first, min(step, self._vocab_size - first)).to(self._dtype)
            self.head._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
            output = self.head(tokens)
            is_tuple = isinstance(output, tuple)
            logits[:, first : first + len(rows)] = (output[0] if is_tuple else output).flatten(0, 1)
            self.head._parameters["weight"] = None
        self._on_logits(logits)
        return (logits.unsqueeze(1), None) if is_tuple else logits.unsqueeze(1)


OnLogits = Callable[[Tensor], None]


def capture(module: nn.Module, unit: int, on_state: OnState) -> None:
    """Report a module's output, or the first of a tuple, as states [N, D]; one row a token, batch after batch."""

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        on_state(unit, states.reshape(-1, states.size(-1)).float())

    module.register_forward_hook(after)
