"""Entry point of a rank: `torchrun .. -m oprd_megatron.library.teacher_service CONFIG HOST PORT MAX_BYTES key=value ..`."""

from __future__ import annotations

import sys

from oprd_megatron.config import load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries
from oprd_megatron.errors import UserError

if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        if len(sys.argv) < 5:
            raise UserError(
                "usage: .. -m oprd_megatron.library.teacher_service CONFIG HOST PORT MAX_BYTES [key=value ..]"
            )
        run = load_config(sys.argv[1], sys.argv[5:])
        from oprd_megatron.library.teacher_service.server import serve

        serve(run, sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
