"""What a run directory says about where the run runs: versions, commit, hosts, and the plan of its layouts."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from oprd_megatron.config import RunConfig
from oprd_megatron.errors import UserError
from oprd_megatron.planning import plan_run, plan_text

PACKAGES = ("oprd-megatron", "torch", "megatron-core", "transformers", "transformer-engine", "vllm")


def world_hosts() -> list[str]:
    """The name of each rank's machine. Collective."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


def environment(config: RunConfig, hosts: list[str]) -> dict[str, Any]:
    """When and where this process started: {"started", "ranks", "hosts", "device", "python", "commit", "versions"}.

    `hosts` counts the ranks of each; `commit` is this project's, None outside of a git checkout. Nothing of the process's
    environment variables is in it.
    """
    uses_gpu = config.run.device != "cpu" and torch.cuda.is_available()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": len(hosts),
        "hosts": dict(Counter(hosts)),
        "device": torch.cuda.get_device_name() if uses_gpu else f"cpu ({platform.machine()})",
        "python": platform.python_version(),
        "commit": _commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def planned_text(config: RunConfig, hosts: list[str]) -> str:
    """What `oprd plan` says of this run, or why it says nothing: a run does not end for want of its plan."""
    try:
        return plan_text(plan_run(config, len(hosts), max(Counter(hosts).values())))
    except UserError as error:
        return f"There is no plan: {error}"


def _commit() -> str | None:
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists() or shutil.which("git") is None:
        return None
    asked = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
