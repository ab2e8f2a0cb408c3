"""What a person reads while a run trains."""

import io

from oprd_megatron.logging import ProgressLogger
from oprd_megatron.logging.memory import peak_memory_bytes


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def _train(step):
    return {"kind": "train", "step": step, "loss": 0.25, "cosine": 0.5, "tokens_per_second": 1234.0}


EVAL = {"kind": "eval", "step": 2, "kl": 0.5, "cross_entropy": 1.5, "cosine": 0.75}


def test_off_a_terminal_every_record_is_one_plain_line():
    """No carriage returns or bar characters reach a log file; the steps count from the resume."""
    stream = io.StringIO()
    progress = ProgressLogger(total_steps=4, stream=stream)
    progress.truncate_after(1)
    progress.log(_train(2))
    progress.log(EVAL)
    progress.log({"kind": "summary", "step": 4})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 2/4  loss 0.25  cosine 0.5000  1,234 tok/s  00:00 left",
        "held-out at step 2: KL 0.5000  cross-entropy 1.5000  cosine 0.7500",
    ]


def test_on_a_terminal_a_bar_counts_the_steps():
    """The bar shows the step reached, also after a resume, and evaluations stand on lines of their own."""
    stream = Terminal()
    progress = ProgressLogger(total_steps=4, stream=stream)
    progress.truncate_after(2)
    progress.log(EVAL)
    progress.log(_train(3))
    progress.log(_train(4))
    progress.close()
    shown = stream.getvalue()
    assert "4/4" in shown and "loss 0.25" in shown
    assert "held-out at step 2: KL 0.5000" in shown


def test_peak_memory_is_in_bytes():
    """A process that held 200 MB reports more than that, and far less than if KiB were taken for something else."""
    block = b"x" * 200_000_000
    assert len(block) < peak_memory_bytes() < 100 * len(block)
