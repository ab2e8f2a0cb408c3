"""Weights & Biases. Numbers are told under the names of `scalars.py`; the config and the last summary with them.

W&B itself finds the API key, and asks for it nowhere here. What the run prints, its code and its git state stay here.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Any

import wandb

from oprd_megatron.config.logging import WandbConfig
from oprd_megatron.errors import UserError
from oprd_megatron.logging.scalars import scalars
from oprd_megatron.logging.told import Told

STATE_FILE = "wandb.json"
messages = logging.getLogger(__name__)


class WandbLogger:
    """One W&B run.

    Args:
        settings: `logging.wandb`.
        run_dir: offline data and the run's id are kept here.
        config: of the run, for W&B's config tab.
        resume: go on in the W&B run that the directory knows of, if it knows one.

    Raises:
        UserError: W&B cannot be reached, or knows no API key.
    """

    def __init__(self, settings: WandbConfig, run_dir: Path, config: dict[str, Any], resume: bool) -> None:
        self._told = Told(run_dir / STATE_FILE, resume)
        run_id = self._told.run_id or uuid.uuid4().hex[:12]
        quiet = wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True)
        try:
            wandb.setup(quiet)  # from here on it does not ask a terminal for a key
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or run_dir.resolve().name,
                tags=settings.tags,
                id=run_id,
                resume="allow" if settings.mode == "online" else None,
                mode=settings.mode,
                dir=str(run_dir),
                settings=quiet,
            )
        except wandb.Error as error:
            first_line = str(error).splitlines()[0]
            raise UserError(
                f"logging.wandb: {first_line}; run `wandb login` or set WANDB_API_KEY, or use mode: offline"
            ) from None
        self._run.config.update(config, allow_val_change=True)
        self._told.begin(run_id)
        messages.info("W&B: %s", self._run.url or f"offline; upload with `wandb sync {Path(self._run.dir).parent}`")

    def log(self, record: dict[str, Any]) -> None:
        """See `Logger.log`. Records of one step lie in one row of W&B's history."""
        if not self._told.is_news(record):
            return
        self._run.log(scalars(record), step=record["step"])
        if record["kind"] == "summary":
            self._run.summary.update({key: value for key, value in record.items() if key not in ("kind", "step")})
        self._told.add(record)

    def truncate_after(self, step: int) -> None:
        """W&B takes nothing back: it keeps the steps above `step` as it was told of them first, and they are not told again."""

    def close(self) -> None:
        """See `Logger.close`. Waits for the upload of what is left."""
        self._run.finish()
