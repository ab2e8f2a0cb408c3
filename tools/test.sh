#!/usr/bin/env bash
# Runs the tests in <checkout>/.venv, which it makes on its first start.
#
#   bash tools/test.sh [--fast] [pytest arguments]
#
# --fast leaves out the tests marked slow (more than a minute each). Without pytest arguments two processes share the tests, file by
# file; with some there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=()
if [[ "${1:-}" == --fast ]]; then
    selection=(-m "not slow and not matrix and not vllm")
    shift
fi
processes=()
if [[ $# -eq 0 ]]; then
    processes=(-n 2 --dist loadfile --durations 25)
fi
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh demo,dev

# Several ranks share the cores in the multi-process tests: one thread each.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest ${processes[@]+"${processes[@]}"} ${selection[@]+"${selection[@]}"} "$@"
