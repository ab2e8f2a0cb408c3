#!/usr/bin/env bash
# Distils a real model on this machine's CPU, from nothing: environment, models, training, report.
#
#   bash tools/quickstart.sh [--layout pp2|tp2|tp2pp2|single] [--prepare]
#
# --prepare makes the environment and the models, and does not train.
#
# Teacher: SmolLM2-135M-Instruct. Student: the same model without 6 of its 30 layers. About 30 steps of OPRD on real
# megatron-core ranks over gloo. What is there already (environment, models, a finished or interrupted run) is reused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

layout=pp2 train=true
while (($#)); do
    case "$1" in
        --layout) layout="${2:-}"; shift 2 || true ;;
        --layout=*) layout="${1#*=}"; shift ;;
        --prepare) train=false; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "quickstart: unknown argument $1; try --help" >&2; exit 2 ;;
    esac
done
# SmolLM2 has 3 key/value heads: tp 2 splits them with one padded head that stays zero (pad_heads).
case "$layout" in
    single) tp=1 pp=1 pad=false ;;
    tp2) tp=2 pp=1 pad=true ;;
    pp2) tp=1 pp=2 pad=false ;;
    tp2pp2) tp=2 pp=2 pad=true ;;
    *) echo "quickstart: --layout '$layout' is not one of pp2, tp2, tp2pp2, single" >&2; exit 2 ;;
esac

# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh demo

SECONDS=0
teacher=models/smollm2-135m-instruct student=models/smollm2-24-layers
if [[ ! -d "$teacher" ]]; then
    "$PYTHON" tools/make_demo_teacher.py "$teacher"
fi
if [[ ! -d "$student" ]]; then
    "$PYTHON" tools/drop_layers.py "$teacher" "$student" --drop 10,13,16,19,22,25
fi
if ! $train; then
    echo "ready: $teacher, $student and .venv"
    exit
fi
overrides=(run.dir="runs/quickstart-$layout")
for model in teacher student; do
    overrides+=("$model.parallel={tp: $tp, pp: $pp}" "$model.pad_heads=$pad")
done
"$PYTHON" -m oprd_megatron.cli train examples/quickstart.yaml "${overrides[@]}"
echo "all of it     $SECONDS s with layout $layout, installing packages aside"
