"""Entry point of a rank for `oprd bridge`: `torchrun .. -m oprd_megatron.bridge fit|map CONFIG OUT key=value ..`."""

from __future__ import annotations

import sys
from pathlib import Path

from oprd_megatron.config import load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries
from oprd_megatron.errors import UserError

if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        if len(sys.argv) < 4 or sys.argv[1] not in ("fit", "map"):
            raise UserError("usage: torchrun .. -m oprd_megatron.bridge fit|map CONFIG.yaml OUT [key.sub=value ..]")
        run, out = load_config(sys.argv[2], sys.argv[4:]), Path(sys.argv[3])
        if sys.argv[1] == "fit":
            from oprd_megatron.bridge.stage1 import fit

            fit(run, out)
        else:
            from oprd_megatron.bridge.measured_map import measure_map

            measure_map(run, out)
