"""From a Hugging Face directory to a Megatron checkpoint (torch_dist), file by file, without ever holding the model.

    OUT/latest_checkpointed_iteration.txt      "release"
    OUT/release/.metadata, metadata.json       where each chunk of each tensor is; mcore reads it at any layout
    OUT/release/__0_0.distcp ..                the chunks
    OUT/release/common.pt, run_config.yaml     the model's settings, for Megatron-LM and Megatron-Bridge
    OUT/hf/                                    config, tokenizer, chat template: what a return trip needs
    OUT/conversion.json                        manifest: names, shapes, dtypes, checksums

One layout on disk serves all: mcore cuts and pads while it loads. A tensor is stored in chunks of at most 64 MiB, so that a
rank that needs an eighth of it does not read it all.
"""

from __future__ import annotations

import io
import itertools
import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints_conversion.architecture import Architecture, Sharding
from checkpoints_conversion.convert.blocks import Rectangle, cut_rows, rectangle_blocks
from checkpoints_conversion.convert.checks import check_chunks
from checkpoints_conversion.convert.hf_files import pack
from checkpoints_conversion.convert.jobs import Records, publish, run_job
from checkpoints_conversion.convert.memory import peak_bytes
from checkpoints_conversion.convert.options import Options, Summary
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.convert.stored_names import canonical_place, extra_state_keys, second_key
from checkpoints_conversion.convert.targets import fingerprint, is_complete, prepare_target
from checkpoints_conversion.families import mappings_for
from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.formats import copy_companions, model_architecture, open_source, weight_format
from checkpoints_conversion.interop import RUN_CONFIG, TRACKER, common_state, run_config_yaml
from checkpoints_conversion.mappings import Mapping
from checkpoints_conversion.reader import check_tensors
from checkpoints_conversion.tokenizer import check_tokenizer
from checkpoints_conversion.torch_dist import (
    Chunk,
    ChunkWriter,
    StoredObject,
    StoredTensor,
    write_common,
    write_metadata,
)
from oprd_megatron.errors import CheckpointError, LayoutError

CHUNK_BYTES = 64 * 2**20
MIN_FILES = 32
"""Files are made small enough to be this many, so that several processes have something to do; but not smaller than a chunk."""
RELEASE = "release"
COMPANIONS = "hf"
OBJECTS_FILE = "__0_objects.distcp"


