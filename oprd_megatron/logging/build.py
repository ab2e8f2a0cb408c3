"""From the config's `logging` section to loggers. A tracker's package is imported only where it is asked for, on rank 0."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from oprd_megatron.config import RunConfig
from oprd_megatron.config.logging import LoggingConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.logging.base import Logger, Loggers
from oprd_megatron.logging.jsonl import METRICS_FILE, JsonlLogger
from oprd_megatron.logging.progress import ProgressLogger

NEEDED = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""{tracker, which is also the name of its extra: packages}."""


def check_trackers(settings: LoggingConfig) -> None:
    """Whether what is asked for is installed.

    Raises:
        ConfigError: it is not.
    """
    asked = {"tensorboard": settings.tensorboard is True, "wandb": settings.wandb, "mlflow": settings.mlflow}
    for tracker, wanted in asked.items():
        missing = [package for package in NEEDED[tracker] if wanted and find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"logging.{tracker}: needs {missing[0]}, which is not installed; run `pip install 'oprd-megatron[{tracker}]'`, "
                "or leave it out"
            )


def open_loggers(config: RunConfig, step: int | None) -> Loggers:
    """Every logger of a run whose directory is there. For rank 0.

    Args:
        config: of the run.
        step: that it goes on after; None where it starts.

    Raises:
        UserError: a tracker cannot be reached.
    """
    folder, settings, resume = config.run.dir, config.logging, step is not None
    values: dict[str, Any] = config.model_dump(mode="json")
    loggers: list[Logger] = [JsonlLogger(folder / METRICS_FILE)]
    if settings.tensorboard is True or (settings.tensorboard == "auto" and find_spec("tensorboard")):
        from oprd_megatron.logging.tensorboard import TensorBoardLogger

        loggers.append(TensorBoardLogger(folder / "tensorboard"))
    if settings.wandb is not None:
        from oprd_megatron.logging.wandb import WandbLogger

        loggers.append(WandbLogger(settings.wandb, folder, values, resume))
    if settings.mlflow is not None:
        from oprd_megatron.logging.mlflow import MlflowLogger

        loggers.append(MlflowLogger(settings.mlflow, folder, values, resume))
    if settings.progress:
        loggers.append(ProgressLogger(config.run.steps))
    whole = Loggers(loggers)
    whole.truncate_after(-1 if step is None else step)
    return whole
