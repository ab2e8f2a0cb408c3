"""Entry point of a rank for `oprd doctor --precision`: what fp8 does to the teacher's states, beside the student's distance.

torchrun --nproc-per-node N -m oprd_megatron.noise OUT.json CONFIG.yaml key.sub=value ..        (OUT.json: - writes no file)
"""

from __future__ import annotations

import sys
from pathlib import Path

from oprd_megatron.config import load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        out, config = sys.argv[1], load_config(sys.argv[2], sys.argv[3:])
        from oprd_megatron.noise.doctor import diagnose_precision

        diagnose_precision(config, None if out == "-" else Path(out))
