#!/bin/bash
#SBATCH --job-name=oprd-qwen72b-to-7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=oprd-%j.log
''':'
# Two programs in one file. To bash the line above is the command ":", which does nothing, and what follows is the first program.
# To Python it opens a string that ends at the next three quotes: the second program is all that Python sees. So all of these work:
#
#   torchrun --nproc-per-node 4 examples/oprd_qwen72b_to_7b.sh --dry-run     torchrun runs its argument with Python
#   torchrun [rendezvous flags] examples/oprd_qwen72b_to_7b.sh               on every node yourself
#   bash examples/oprd_qwen72b_to_7b.sh                                      on every node, with MASTER_ADDR=first node
#   sbatch examples/oprd_qwen72b_to_7b.sh                                    once, from this project's folder
#
# What runs is the .yaml of the same name beside this file; further arguments are key=value overrides of it.
# docs/launching.md has the rest.
set -euo pipefail

script=$0
[ -f "${script%.sh}.yaml" ] || script=examples/oprd_qwen72b_to_7b.sh      # sbatch runs a copy that lies elsewhere

# --- on each node: started by the part below -------------------------------------------------------------------------------
if [ "${1:-}" = --on-node ]; then
    nodes=$2 per_node=$3 meet=$4
    shift 4
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1      # else an agent that is started again never finds the others
    left=$(mktemp)                                   # torchrun itself knows exit codes 0 and 1 only
    agent=(torchrun --nnodes "$nodes" --nproc-per-node "$per_node" --max-restarts "${MAX_RESTARTS:-3}"
           --rdzv-backend c10d --rdzv-endpoint "$meet" --rdzv-id "${SLURM_JOB_ID:-oprd}")
    code=0
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        # torchrun would die of USR1, and kill its ranks 30 s after TERM: too early for a checkpoint. So it sleeps through both,
        # and the ranks are told to save and stop.
        (trap "" USR1 TERM; exec "${agent[@]}" --signals-to-handle SIGINT "$script" --leave-code "$left" "$@") &
        pid=$!
        trap "pkill -USR1 -P $pid || true" USR1 TERM
        while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done
    else
        "${agent[@]}" "$script" --leave-code "$left" "$@" || code=$?
    fi
    said=$(cat "$left")
    rm "$left"
    exit "${said:-$code}"
fi

# --- once: what is asked for, can it work, and where do the nodes meet? ------------------------------------------------------
case " $* " in *" --dry-run "* | *" --help "*) exec python "$script" "$@" ;; esac

per_node=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
nodes=$(python "$script" --check "$per_node" "$@")   # a mistake is one line and exit code 2, before anything starts
start=() host=${MASTER_ADDR:-localhost}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    start=(srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --cpus-per-task "${SLURM_CPUS_ON_NODE:-1}")
fi
code=0
"${start[@]}" bash "$script" --on-node "$nodes" "$per_node" "$host:${MASTER_PORT:-29400}" "$@" || code=$?
if [ "$code" = 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"                 # 75: a checkpoint is saved, the same job goes on from it
fi
exit "$code"
'''

if __name__ == "__main__":  # saving a checkpoint starts a helper that imports this file again
    from oprd_megatron.launching.script import main

    main(__file__)
