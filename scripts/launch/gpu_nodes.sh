#!/bin/bash
# Trains on several GPU nodes without a scheduler; run it on every node, with its number.
#
#   NODE=0 NODES=2 FIRST=10.0.0.1:9876 scripts/launch/gpu_nodes.sh \
#       --config configs/standard.py --config.data.train=train.jsonl --workdir /shared/runs/x
#
# One process drives all GPUs of its node. FIRST is an address of node 0 that all nodes reach. The
# workdir, the data and data.cache_dir must be on a file system that all nodes share.
set -euo pipefail

exec python -m htfa_jax.train \
    --distributed.coordinator "${FIRST:?HOST:PORT of node 0}" \
    --distributed.num_processes "${NODES:?number of nodes}" \
    --distributed.process_id "${NODE:?number of this node}" \
    "$@"
