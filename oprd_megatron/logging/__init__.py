"""What a run writes down: one record (a dict) a step, given to every `Logger` of rank 0.

`memory` is imported by its own name; it is the only module here that needs torch.
"""

from oprd_megatron.logging.base import Logger, Loggers
from oprd_megatron.logging.jsonl import METRICS_FILE, JsonlLogger, read_records, write_atomically
from oprd_megatron.logging.progress import ProgressLogger
from oprd_megatron.logging.tensorboard import TensorBoardLogger

__all__ = [
    "METRICS_FILE",
    "JsonlLogger",
    "Logger",
    "Loggers",
    "ProgressLogger",
    "TensorBoardLogger",
    "read_records",
    "write_atomically",
]
