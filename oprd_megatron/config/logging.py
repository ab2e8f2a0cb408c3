"""What a run writes down, and which trackers it tells."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from oprd_megatron.config.base import Strict

Name = Annotated[str, Field(min_length=1)]
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""Of MLflow's stores; its folders of files it no longer writes."""


class WandbConfig(Strict):
    """Weights & Biases. The API key is W&B's own affair: `wandb login`, or WANDB_API_KEY. Needs oprd-megatron[wandb]."""

    project: Name = "oprd"
    """Project that the run is listed in."""
    entity: Name | None = None
    """User or team; left out, the account's default."""
    name: Name | None = None
    """Of the run; left out, the run directory's name."""
    tags: list[Name] = []  # noqa: RUF012 (pydantic copies it)
    """To find the run by."""
    mode: Literal["online", "offline"] = "online"
    """offline: write to <run.dir>/wandb alone; `wandb sync` uploads it later."""


class MlflowConfig(Strict):
    """MLflow. Passwords are MLflow's own affair: MLFLOW_TRACKING_USERNAME and its kin. Needs oprd-megatron[mlflow]."""

    experiment: Name = "oprd"
    """Experiment that the run is listed in; made if it is not there."""
    tracking_uri: Name | None = None
    """Server (https://..) or database (sqlite:///runs/mlflow.db); left out, <run.dir>/mlflow.db."""
    name: Name | None = None
    """Of the run; left out, the run directory's name."""
    tags: dict[Name, str] = {}  # noqa: RUF012
    """To find the run by."""

    @model_validator(mode="after")
    def _check_uri(self) -> MlflowConfig:
        """A check of the section, not of the field: what pydantic says of a field repeats its value."""
        uri = self.tracking_uri or ""
        if "@" in urlsplit(uri).netloc or "password=" in uri:
            raise ValueError(
                "tracking_uri: holds a user or a password, which would be written to the run directory; leave them out and "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or what the database's driver reads"
            )
        if uri and urlsplit(uri).scheme.split("+")[0] not in SCHEMES:
            raise ValueError(
                f"tracking_uri: {uri} is neither a server nor a database ({', '.join(SCHEMES)}); for a file of your own "
                "give sqlite:///PATH.db"
            )
        return self


class LoggingConfig(Strict):
    """metrics.jsonl is always written to the run directory."""

    tensorboard: bool | Literal["auto"] = "auto"
    """Also write TensorBoard event files to <run.dir>/tensorboard; auto: if oprd-megatron[tensorboard] is installed."""
    wandb: WandbConfig | None = None
    """Also tell Weights & Biases; left out, not. `logging.wandb={}` takes the defaults."""
    mlflow: MlflowConfig | None = None
    """Also tell MLflow; left out, not. `logging.mlflow={}` takes the defaults."""
    progress: bool = True
    """Progress bar on rank 0."""
    gradient_norms_every: Annotated[int, Field(ge=0)] = 0
    """Measure the gradient norm of each term of the loss by itself every so many steps; costs a pass of both models for each
    term. 0 never."""
    slow_rank_factor: Annotated[float, Field(ge=1.0)] | None = 1.5
    """Warn of a rank whose own work in a phase takes so many times the median of its peers, several steps running. null
    never."""
