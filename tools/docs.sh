#!/usr/bin/env bash
# Builds docs/ as a site in docs/_build/html. Dead links, anchors, pictures and files of this tree are errors.
#
#   bash tools/docs.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh docs

"$PYTHON" -m sphinx -W --keep-going -q -b html docs docs/_build/html
echo "docs/_build/html/index.html"
