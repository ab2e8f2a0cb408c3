#!/usr/bin/env bash
# Checks and measures on one GPU what a GPU is needed for, without network; on a CPU too, with small sizes.
#
#   bash tools/gpu_check.sh --out DIR [--stage env|parity|bench|fp8|vllm|train].. [--device cuda|cpu]
#
# It runs with the machine's own python3 (or $PYTHON) and torch, from this copy of the tree, and installs nothing.
# `bash tools/gpu_check.sh --help` says the rest; docs/gpu.md says how packages get to a machine without network.
set -euo pipefail
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "gpu_check: $python does not start, or is older than 3.11; set PYTHON to another one" >&2
    exit 2
fi
export PYTHONSAFEPATH=1  # modules come from this checkout, whatever lies in the working directory
export PYTHONPATH="$checkout:$checkout/tools${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m gpu_check "$@"
