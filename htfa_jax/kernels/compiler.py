"""Options for XLA by platform: `compiler_options=TRAINING.get(platform)`."""

from collections.abc import Callable
from typing import Any

import jax

# cuBLAS adds biases and residuals and computes GELU within a matmul. XLA's own Triton kernels leave
# that to another pass over the memory, so that even a faster one of them loses: SigLIP's MLP takes
# 0.96 instead of 1.11 ms on an H200, and the step compiles in 39 to 46 s instead of 74.
TRAINING = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
# A token is hundreds of short kernels: those that do not need each other's results run at the same
# time, 1,438 to 1,460 us a token on an H200 instead of 1,499 to 1,528. XLA's default order also
# wrote other tokens there than every other order did (JAX 0.11.2, `RESULTS.md`).
DECODING = {"gpu": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}}


def jit_light(function: Callable, **options: Any) -> Callable:
    """`jax.jit` of a function that draws many arrays at random, compiled with less effort.

    On a CPU, LLVM takes a third of the time over the loops that draw if it optimizes them less. The
    numbers stay the same and come as fast.
    """
    # JAX may have been told to optimize nothing, which takes less time still.
    if jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
        options["compiler_options"] = {"xla_backend_optimization_level": 1}
    return jax.jit(function, **options)
