#!/usr/bin/env bash
# One measurement on a machine with GPUs and many cores, each within about ten minutes:
#   scripts/measure.sh NAME [OUT]       from the repository, or ./measure.sh in a packed folder
# Figures go to the terminal and, as JSON and traces, to the folder OUT (default: measured).
set -euo pipefail
cd "$(dirname "$0")"
[ -d htfa_jax ] || cd ..
name=${1:-} out=${2:-measured}

# What `scripts/pack.py` brought along is installed beside the package, once.
if [ -d wheels ]; then
    site=$PWD/.site
    [ -d "$site" ] || [ -z "$(ls wheels)" ] || python3 -m pip install --quiet --no-index --no-deps \
        --no-compile --target "$site" wheels/*.whl
    export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

bench() { # NAME CONFIG FLAGS...
    mkdir -p "$out"
    python3 scripts/benchmark.py --config "$2" --steps 5 --output "$out/$1.json" "${@:3}"
}
# Without recomputing anything. 32 samples take about 48 GB; BATCH=64 is a little quicker and takes 85.
large=(--config.train.accumulation_steps=1 --config.train.remat=none)
batch=--config.train.batch_size=${BATCH:-32}

case $name in
standard) bench standard standard "$batch" "${large[@]}" ;;
twin) # both sides on the same GPU, with the same rematerialisation
    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.5
    bench twin standard --config.train.batch_size=8 "${large[@]}" --against torch
    ;;
trace)
    bench trace standard "$batch" "${large[@]}" --profile "$out/trace"
    python3 scripts/benchmarks/trace_summary.py "$out/trace" --top 40
    ;;
scaling) # one GPU, then all of them
    CUDA_VISIBLE_DEVICES=0 bench one standard "$batch" "${large[@]}"
    for mode in zero2 fsdp; do
        bench "$mode" standard "$batch" "${large[@]}" --config.sharding.mode=$mode
    done
    ;;
large_scale | internlm2_1_8b | memory_efficient) bench "$name" "$name" ;;
decoding)
    JAX_PLATFORMS=cuda python3 scripts/benchmarks/decoding.py --sizes internlm2_1_8b \
        --dtype bfloat16 --batches 1 8 64 --prompt 1808
    ;;
medium) # trains from scratch, and evaluates
    python3 -m htfa_jax.train --config scripts/benchmarks/configs/medium.py --workdir "$out/medium"
    ;;
*)
    echo "usage: $0 standard|twin|trace|scaling|large_scale|internlm2_1_8b|memory_efficient|decoding|medium [OUT]" >&2
    exit 2
    ;;
esac
