"""Reading a Hugging Face directory: every check before the first byte of a weight, then rows on demand.

`check_model` answers "can this directory be loaded?" from config.json and the safetensors headers alone, in seconds for
any size of model. `HFReader` then reads rectangles of tensors, so a rank touches only what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families import mappings_for, read_architecture
from checkpoints_conversion.files.dtypes import TORCH_NAMES, WEIGHT_DTYPES
from checkpoints_conversion.files.json_file import read_json
from checkpoints_conversion.files.messages import shown
from checkpoints_conversion.files.safetensors_file import SafetensorsFile
from checkpoints_conversion.files.source import TensorSource
from oprd_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_NAME = 255
"""Bytes; more than a file system takes."""


class WeightFile(Protocol):
    """One open file of weights."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By name; each has a `shape`, and a `dtype` in safetensors' spelling."""

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None: ...

    def close(self) -> None: ...


class FilesSource(TensorSource):
    """Tensors in one or several files, in each of which a part of them lies."""

    def __init__(self, files: dict[Path, set[str]], open_file: Callable[[Path], WeightFile]) -> None:
        """Open every file.

        Args:
            files: of `weight_files`: what each is to hold, as far as known.

        Raises:
            CheckpointError: a file is broken, does not hold what the index says, or holds what another holds too.
        """
        self._file_of: dict[str, WeightFile] = {}
        self._files: list[WeightFile] = []
        try:
            for path, expected_names in files.items():
                self._add(open_file(path), expected_names)
        except BaseException:
            self.close()
            raise

    def _add(self, file: WeightFile, expected_names: set[str]) -> None:
        self._files.append(file)
        absent = sorted(expected_names - file.tensors.keys())
        if absent:
            raise CheckpointError(
                f"{file.path}: the index places {shown(absent[0])} here, but it is not; download both again"
            )
        for name in file.tensors:
            if name in self._file_of:
                raise CheckpointError(
                    f"{file.path}: {shown(name)} is in {self._file_of[name].path.name} as well; delete the stale file"
                )
            self._file_of[name] = file

    def close(self) -> None:
        """Let go of the files; the reader cannot read afterwards."""
        for file in self._files:
            file.close()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors in the directory."""
        return frozenset(self._file_of)

    @property
    def files(self) -> list[Path]:
        """All weight files."""
        return [file.path for file in self._files]

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor, from the header."""
        return self._file_of[name].tensors[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors spells it ("BF16"), from the header."""
        return self._file_of[name].tensors[name].dtype

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        """See `TensorSource`."""
        self._file_of[name].read_into(name, row, rows, columns, out)


class HFReader(FilesSource):
    """The safetensors of one Hugging Face directory. Use as a context manager: it keeps the files open."""

    def __init__(self, hf_dir: str | Path) -> None:
        """Open every weight file and read the headers.

        Raises:
            CheckpointError: the directory, the weights or a file named by the index is missing, unfinished or broken.
        """
        self.hf_dir = Path(hf_dir)
        super().__init__(weight_files(self.hf_dir), SafetensorsFile)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, name: str, row: int, rows: int, columns: tuple[int, int] | None = None) -> Tensor:
        """Rows `row:row + rows` of a tensor, or some of their columns, on the CPU in the file's dtype."""
        return read_rows(self, name, row, rows, columns)


def read_rows(source: TensorSource, name: str, row: int, rows: int, columns: tuple[int, int] | None = None) -> Tensor:
    """A rectangle of a source's tensor as a torch tensor, in the source's dtype."""
    import torch

    trailing = source.shape(name)[1:] if columns is None else (columns[1] - columns[0],)
    dtype = source.dtype(name)
    found = torch.empty((rows, *trailing), dtype=getattr(torch, TORCH_NAMES[dtype]))
    if found.numel():
        data = found.view(torch.uint8) if found.dim() else found
        source.read_into(name, row, rows, columns, memoryview(data.numpy().data).cast("B"))
    return found


def check_model(hf_dir: str | Path) -> Architecture:
    """Check a whole model directory without reading any weight.

    Raises:
        CheckpointError: what `read_architecture` and `check_tensors` refuse.
    """
    arch = read_architecture(hf_dir)
    with HFReader(hf_dir) as reader:
        check_tensors(reader, arch, reader.hf_dir)
    return arch


def check_tensors(source: TensorSource, arch: Architecture, where: Path, strict: bool = True) -> list[str]:
    """Compare names, shapes and dtypes in the files with what the family's table expects.

    Args:
        where: the model directory, for messages.
        strict: refuse tensors that no model of the family has; False: report them.

    Returns:
        What is left out, one line each.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape or not a float weight; it is named.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for mapping in mappings_for(arch).values():
        expected.update(mapping.hf_shapes)

    missing = [name for name in expected if name not in source.names]
    if missing and (fused := [name for name in sorted(source.names) if name.endswith(".experts.gate_up_proj")]):
        raise CheckpointError(
            f"{source.file_of(fused[0])}: {shown(fused[0])} holds all experts of a layer in one tensor; save the model as "
            "published, one tensor an expert: save_pretrained(dir, save_original_format=True)"
        )
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} tensors are missing, first {missing[0]}; download it again")
    unexpected = sorted(source.names - expected.keys())
    foreign = [name for name in unexpected if not _is_ignored(name)]
    if foreign and strict:
        raise CheckpointError(
            f"{source.file_of(foreign[0])}: {len(foreign)} tensors no {arch.family} model has, first {shown(foreign[0])}; "
            "check that config.json belongs to these weights"
        )
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.file_of(name)}: {name} is {list(source.shape(name))}, but config.json implies {list(shape)}; "
                "check that config.json belongs to these weights"
            )
        if source.dtype(name) not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{source.file_of(name)}: {name} is {source.dtype(name)}; quantized weights are not supported, "
                "use a float32, float16 or bfloat16 model"
            )
    return (
        [f"{len(unexpected)} tensors that the model does not use are left out, first {shown(unexpected[0])}"]
        if unexpected
        else []
    )


def _is_ignored(name: str) -> bool:
    """Tensors that some files hold and no model reads: old rotary buffers, the second copy of a tied head.

    Asked only about names that the table does not expect, so an untied head is never ignored.
    """
    return name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight"


def weight_files(hf_dir: Path, single: str = SINGLE_FILE, index: str = INDEX_FILE) -> dict[Path, set[str]]:
    """Every weight file, with the tensors the index says it holds (none known for a single file).

    transformers prefers the single file over an index, and so does this.

    Raises:
        CheckpointError: no weights, an unfinished download, a broken index, a file missing or outside the directory.
    """
    try:
        return _find_weight_files(hf_dir, single, index)
    except OSError as error:
        raise CheckpointError(f"{hf_dir}: cannot be read ({error.strerror}); check the path") from error


def _find_weight_files(hf_dir: Path, single: str, index: str) -> dict[Path, set[str]]:
    if not hf_dir.is_dir():
        raise CheckpointError(f"{hf_dir}: no such model directory; give the directory that holds config.json")
    unfinished = sorted(hf_dir.glob("*.incomplete"))
    if unfinished:
        raise CheckpointError(f"{unfinished[0]}: an unfinished download; finish it, or delete the file if it is stale")
    if (hf_dir / single).is_file():
        refuse_foreign_file(hf_dir / single, hf_dir)
        return {hf_dir / single: set()}
    if not (hf_dir / index).is_file():
        raise _no_weights(hf_dir)

    files: dict[Path, set[str]] = {}
    for name, file_name in sorted(_read_index(hf_dir / index).items()):
        files.setdefault(hf_dir / file_name, set()).add(name)
    absent = sorted(path for path in files if not path.is_file())
    if absent:
        raise CheckpointError(f"{absent[0]}: missing ({len(absent)} of {len(files)} shards are); finish the download")
    for path in files:
        refuse_foreign_file(path, hf_dir)
    return files


def refuse_foreign_file(path: Path, directory: Path) -> None:
    """Only files of the model directory are read. In a Hugging Face cache a snapshot's files are links to `blobs` beside it.

    Raises:
        CheckpointError: the file lies elsewhere, through a symbolic link or a name with `..` in it.
    """
    home, cache = directory.resolve(), directory.resolve().parent.parent / "blobs"
    if not any(path.resolve().is_relative_to(allowed) for allowed in (home, cache)):
        raise CheckpointError(f"{path}: leads out of its directory, to {path.resolve()}; copy the file in")


def _no_weights(hf_dir: Path) -> CheckpointError:
    if any(hf_dir.glob("pytorch_model*.bin*")):
        return CheckpointError(
            f"{hf_dir}: only pytorch_model.bin weights; rewrite them as safetensors once with "
            "transformers: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)"
        )
    return CheckpointError(f"{hf_dir}: neither {SINGLE_FILE} nor {INDEX_FILE}; finish the download")


def _read_index(path: Path) -> dict[str, str]:
    """`weight_map` of an index: file name by tensor name."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(f"{path}: no index: weight_map must be an object of file names; download it again")
    return weight_map


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= MAX_FILE_NAME
