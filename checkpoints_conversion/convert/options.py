"""What a user may choose about a conversion."""

from __future__ import annotations

import os
from dataclasses import dataclass

from checkpoints_conversion.architecture import VOCAB_MULTIPLE


@dataclass(frozen=True)
class Options:
    """The flags of `oprd convert`, for either direction."""

    dtype: str | None = None
    """Round weights to F32, F16 or BF16; None keeps each tensor's dtype."""
    max_shard_bytes: int = 5 * 10**9
    """A file is closed before it would become larger than this; a tensor that is larger has a file of its own."""
    workers: int = min(4, os.cpu_count() or 1)
    resume: bool = False
    """Continue an unfinished conversion; a complete one is left as it is."""
    overwrite: bool = False
    """Replace the output, or begin an unfinished conversion again."""
    strict: bool = True
    """Refuse what is not understood, where False only reports what cannot change the model."""
    vocab_multiple: int = VOCAB_MULTIPLE
    """The vocabulary is padded to a multiple of this times `tp` (Megatron's `--make-vocab-size-divisible-by`)."""
    tp: int = 1
    pp: int = 1
    """Cut the files as ranks of this layout read them. mcore loads any cut into any layout; a fitting one reads less."""


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    out: str
    tensors: int
    nbytes: int
    """Of weights in the output."""
    written: int
    """Of these, written now; the others were there from before."""
    seconds: float
    """Of copying."""
    notes: tuple[str, ...] = ()
    """What a user should know, one line each."""
