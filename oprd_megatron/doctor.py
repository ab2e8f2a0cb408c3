"""Entry point of a rank for `oprd doctor`: is what the method computes right on these machines, with these models and layouts?

torchrun --nproc-per-node N -m oprd_megatron.doctor CONFIG.yaml key.sub=value ..

The checks run on a few tokens; each prints one line as soon as it is known: pass, fail or skip, what was
found, and what to do. Exit code 0 if none failed, else 1.
"""

from __future__ import annotations

import sys

from oprd_megatron.config import load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        config = load_config(sys.argv[1], sys.argv[2:])
        from oprd_megatron.diagnosis import diagnose

        sys.exit(0 if diagnose(config) else 1)
