#!/usr/bin/env bash
# Makes <checkout>/.venv with this project and everything it needs; does nothing when that is already done.
#
#   bash tools/setup_env.sh EXTRAS            e.g. demo,dev (extras of pyproject.toml)
#   source tools/setup_env.sh EXTRAS          from a script: also exports PYTHON=<checkout>/.venv/bin/python
#
# torch comes first and on its own, because what PyPI serves for Linux carries gigabytes of CUDA: without an NVIDIA
# driver its CPU build is taken, from pip's configured sources if they hold it, else from PyTorch's CPU index. A torch
# (>= 2.6) that is already in .venv stays.
set -euo pipefail

setup_checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
setup_extras="${1:?usage: setup_env.sh EXTRAS, for example demo,dev}"
setup_venv="$setup_checkout/.venv"
setup_log="$setup_venv/setup.log"
setup_torch="2.13.0"
export PYTHON="$setup_venv/bin/python"

setup_fail() {
    echo "setup: $1" >&2
    exit 1
}

# Is $1 a Python that starts and that this project runs on?
setup_python_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

setup_find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if setup_python_fits "$name"; then
            echo "$name"
            return
        fi
    done
    setup_fail "no Python 3.11, 3.12 or 3.13 on the PATH; install one (Debian, Ubuntu: apt install python3 python3-venv)"
}

setup_make_venv() {
    if setup_python_fits "$PYTHON" && "$PYTHON" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local base
    base="$(setup_find_python)"
    echo "setup: making .venv with $("$base" --version)"
    if ! "$base" -m venv --clear "$setup_venv" >/dev/null 2>&1; then
        setup_fail "'$base -m venv' failed; on Debian and Ubuntu run: apt install $("$base" -c \
            'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    fi
}

# pip with its output in the log; $1 is the progress line.
setup_pip() {
    echo "setup: $1"
    "$PYTHON" -m pip install --disable-pip-version-check --no-input "${@:2}" >>"$setup_log" 2>&1
}

setup_install_torch() {
    if "$PYTHON" -m pip show torch >/dev/null 2>&1; then
        return
    fi
    if nvidia-smi >/dev/null 2>&1 || [[ "$(uname -s)" != Linux ]]; then
        setup_pip "torch" "torch>=2.6" || setup_fail "torch did not install; see $setup_log"
        return
    fi
    setup_pip "torch $setup_torch, CPU build" --retries 1 "torch==$setup_torch+cpu" && return
    setup_pip "torch $setup_torch, CPU build, from download.pytorch.org" --timeout 20 --retries 1 \
        --index-url https://download.pytorch.org/whl/cpu "torch==$setup_torch" && return
    setup_fail "no CPU build of torch within reach (see $setup_log); to take PyPI's large CUDA build instead, run \
'$PYTHON -m pip install torch' and start again"
}

# One stamp for each set of extras; a changed pyproject.toml or checkout path makes it stale.
setup_key="$(cat "$setup_checkout/pyproject.toml" - <<<"$setup_checkout" | cksum)"
setup_stamp="$setup_venv/setup-$setup_extras.stamp"
if [[ ! -x "$PYTHON" || ! -f "$setup_stamp" || "$(<"$setup_stamp")" != "$setup_key" ]]; then
    setup_make_venv
    : >"$setup_log"
    setup_install_torch
    setup_pip "oprd-megatron[$setup_extras] and what it needs" -e "${setup_checkout}[$setup_extras]" \
        || setup_fail "pip could not install oprd-megatron[$setup_extras]; see $setup_log"
    echo "$setup_key" >"$setup_stamp"
    echo "setup: ready ($PYTHON)"
fi
