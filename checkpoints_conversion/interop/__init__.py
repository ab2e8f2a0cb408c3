"""What makes a converted directory one that Megatron-LM and Megatron-Bridge load, and theirs one that is read here.

    windows       sliding windows in mcore's settings
    notes         what neither package can say, and flags that Megatron-LM must be given again
    settings      what is written: arguments in common.pt, run_config.yaml
    run_config    run_config.yaml read, nothing executed
    same_model    do stored settings and config.json describe one model?
    locate        which of the directories that people point at holds the tensors

Facts about both packages are from their sources (Megatron-LM's main branch of 2026, Megatron-Bridge 0.3.1); docs/interop.md
says which were run. No torch here, but for one dtype in `common_state`.
"""

from checkpoints_conversion.interop.locate import find_checkpoint_dir, is_megatron
from checkpoints_conversion.interop.notes import notes_for
from checkpoints_conversion.interop.run_config import read_run_config
from checkpoints_conversion.interop.same_model import check_same_model
from checkpoints_conversion.interop.settings import (
    RUN_CONFIG,
    TRACKER,
    common_state,
    megatron_args,
    run_config_yaml,
)

__all__ = [
    "RUN_CONFIG",
    "TRACKER",
    "check_same_model",
    "common_state",
    "find_checkpoint_dir",
    "is_megatron",
    "megatron_args",
    "notes_for",
    "read_run_config",
    "run_config_yaml",
]
