"""MLflow: a server, or a database file. Numbers are told under the names of `scalars.py`; the config as parameters.

MLflow itself finds user and password. A server that stops answering in mid-run does not stop the run: that is said once, and
metrics.jsonl has the rest.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

os.environ.setdefault(
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"
)  # 14 s; its own 7 are more than 4 minutes, and all ranks wait

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from oprd_megatron.config.logging import MlflowConfig
from oprd_megatron.errors import UserError
from oprd_megatron.logging.scalars import scalars
from oprd_megatron.logging.told import Told

STATE_FILE, DATABASE, SQLITE = "mlflow.json", "mlflow.db", "sqlite:///"
MOST_METRICS, MOST_PARAMS = 1000, 100
"""In one request."""
LONGEST_PARAM = 500
"""In characters; what older servers take."""
messages = logging.getLogger(__name__)
for library in ("mlflow", "alembic"):
    logging.getLogger(library).setLevel(logging.WARNING)  # they tell of every table that they make


class MlflowLogger:
    """One MLflow run.

    Args:
        settings: `logging.mlflow`.
        run_dir: the run's id is kept here, and without a `tracking_uri` the database.
        config: of the run, for MLflow's parameters.
        resume: go on in the MLflow run that the directory knows of, if it knows one.

    Raises:
        UserError: the server or database cannot be used, or does not know that run.
    """

    def __init__(self, settings: MlflowConfig, run_dir: Path, config: dict[str, Any], resume: bool) -> None:
        self._told = Told(run_dir / STATE_FILE, resume)
        self._is_lost = self._is_whole = False
        uri = settings.tracking_uri or f"{SQLITE}{(run_dir / DATABASE).resolve()}"
        try:
            if uri.startswith("http"):
                httpx.head(uri, timeout=10)  # any answer will do
            self._client = MlflowClient(uri)
            if self._told.run_id is None:
                self._run_id = self._make_run(uri, settings, run_dir, config)
                self._told.begin(self._run_id)
            else:
                self._run_id = self._told.run_id
                self._client.update_run(self._run_id, status="RUNNING")
        except (MlflowException, httpx.HTTPError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"logging.mlflow: {uri}: {reason}; mend tracking_uri, or remove {self._told.path} to begin a new MLflow run"
            ) from None
        messages.info("MLflow: run %s in %s", self._run_id, uri)

    def _make_run(self, uri: str, settings: MlflowConfig, run_dir: Path, config: dict[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(settings.experiment)
        if experiment is None:
            place = None
            if uri.startswith(SQLITE):  # without a server MLflow would put artefacts wherever the command was started
                place = (Path(uri.removeprefix(SQLITE)).resolve().parent / "mlflow_artifacts").as_uri()
            experiment_id = self._client.create_experiment(settings.experiment, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        name = settings.name or run_dir.resolve().name
        run_id = self._client.create_run(experiment_id, run_name=name, tags=settings.tags).info.run_id
        params = [Param(key, value[:LONGEST_PARAM]) for key, value in _flat(config)]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + MOST_PARAMS])
        return str(run_id)

    def log(self, record: dict[str, Any]) -> None:
        """See `Logger.log`."""
        if not self._told.is_news(record):
            return
        now, step = int(time.time() * 1000), record["step"]
        metrics = [Metric(_allowed(tag), value, now, step) for tag, value in scalars(record).items()]
        for first in range(0, len(metrics), MOST_METRICS):
            self._ask(partial(self._client.log_batch, self._run_id, metrics[first : first + MOST_METRICS]))
        if record["kind"] == "summary":
            self._is_whole = True
            self._ask(partial(self._client.set_tag, self._run_id, "export", record["export"] or "none"))
        if not self._is_lost:
            self._told.add(record)

    def truncate_after(self, step: int) -> None:
        """MLflow takes nothing back: it keeps the steps above `step` as it was told of them first, and they are not told
        again."""

    def close(self) -> None:
        """See `Logger.close`. A run without its summary ends as KILLED, and is RUNNING again when it is resumed."""
        status = "FINISHED" if self._is_whole else "KILLED"
        self._ask(partial(self._client.set_terminated, self._run_id, status))

    def _ask(self, request: Callable[[], Any]) -> None:
        """Do it, unless an earlier request failed."""
        if self._is_lost:
            return
        try:
            request()
        except MlflowException as error:
            self._is_lost = True
            reason = str(error).splitlines()[0]
            messages.warning("logging.mlflow: %s; MLflow is told no more, %s has everything", reason, "metrics.jsonl")


def _flat(node: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of every leaf of nested sections; lists stay whole."""
    if not isinstance(node, dict):
        return [(prefix, str(node))]
    return [pair for key, value in node.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else str(key))]


def _allowed(tag: str) -> str:
    """MLflow allows letters, digits and few signs in names."""
    return re.sub(r"[^\w\-. :/]", "_", tag)
