"""MLflow with a database file, read back with its own client."""

import logging
import time

import pytest

from oprd_megatron.config.logging import MlflowConfig
from oprd_megatron.errors import UserError

for package in ("mlflow", "sqlalchemy", "alembic"):
    pytest.importorskip(package, reason="needs MLflow: pip install 'oprd-megatron[mlflow]'")
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from oprd_megatron.logging.mlflow import MlflowLogger  # noqa: E402

SUMMARY = {"kind": "summary", "step": 5, "wall_seconds": 3.0, "export": "student_hf"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A database that all tests here share: making one takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/shared.db"
    return MlflowConfig(experiment="distil", tracking_uri=uri, name="first", tags={"size": "tiny"})


def train(step, loss):
    return {"kind": "train", "step": step, "loss": loss, "terms": {"top 16 (near)": 2.0}}


def runs_of(settings):
    client = MlflowClient(settings.tracking_uri)
    experiment = client.get_experiment_by_name(settings.experiment)
    return client, client.search_runs([experiment.experiment_id])


def history(client, run, tag):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, tag)]


def test_a_resumed_run_goes_on_in_its_run_and_repeats_no_step(settings, tmp_path):
    """Stopped at 4, on from the checkpoint at 2: one run, KILLED and then FINISHED, each step once as it was told first."""
    config = {"optimizer": {"lr": 1e-4}, "distill": {"layers": [1, 2]}, "teachers": [{"path": "x" * 900}]}
    first = MlflowLogger(settings, tmp_path, config, resume=False)
    first.truncate_after(-1)
    for step in (1, 2, 3, 4):
        first.log(train(step, loss=1 / step))
    first.close()
    client, (run,) = runs_of(settings)
    assert run.info.status == "KILLED" and run.info.run_name == "first" and run.data.tags["size"] == "tiny"
    assert run.data.params["optimizer.lr"] == "0.0001" and run.data.params["distill.layers"] == "[1, 2]"

    second = MlflowLogger(settings, tmp_path, config, resume=True)
    assert runs_of(settings)[1][0].info.status == "RUNNING"
    second.truncate_after(2)
    for step in (3, 4, 5):
        second.log(train(step, loss=9.0))
    second.log(SUMMARY)
    second.close()
    client, (run,) = runs_of(settings)
    assert run.info.status == "FINISHED" and run.data.tags["export"] == "student_hf"
    losses = [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25), (5, 9.0)]
    assert history(client, run, "train/loss") == losses
    assert history(client, run, "train/terms/top 16 _near_")[0] == (1, 2.0)
    assert history(client, run, "summary/wall_seconds") == [(5, 3.0)]


def test_a_run_that_is_not_there_is_one_line(settings, tmp_path):
    """The database was changed: the message names the file that says which run it was."""
    (tmp_path / "mlflow.json").write_text('{"run_id": "0123", "last_steps": {}}')
    with pytest.raises(UserError, match=r"logging\.mlflow: sqlite.*0123.*mlflow\.json to begin") as error:
        MlflowLogger(settings, tmp_path, {}, resume=True)
    assert "\n" not in str(error.value)


def test_a_server_that_does_not_answer_is_one_line_at_the_start(tmp_path):
    """Within seconds, not after minutes of trying again."""
    start = time.monotonic()
    with pytest.raises(UserError, match=r"logging\.mlflow: http://127\.0\.0\.1:9: .*mend tracking_uri"):
        MlflowLogger(MlflowConfig(tracking_uri="http://127.0.0.1:9"), tmp_path, {}, resume=False)
    assert time.monotonic() - start < 5


def test_a_server_that_is_lost_does_not_stop_the_run(settings, tmp_path, monkeypatch, caplog):
    """One warning, however many records follow; what was not told is not remembered as told."""
    logger = MlflowLogger(settings, tmp_path, {}, resume=False)
    logger.log(train(1, 1.0))
    asked = []

    def refuse(*_, **__):
        asked.append(1)
        raise MlflowException("the server is gone\nand more")

    monkeypatch.setattr(logger._client, "log_batch", refuse)
    with caplog.at_level(logging.WARNING):
        logger.log(train(2, 1.0))
        logger.log(train(3, 1.0))
        logger.close()
    assert len(asked) == 1
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warnings if record.name.startswith("oprd")] == [
        "logging.mlflow: the server is gone; MLflow is told no more, metrics.jsonl has everything"
    ]
    assert '"train": 1' in (tmp_path / "mlflow.json").read_text()
