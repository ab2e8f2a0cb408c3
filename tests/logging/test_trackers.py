"""Which loggers a config asks for, and what happens where their packages are missing."""

import sys
from importlib.util import find_spec

import pytest

from oprd_megatron.config import parse_config
from oprd_megatron.config.logging import LoggingConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.logging import build, read_records
from oprd_megatron.logging.scalars import scalars
from oprd_megatron.preflight import preflight
from tests.training.runs import tiny_values


def without(*missing):
    """`find_spec` on a machine that lacks some packages."""
    return lambda name: None if name in missing else find_spec("json")


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line_with_the_command(monkeypatch, tmp_path, tracker):
    """The command names the extra that brings it; a run hears of it before its models are looked for."""
    monkeypatch.setattr(build, "find_spec", without(tracker))
    settings = LoggingConfig.model_validate({tracker: True if tracker == "tensorboard" else {}})
    command = rf"pip install 'oprd-megatron\[{tracker}\]'"
    with pytest.raises(ConfigError, match=rf"logging\.{tracker}: needs {tracker}.*{command}") as error:
        build.check_trackers(settings)
    assert "\n" not in str(error.value)
    config = parse_config({**tiny_values(tmp_path), "logging": settings.model_dump()}, "test")
    with pytest.raises(ConfigError, match=command):
        preflight(config, 1)
    monkeypatch.setattr(build, "find_spec", without())
    build.check_trackers(settings)


def test_nothing_is_needed_that_is_not_asked_for(monkeypatch, tmp_path):
    """The default runs where no tracker is installed, and imports none: metrics.jsonl is all there is."""
    monkeypatch.setattr(build, "find_spec", without("tensorboard", "wandb", "mlflow", "sqlalchemy", "alembic"))
    monkeypatch.setitem(sys.modules, "oprd_megatron.logging.tensorboard", None)  # an import would fail
    values = tiny_values(tmp_path)
    config = parse_config({**values, "logging": {"progress": False}}, "test")
    build.check_trackers(config.logging)
    config.run.dir.mkdir()
    loggers = build.open_loggers(config, None)
    loggers.log({"kind": "train", "step": 1})
    loggers.close()
    assert read_records(config.run.dir / "metrics.jsonl") == [{"kind": "train", "step": 1}]
    assert [path.name for path in config.run.dir.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_is_written_where_it_is_installed(tmp_path):
    """`auto`, the default."""
    config = parse_config({**tiny_values(tmp_path), "logging": {"progress": False}}, "test")
    config.run.dir.mkdir()
    build.open_loggers(config, None).close()
    assert list((config.run.dir / "tensorboard").iterdir())


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path):
    """It would be written to config.yaml; the message must not show it either."""
    values = tiny_values(tmp_path)
    for uri in ("https://me:secret@host/x", "postgresql://host/db?user=me&password=secret"):
        with pytest.raises(ConfigError, match=r"logging\.mlflow: tracking_uri: holds a user or a password") as error:
            parse_config({**values, "logging": {"mlflow": {"tracking_uri": uri}}}, "test")
        assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match=r"\./mlruns is neither a server nor a database"):
        parse_config({**values, "logging": {"mlflow": {"tracking_uri": "./mlruns"}}}, "test")


def test_of_numbers_for_each_rank_the_highest_is_told():
    """A record's memory becomes one number a kind of memory, whatever the number of ranks."""
    record = {"kind": "train", "step": 1, "loss": 0.5, "memory_mib": {"held": [3, 9, 4], "peak": [5, 9, 12]}}
    assert scalars(record) == {"train/loss": 0.5, "train/memory_mib/held": 9.0, "train/memory_mib/peak": 12.0}
