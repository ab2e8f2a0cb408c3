"""Entry point of a rank: `torchrun --nproc-per-node N -m oprd_megatron.train CONFIG.yaml key.sub=value ..`.

`oprd train` starts the same thing on one machine. A user's mistake prints one line and exits with code 2.

Heavy modules are imported only when this file is run: saving a checkpoint starts a helper process that imports it again.
"""

from __future__ import annotations

import os
import sys

from oprd_megatron.config import load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries
from oprd_megatron.errors import UserError
from oprd_megatron.launching.world import check_world

if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
            raise UserError(
                "usage: torchrun .. -m oprd_megatron.train CONFIG.yaml [key.sub=value ..]; see oprd train --help"
            )
        run = load_config(sys.argv[1], sys.argv[2:])
        check_world(run, os.environ)
        from oprd_megatron.loop import train

        train(run)
