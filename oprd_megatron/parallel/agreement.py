"""Ranks that fail together: one rank's error becomes every rank's error, instead of a hang of the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from oprd_megatron.errors import UserError
from oprd_megatron.parallel.activity import here


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Run a block on every rank; if a `UserError` or `OSError` stops it on any, raise on all the error of the first rank.

    The block holds no collectives that another rank could be waiting in. Collective: one all-gather of short strings.

    Args:
        what: what was being done, for errors of the operating system.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as problem:
        error = problem
    except OSError as problem:
        error = UserError(f"{what}: {problem.strerror or problem} ({problem.filename}); make room or fix the path")
    found: list[Any] = [None] * dist.get_world_size()
    with here.waiting():
        dist.all_gather_object(found, error)
    for reported in found:
        if reported is not None:
            raise reported