@dataclass(frozen=True)
class PlannedChunk:
    """One chunk of one stored tensor: where it goes, and what it is made of."""

    key: str
    shape: tuple[int, ...]
    """Of the whole stored tensor, layer and expert axes first."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    rectangle: Rectangle

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * ITEMSIZE[self.dtype]


class ImportJob:
    """Writes the `.distcp` files of a checkpoint."""

    def __init__(self, hf_dir: Path, arch: Architecture, options: Options, source: TensorSource) -> None:
        self._hf_dir = hf_dir
        self._files = list(_plan_files(arch, options, source))
        self.file_names = [f"{RELEASE}/{name}" for name, _ in self._files]
        self.identity = {
            "kind": "import",
            "source": str(hf_dir.resolve()),
            "files": fingerprint(source.files),
            "dtype": options.dtype,
            "max_shard_size": options.max_shard_bytes,
            "vocabulary multiple": options.vocab_multiple,
            "layout": [options.tp, options.pp],
        }
        self._source: TensorSource | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def num_segments(self, file: int) -> int:
        return 1

    def nbytes(self, file: int) -> int:
        return sum(chunk.nbytes for chunk in self._files[file][1])

    def begin(self, file: int, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)

    def write(self, file: int, segment: int, path: Path, advance: Callable[[int], None]) -> Records:
        if self._source is None:
            self._source = open_source(self._hf_dir)
        writer = ChunkWriter(path)
        try:
            return [self._write_chunk(writer, chunk, advance) for chunk in self._files[file][1]]
        finally:
            writer.close()

    def _write_chunk(self, writer: ChunkWriter, chunk: PlannedChunk, advance: Callable[[int], None]) -> dict[str, Any]:
        assert self._source is not None
        writer.begin(chunk.dtype, chunk.sizes)
        for block in rectangle_blocks(chunk.rectangle, self._source, chunk.dtype):
            writer.write(block)
            advance(len(block))
        start, length, crc32 = writer.end()
        return {
            "key": chunk.key,
            "shape": chunk.shape,
            "dtype": chunk.dtype,
            "offsets": chunk.offsets,
            "sizes": chunk.sizes,
            "start": start,
            "length": length,
            "crc32": crc32,
        }

    def check(self, path: Path, records: Records, advance: Callable[[int], None]) -> None:
        check_chunks(path, records, advance)


def import_hf(hf_dir: Path, out: Path, options: Options, progress: Progress) -> Summary:
    """Convert a Hugging Face directory to a Megatron checkpoint.

    Raises:
        CheckpointError: the source is broken or not understood, the output is in the way, the disk is full.
        LayoutError: the model does not divide by `tp` or `pp`.
    """
    arch = model_architecture(hf_dir)
    source = open_source(hf_dir)
    notes = check_tensors(source, arch, hf_dir, options.strict)
    job = ImportJob(hf_dir, arch, options, source)
    if options.resume and is_complete(out, job.identity):
        return Summary(str(out), 0, 0, 0, 0.0, ("complete already",))
    staging = prepare_target(hf_dir, out, options)
    with _torch_side() as torch_side:
        companions = torch_side.submit(_copy_companions, hf_dir, staging / COMPANIONS, arch, options.strict)
        records = run_job(job, staging, options.workers, progress, guard=lambda: _raise_early(companions))
        seconds, written = progress.seconds, progress.bytes
        if fingerprint(source.files) != job.identity["files"]:
            raise CheckpointError(f"{hf_dir}: was changed while it was converted; convert it again with --overwrite")
        tensors = _stored_tensors(records)
        notes += companions.result()
        more, process, held = torch_side.submit(_write_tables, staging / RELEASE, arch, options, tensors).result()
        progress.memory[process] = held
    (staging / TRACKER).write_text(RELEASE, encoding="utf-8")
    publish(staging, out, {"identity": job.identity, "files": records})
    nbytes = sum(job.nbytes(file) for file in range(len(job.file_names)))
    return Summary(str(out), len(tensors), nbytes, written, seconds, (*notes, *more))


def _torch_side() -> Executor:
    """Runs what needs torch or transformers: beside the conversion, in a process whose memory ends with it, unless torch is
    here already."""
    if "torch" in sys.modules:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _raise_early(check: Future[list[str]]) -> None:
    """End the conversion as soon as a check that runs beside it has failed."""
    if check.done():
        check.result()


def _plan_files(arch: Architecture, options: Options, source: TensorSource) -> Iterator[tuple[str, list[PlannedChunk]]]:
    """(file name, its chunks), for each rank of the layout the files that it would write."""
    whole = Sharding.smallest(arch, 0, options.tp, options.vocab_multiple)
    if whole.num_query_groups_padded != arch.num_query_groups:
        raise LayoutError(
            f"--tp {options.tp} does not divide {arch.num_query_groups} key/value heads; leave it out, mcore cuts when it loads"
        )
    whole.check(arch)
    if arch.num_layers % options.pp:
        raise LayoutError(
            f"--pp {options.pp} does not divide {arch.num_layers} layers; leave it out, mcore cuts when it loads"
        )
    table = [row for row in mappings_for(arch).values() if row.exported]
    total = sum(source_bytes(row, source, options) for row in table)
    limit = min(options.max_shard_bytes, max(CHUNK_BYTES, -(-total // MIN_FILES)))
    for stage in range(options.pp):
        rows = [row for row in table if _stage(row, arch, options.pp) == stage]
        for tp_rank in range(options.tp):
            sharding = replace(whole, tp_rank=tp_rank)
            chunks = [chunk for row in rows for chunk in _plan_chunks(row, arch, sharding, source, options)]
            rank = stage * options.tp + tp_rank
            for number, some in enumerate(pack(chunks, limit)):
                yield f"__{rank}_{number}.distcp", some


def _stage(row: Mapping, arch: Architecture, pp: int) -> int:
    """Pipeline stage that holds a parameter."""
    if row.megatron_name.startswith("decoder.layers."):
        return int(row.megatron_name.split(".")[2]) * pp // arch.num_layers
    return 0 if row.megatron_name.startswith("embedding.") else pp - 1


def _dtype_of(row: Mapping, source: TensorSource, options: Options) -> str:
    dtypes = {source.dtype(name) for name in row.hf_names}
    if options.dtype is None and len(dtypes) > 1:
        raise CheckpointError(
            f"{source.file_of(row.hf_names[0])}: {' and '.join(row.hf_names)} make one parameter but have dtypes "
            f"{', '.join(sorted(dtypes))}; choose one with --dtype"
        )
    return options.dtype or dtypes.pop()


def source_bytes(row: Mapping, source: TensorSource, options: Options) -> int:
    """Bytes of a parameter in the output, without padding."""
    numbers = sum(math.prod(shape) for shape in row.hf_shapes.values())
    return numbers * ITEMSIZE[_dtype_of(row, source, options)]


def _plan_chunks(
    row: Mapping, arch: Architecture, sharding: Sharding, source: TensorSource, options: Options
) -> Iterator[PlannedChunk]:
    """The chunks of one rank's shard of a parameter; none if another rank writes it."""
    if row.split_dim is None and sharding.tp_rank > 0:
        return
    num_experts = arch.experts.num_experts if arch.experts else None
    key, leading = canonical_place(row.megatron_name, arch.num_layers, num_experts)
    whole, dtype = row.shape(sharding), _dtype_of(row, source, options)
    width = math.prod(row.megatron_shape(sharding)[1:])
    rows_a_chunk = max(1, CHUNK_BYTES // (width * ITEMSIZE[dtype]))
    copies = row.shard_copies(sharding)
    second = second_key(row.megatron_name, num_experts)
    for part, written in itertools.product(row.parts(sharding), (key, second) if second else (key,)):
        for first in range(0, part.rows, rows_a_chunk):
            rows = min(rows_a_chunk, part.rows - first)
            local = part.row_local + first
            columns = () if len(whole) == 1 else ((part.columns or (0, whole[1]))[0],)
            yield PlannedChunk(
                written,
                shape=(*(size for _, size in leading), *whole),
                offsets=(*(index for index, _ in leading), part.row + first, *columns),
                sizes=(*(1 for _ in leading), rows, *(() if len(whole) == 1 else (width,))),
                dtype=dtype,
                rectangle=Rectangle(rows, width, cut_rows(copies, local, local + rows)),
            )


def _stored_tensors(files: dict[str, Records]) -> list[StoredTensor]:
    """What `.metadata` says, from the records of the files."""
    chunks: dict[str, list[Chunk]] = {}
    of_key: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, records in files.items():
        for record in records:
            of_key[record["key"]] = tuple(record["shape"]), record["dtype"]
            place = Chunk(
                tuple(record["offsets"]), tuple(record["sizes"]), Path(name).name, record["start"], record["length"]
            )
            chunks.setdefault(record["key"], []).append(place)
    return [StoredTensor(key, *of_key[key], tuple(found)) for key, found in chunks.items()]


def _copy_companions(hf_dir: Path, folder: Path, arch: Architecture, strict: bool) -> list[str]:
    """Config, tokenizer and templates, copied and checked; in a process of its own, for it needs transformers."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notes = copy_companions(hf_dir, folder)
    if weight_format(hf_dir) != "gguf":
        return notes + check_tokenizer(hf_dir, arch, strict)
    return notes + [note.replace(str(folder), str(hf_dir)) for note in check_tokenizer(folder, arch, strict)]


def _write_tables(
    release: Path, arch: Architecture, options: Options, tensors: list[StoredTensor]
) -> tuple[list[str], int, int]:
    """What makes the chunks a checkpoint, `metadata.json` last; in a process of its own, for it needs torch.

    Returns:
        What a user should know, one line each; this process, and the most bytes that it held.
    """
    dtype = _main_dtype(tensors)
    padded = next(tensor.shape[0] for tensor in tensors if tensor.key == "embedding.word_embeddings.weight")
    common, notes = common_state(
        arch, dtype, tp=options.tp, pp=options.pp, vocab_multiple=options.vocab_multiple, padded_vocab_size=padded
    )
    write_common(release, common)
    (release / RUN_CONFIG).write_text(run_config_yaml(arch, dtype, options.tp, options.pp, ep=1), encoding="utf-8")
    write_metadata(release, tensors, _write_objects(release / OBJECTS_FILE, arch))
    return notes, os.getpid(), peak_bytes()


def _write_objects(path: Path, arch: Architecture) -> list[StoredObject]:
    """The empty objects that mcore asks for beside the tensors."""
    import torch

    buffer = io.BytesIO()
    torch.save([None], buffer)
    path.unlink(missing_ok=True)
    with ChunkWriter(path) as writer:
        return [StoredObject(key, path.name, *writer.write_object(buffer.getvalue())) for key in extra_state_keys(arch)]


def _main_dtype(tensors: list[StoredTensor]) -> str:
    """The dtype of most numbers."""
    numbers: dict[str, int] = {}
    for tensor in tensors:
        numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(numbers, key=lambda dtype: numbers[dtype])
