"""Every byte of a model's weights against the checksums that were taken when it was written.

A converted directory has them in conversion.json. Other Megatron checkpoints have one for each chunk in its zip container,
unless torch was told to leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_conversion.convert.checks import check_chunks
from checkpoints_conversion.convert.hf_files import check_hf_file
from checkpoints_conversion.convert.hf_to_megatron import RELEASE
from checkpoints_conversion.convert.jobs import MANIFEST
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.convert.targets import read_manifest
from checkpoints_conversion.files.messages import reason
from checkpoints_conversion.interop import find_checkpoint_dir, is_megatron
from checkpoints_conversion.torch_dist import TorchDistReader
from oprd_megatron.errors import CheckpointError


@dataclass
class Checked:
    """What was compared.

    Attributes:
        tensors: tensors, or chunks of them.
        files: that hold them.
        damaged: a line for each file that is not as it was written.
        unknown: chunks without a checksum.
    """

    tensors: int = 0
    files: int = 0
    damaged: list[str] = field(default_factory=list)
    unknown: int = 0

    def text(self) -> str:
        """For a person."""
        lines = [
            f"  checksums   {self.tensors} tensors or chunks in {self.files} files: {len(self.damaged)} files damaged"
        ]
        lines += [f"              {line}" for line in self.damaged]
        return "\n".join(lines + ([f"              {self.unknown} have no checksum"] if self.unknown else []))


def check_checksums(path: Path, progress: Progress) -> Checked:
    """Read all weights.

    Raises:
        CheckpointError: there is nothing to compare them with.
    """
    for place in (path, path.parent) if path.name == RELEASE else (path,):
        manifest = read_manifest(place) if place.is_dir() else None
        if manifest is not None:
            return _against_manifest(place, manifest["files"], progress)
    if not is_megatron(path):
        raise CheckpointError(f"{path}: has no {MANIFEST}, so there are no checksums; only converted models have them")
    return _against_containers(find_checkpoint_dir(path), progress)


def _against_manifest(place: Path, files: dict[str, list[dict[str, Any]]], progress: Progress) -> Checked:
    found = Checked(files=len(files), tensors=sum(len(records) for records in files.values()))
    progress.phase(
        "comparing checksums", sum((place / name).stat().st_size for name in files if (place / name).is_file())
    )
    for name, records in files.items():
        check: Callable[..., None] = check_chunks if name.endswith(".distcp") else check_hf_file
        try:
            check(place / name, records, progress.advance)
        except CheckpointError as error:
            found.damaged.append(str(error))
        except OSError as error:
            found.damaged.append(f"{place / name}: cannot be read ({error.strerror})")
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{place / MANIFEST}: is no manifest of these files ({reason(error)})") from None
    progress.close()
    return found


def _against_containers(directory: Path, progress: Progress) -> Checked:
    found = Checked()
    with TorchDistReader(directory) as reader:
        places = [(key, chunk) for key, tensor in reader.tensors.items() for chunk in tensor.chunks]
        found.tensors, found.files = len(places), len({chunk.file for _, chunk in places})
        progress.phase("comparing checksums", sum(chunk.length for _, chunk in places))
        damaged: dict[str, str] = {}
        for key, chunk in sorted(places, key=lambda place: (place[1].file, place[1].start)):
            for error in _check(reader, key, chunk, found):
                damaged.setdefault(chunk.file, error)
            progress.advance(chunk.length)
        found.damaged = list(damaged.values())
    progress.close()
    return found


def _check(reader: TorchDistReader, key: str, chunk: Any, found: Checked) -> Iterator[str]:
    try:
        found.unknown += not reader.check_chunk(key, chunk)
    except CheckpointError as error:
        yield str(error)
