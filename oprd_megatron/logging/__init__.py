"""What a run writes down: one record (a dict) a step, given to every `Logger` of rank 0.

`build` makes the loggers that a config asks for. It, the trackers (each needs a package of its own) and `memory` (which needs
torch) are imported by their own names.
"""

from oprd_megatron.logging.base import Logger, Loggers
from oprd_megatron.logging.jsonl import METRICS_FILE, JsonlLogger, read_records, write_atomically
from oprd_megatron.logging.progress import ProgressLogger

__all__ = [
    "METRICS_FILE",
    "JsonlLogger",
    "Logger",
    "Loggers",
    "ProgressLogger",
    "read_records",
    "write_atomically",
]
