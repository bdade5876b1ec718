"""Where the time goes until the first answer, with an empty and with a filled compilation cache.

    python scripts/benchmarks/start_up.py --checkpoint runs/x

Each start is a process of its own: imports, loading, the first and the second answer about a pair
of the embedded dataset's test split. Of the first answer the parts that JAX reports are listed.
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import tempfile
import time

# What JAX calls the parts, and what they are.
PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling, or reading a compiled program",
}


def start(checkpoint: str, cache: str) -> None:
    """One start; prints its parts."""
    begun = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal begun
        now = time.perf_counter()
        print(f"  {what:<44}{now - begun:6.2f} s", flush=True)
        begun = time.perf_counter()

    import jax

    lap("importing JAX")
    from htfa_jax.data.splits import open_split
    from htfa_jax.inference.engine import HTFAInference

    lap("importing htfa_jax")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    spent: collections.Counter[str] = collections.Counter()

    def listen(name: str, seconds: float, **_: object) -> None:
        if name in PARTS:
            spent[PARTS[name]] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    engine = HTFAInference(checkpoint)
    lap("loading the run")
    record = open_split(engine.config, "test")[0]
    pair = (record.image_orig, record.image_recon)
    begun = time.perf_counter()
    spent.clear()
    engine.infer(*pair)
    lap("first answer, of which")
    for what, seconds in spent.items():
        print(f"    {what:<42}{seconds:6.2f} s")
    begun = time.perf_counter()
    engine.infer(*pair)
    lap("second answer")


def main() -> None:
    """Two starts in processes of their own."""
    # What tyro imports would be missing from the times below.
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a run on the embedded dataset")
    parser.add_argument("--cache", help="start once, here, with this compilation cache")
    args = parser.parse_args()
    if args.cache is not None:
        start(args.checkpoint, args.cache)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--checkpoint", args.checkpoint, "--cache", folder]
        for what in ("empty", "filled"):
            begun = time.perf_counter()
            print(f"{what} compilation cache:", flush=True)
            subprocess.run(command, check=True)
            print(f"  {'process, from start to end':<44}{time.perf_counter() - begun:6.2f} s")


if __name__ == "__main__":
    main()
