"""TensorBoard events, read back with tensorboard's own reader."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oprd_megatron.logging.tensorboard import TensorBoardLogger

RECORD = {
    "kind": "train",
    "loss": 0.5,
    "seconds": {"rollout": 2.0, "student": 3.0},
    "note": "text is left out",
    "lr": None,
    "layers": {"student": [1, 3], "teacher": [1, 5], "cosine": [0.25, 0.75], "mse": [4.0, 2.0]},
}


def _read(directory):
    events = EventAccumulator(str(directory)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_nested_numbers_and_layers_become_scalars(tmp_path):
    """Tags are kind/path; layers are named by the student's global layer id, not by their place in the list."""
    logger = TensorBoardLogger(tmp_path)
    logger.log({**RECORD, "step": 1})
    logger.log({"kind": "eval", "step": 1, "kl": 0.125, "samples": [{"prompt": "p"}], "layers": {}})
    logger.close()
    assert _read(tmp_path) == {
        "train/loss": [(1, 0.5)],
        "train/seconds/rollout": [(1, 2.0)],
        "train/seconds/student": [(1, 3.0)],
        "train/cosine/layer_01": [(1, 0.25)],
        "train/cosine/layer_03": [(1, 0.75)],
        "train/mse/layer_01": [(1, 4.0)],
        "train/mse/layer_03": [(1, 2.0)],
        "eval/kl": [(1, 0.125)],
    }


def test_a_resume_hides_the_steps_that_are_run_again(tmp_path):
    """After truncate_after(2), steps 3 and 4 of the first process are gone from what TensorBoard shows."""
    first = TensorBoardLogger(tmp_path)
    for step in (1, 2, 3, 4):
        first.log({"kind": "train", "step": step, "loss": 1.0})
    first.close()
    second = TensorBoardLogger(tmp_path)
    second.truncate_after(2)
    second.log({"kind": "train", "step": 3, "loss": 0.5})
    second.close()
    assert _read(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, pytest.approx(0.5))]
