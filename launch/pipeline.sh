#!/usr/bin/env bash
# What `minitron compress` does, stage by stage: launch/pipeline.sh [SETTING=VALUE ...]
#   launch/pipeline.sh recipe=smollm2_135m_to_100m train.steps=100
# Every stage reads and writes files in run.dir, so any of them can be repeated alone.
set -euo pipefail

stage() {
    echo "== minitron $1"
    minitron "$@"
}

# whether the settings name a budget, which search finds sizes for, and not the sizes themselves
has_budget() {
    local settings
    settings=$(minitron search "$@" --cfg) || exit
    grep -Eq '^  (params|non_embedding_params|active_params|memory_gb|gflops_per_token|latency_ms): [0-9]' <<<"$settings"
}

stage data "$@"       # text -> tokens
stage calibrate "$@"  # forward passes -> importance of every unit
if has_budget "$@"; then
    stage search "$@" # importance + budget -> the sizes that prune takes
fi
stage prune "$@"      # importance + target -> the smaller model
stage distill "$@"    # retrain it on the teacher's predictions
stage evaluate "$@"   # loss and perplexity of teacher, pruned model, student: prints the table of results
stage export "$@"     # Hugging Face folder
stage report "$@"     # report.html
