"""megatron-core's `torch_dist` checkpoints: read and written without torch, and without executing what they hold.

    .metadata        a pickle: which tensors there are, how each is cut into chunks, and where these lie
    *.distcp         the chunks; each is what `torch.save` writes for one tensor, one after the other
    common.pt        `torch.save` of a dict: what is no tensor, such as the iteration and the arguments
    metadata.json    names the format; written last, so a directory without it is an unfinished save

A tensor is global: layers, tensor-parallel and pipeline-parallel ranks are ways to cut it, and whoever loads cuts it
anew. So a checkpoint can be read, or written, a rectangle at a time, by any number of processes.

Layers of the package, each importing only those above it:
    pickles      a pickle as plain data and inert records
    container    the zip container of one chunk
    layout       `.metadata` as tensors and chunks, and chunks by rectangle
    reader       rectangles of tensors; `common.pt`
    writer       chunks as streams; the tables that publish a checkpoint (these two import torch when called)

Shapes here are global, in elements, with megatron-core's prepended axes: [80, 57344, 8192] for one weight of 80 layers.
Bytes are row-major and little-endian, as torch stores them.
"""

from checkpoints_conversion.torch_dist.layout import Chunk, StoredObject, StoredTensor
from checkpoints_conversion.torch_dist.pickles import Global, Record
from checkpoints_conversion.torch_dist.reader import TorchDistReader, read_common
from checkpoints_conversion.torch_dist.writer import ChunkWriter, write_common, write_metadata

__all__ = [
    "Chunk",
    "ChunkWriter",
    "Global",
    "Record",
    "StoredObject",
    "StoredTensor",
    "TorchDistReader",
    "read_common",
    "write_common",
    "write_metadata",
]
