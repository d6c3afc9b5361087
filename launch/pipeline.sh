#!/usr/bin/env bash
# What `minitron compress` does, stage by stage: launch/pipeline.sh [SETTING=VALUE ...]
#   launch/pipeline.sh recipe=smollm2_135m_to_100m train.steps=100
# Every stage reads and writes files in run.dir, so any of them can be repeated alone.
set -euo pipefail

minitron data "$@"       # text -> tokens
minitron calibrate "$@"  # forward passes -> importance of every unit
minitron prune "$@"      # importance + target -> the smaller model
minitron distill "$@"    # retrain it on the teacher's predictions
minitron evaluate "$@"   # loss and perplexity of teacher, pruned model, student
minitron export "$@"     # Hugging Face folder
minitron report "$@"     # report.html
