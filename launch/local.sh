#!/usr/bin/env bash
# One verb on several ranks of this machine: launch/local.sh RANKS VERB [SETTING=VALUE ...]
#   launch/local.sh 8 compress recipe=llama31_8b_to_4b data.train=my.jsonl
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: $0 RANKS VERB [SETTING=VALUE ...]" >&2
    exit 2
fi
ranks=$1
shift

# without a limit every rank starts as many threads as there are cores, and they slow each other down
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trap "" USR1 # where a scheduler sends it to all, the ranks save and stop, but torchrun would die of it
exec torchrun --standalone --nproc-per-node="$ranks" -m minitron "$@"
