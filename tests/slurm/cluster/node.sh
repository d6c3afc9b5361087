#!/usr/bin/env bash
# The first process of a node, in namespaces of its own: gives it its name and /dev/shm, then runs its slurmd until the power is cut.
set -euo pipefail
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
slurmd -D &
wait $! # and not exec: this shell also takes in the orphans of its jobs
