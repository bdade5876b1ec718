#!/bin/bash
# Trains on several GPU nodes under SLURM; one process for each GPU.
#
#   sbatch --nodes=2 scripts/launch/slurm.sh \
#       --config configs/standard.py --config.data.train=train.jsonl --workdir /shared/runs/x
#
# The workdir, the data and data.cache_dir must be on a file system that all nodes share. SLURM
# sends SIGTERM two minutes before the time limit: the run saves, ends, and goes on when the same
# command is submitted again.
#SBATCH --job-name=htfa
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=htfa_%j.log
set -euo pipefail

# Every process sees all GPUs of its node, of which JAX gives it the one of its number there.
srun --kill-on-bad-exit=1 --gpu-bind=none python -m htfa_jax.train --distributed.auto "$@"
