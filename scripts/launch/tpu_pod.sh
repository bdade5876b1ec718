#!/bin/bash
# Trains on a TPU pod slice; one process for each host, started from a machine with gcloud.
#
#   TPU=my-slice ZONE=us-central2-b scripts/launch/tpu_pod.sh \
#       --config configs/standard.py --config.data.train=/mnt/data/train.jsonl \
#       --workdir /mnt/shared/runs/x
#
# The project must be in the home folder of every host (gcloud compute tpus tpu-vm scp --recurse
# --worker=all . "$TPU":htfa_jax). Workdir and data must be on a disk that all hosts share.
set -euo pipefail

gcloud compute tpus tpu-vm ssh "${TPU:?name of the slice}" --zone "${ZONE:?its zone}" \
    --worker=all --command "
        cd htfa_jax
        test -d .venv || { python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'; }
        .venv/bin/python -m htfa_jax.train --distributed.auto $(printf '%q ' "$@")
    "
