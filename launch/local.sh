#!/usr/bin/env bash
# One verb on this whole machine: launch/local.sh [RANKS] VERB [SETTING=VALUE ...]
#   launch/local.sh compress recipe=llama31_8b_to_4b data.train=my.jsonl parallel.tp=4      # a rank per GPU
#   launch/local.sh 2 compress recipe=smollm2_135m_to_100m parallel.tp=2                    # two ranks
# Without RANKS there is one per GPU that nvidia-smi lists or CUDA_VISIBLE_DEVICES leaves, and without GPUs, or with
# device=cpu, one per two cores. parallel.* says how they share the work; what it leaves over is data parallelism.
set -euo pipefail

usage() {
    echo "usage: $0 [RANKS] VERB [SETTING=VALUE ...]" >&2
    exit 2
}

count_gpus() {
    case "${CUDA_VISIBLE_DEVICES-unset}" in
        unset) nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true ;; # its MIG slices have lines of their own, further in
        '' | -1* | NoDevFiles) echo 0 ;;                                       # the last is what SLURM writes for none
        *) tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . ;;
    esac
}

cores=$(nproc) # those that this process may use
gpus=$(count_gpus)
if [[ " $* " == *" device=cpu "* ]]; then
    gpus=0
fi

if [[ ${1-} =~ ^[1-9][0-9]*$ ]]; then
    ranks=$1 why="as asked"
    shift
elif ((gpus > 0)); then
    ranks=$gpus why="one per GPU"
else
    ranks=$((cores > 1 ? cores / 2 : 1)) why="no GPU: one per two cores"
fi
[[ ${1-} =~ ^[a-z]+$ ]] || usage

# Ranks that share cores slow each other down: each gets its part of them, and more than 8 threads serve no rank.
share=$((cores / ranks < 1 ? 1 : cores / ranks > 8 ? 8 : cores / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$share}
# One queue to each GPU keeps what is sent and what is computed in Megatron's order, by which tensor parallelism hides its traffic.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# NCCL needs no settings on one machine; NCCL_DEBUG=INFO has it say what it found. In a container give it the host's shared memory.

echo "${0##*/}: ranks: $ranks ($why), threads of each: $OMP_NUM_THREADS" >&2
trap "" USR1 # where a scheduler sends it to all, the ranks save and stop, but torchrun would die of it
exec torchrun --standalone --nproc-per-node="$ranks" -m minitron "$@"
