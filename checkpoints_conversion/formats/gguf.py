"""A GGUF model as a source of Hugging Face tensors: other names, and what llama.cpp changed in the values undone.

    llama    rows of q and k are permuted within each head: HF (half, i), two halves of H/2, is GGUF (i, half)
    gemma3   norms hold 1 + w

Both are undone as transformers does it, on fp32. Quantised weights come out as F32; F32, F16 and BF16 as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families import FAMILIES
from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.formats.gguf_config import gguf_config
from checkpoints_conversion.formats.gguf_file import BLOCK_BYTES, PLAIN_DTYPES, GGUFTensor
from checkpoints_conversion.formats.gguf_model import GGUFModel

USED_UP = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that became a part of the config."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class _Weight:
    """One Hugging Face tensor in a GGUF file."""

    gguf_name: str
    info: GGUFTensor
    head_rows: int = 1
    """Rows of a head, if they are permuted."""
    one_added: bool = False

    @property
    def dtype(self) -> str:
        return "F32" if self.one_added else self.info.dtype


class GGUFSource(TensorSource):
    """The tensors of one GGUF model. Those that the family does not know keep their GGUF names."""

    def __init__(self, path: Path) -> None:
        """Open a model by any of its files.

        Raises:
            CheckpointError: a file is missing or damaged, or the model is not understood.
        """
        self._model = GGUFModel(path)
        try:
            self.config = gguf_config(self._model)
            arch = FAMILIES[self.config["model_type"]].translate(self.config, self._model.path)
            self._weights = _weights(self._model, arch)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._weights)

    @property
    def files(self) -> list[Path]:
        return self._model.files

    def file_of(self, name: str) -> Path:
        return self._model.file_of(self._weights[name].gguf_name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].info.shape

    def dtype(self, name: str) -> str:
        return self._weights[name].dtype

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        weight = self._weights[name]
        size = ITEMSIZE[weight.dtype]
        if not out.nbytes:
            return
        if len(weight.info.shape) == 1:  # one row of the file
            (whole,) = self._blocks(weight, 0, 1)
            out[:] = whole[0, row * size : (row + rows) * size].tobytes()
            return
        left, right = columns or (0, weight.info.shape[1])
        target = np.frombuffer(out, np.uint8).reshape(rows, (right - left) * size)
        done = 0
        for block in self._blocks(weight, row, rows):
            target[done : done + len(block)] = block[:, left * size : right * size]
            done += len(block)

    def close(self) -> None:
        self._model.close()

    def _blocks(self, weight: _Weight, row: int, rows: int) -> Iterator[np.ndarray]:
        """Bytes [n, bytes of a row] of the Hugging Face tensor's rows, some at a time."""
        unit, width = weight.head_rows, weight.info.shape[-1]
        step = max(1, BLOCK_BYTES // (4 * width * unit)) * unit
        start, stop = row // unit * unit, -(-(row + rows) // unit) * unit
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = np.concatenate(list(self._model.rows(weight.gguf_name, first, last - first)))
            if weight.one_added:
                values = _as_fp32(values, weight.info.kind) - np.float32(1)
            block = values.view(np.uint8)
            if unit > 1:
                heads = block.reshape(-1, unit // 2, 2, block.shape[1])
                block = heads.swapaxes(1, 2).reshape(block.shape)
            yield block[max(row - first, 0) : row + rows - first]


def _as_fp32(values: np.ndarray, kind: str) -> np.ndarray:
    if kind not in PLAIN_DTYPES:
        return values
    if kind == "BF16":
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.view(np.float16 if kind == "F16" else np.float32).astype(np.float32)


def _weights(model: GGUFModel, arch: Architecture) -> dict[str, _Weight]:
    """Every tensor of a model by its Hugging Face name."""
    tensors = model.tensors
    gguf_names = _gguf_names(model.settings["general.architecture"], arch)
    found = {}
    for hf_name, gguf_name in gguf_names.items():
        info = tensors.pop(gguf_name, None)
        if info is not None:
            found[hf_name] = _weight(gguf_name, info, arch)
    return found | {name: _Weight(name, info) for name, info in tensors.items() if name not in USED_UP}


def _weight(gguf_name: str, info: GGUFTensor, arch: Architecture) -> _Weight:
    permuted = arch.family == "llama" and (".attn_q." in gguf_name or ".attn_k." in gguf_name)
    heads = arch.num_attention_heads if ".attn_q." in gguf_name else arch.num_query_groups
    if permuted and len(info.shape) == 2 and info.shape[0] == heads * arch.head_dim:
        return _Weight(gguf_name, info, head_rows=arch.head_dim)
    return _Weight(gguf_name, info, one_added=arch.zero_centred_norm and gguf_name.endswith("norm.weight"))


def _gguf_names(architecture: str, arch: Architecture) -> dict[str, str]:
    """GGUF name of every Hugging Face tensor of a model."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(number, 1)  # of one layer: that of 100 takes long
    names = {}
    for row in FAMILIES[arch.family].mappings(arch).values():
        for hf_name in row.hf_names:
            module, _, kind = hf_name.rpartition(".")
            layer = _LAYER.match(module)
            gguf_module = table.get_name(_LAYER.sub("model.layers.0.", module))
            if gguf_module is not None:
                if layer:
                    gguf_module = gguf_module.replace("blk.0.", f"blk.{layer[1]}.", 1)
                names[hf_name] = f"{gguf_module}.{kind}"
    return names
