"""Tokens per second of the decoder, beside transformers' Llama with the same weights.

    OMP_NUM_THREADS=2 taskset -c 0,1 python scripts/benchmarks/decoding.py --sizes small wide
    JAX_PLATFORMS=cuda python scripts/benchmarks/decoding.py --sizes internlm2_1_8b \\
        --dtype bfloat16 --batches 1 8 64 --prompt 1808

Both run in this process on the CPU, or on the same GPU, one after the other in every repetition,
so that a busy machine is busy for both. transformers: `generate`, static cache, no torch.compile.
The limit is what the memory gives: a large array read in order in the same run, several times
without a wait in between, divided by the bytes that a token needs: all weights but the embedding
table, and the keys and values of the tokens before it (of its own row; half of the answer on
average). It is compared with the fastest piece of decoding, and the array's fastest readings:
other programs slow down both.

Where the dtype rounds, one token that comes out otherwise changes all that follow. So the choice of
the next token is compared too, after the same tokens on both sides, and with float32. What is
written in one go has to be what the same weights choose token by token: on an H200 XLA's default
order of kernels once wrote something else (`RESULTS.md`).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from flax import nnx
from transformers import LlamaForCausalLM

from htfa_jax.common.cli import parse
from htfa_jax.common.param_paths import flatten, unflatten
from htfa_jax.config import DecoderConfig, load_config
from htfa_jax.inference.generate import decode_until, prefill
from htfa_jax.inference.options import Decoding
from htfa_jax.inference.sampling import make_sampling
from htfa_jax.kernels import compiler
from htfa_jax.models.decoding import Decoder, DecodingInternLM2, decoding_layout
from htfa_jax.models.internlm2 import VOCAB_MULTIPLE, InternLM2
from weights_convert import internlm2 as table
from weights_convert.convert import convert
from weights_convert.reference import llama_config

SIZES = {
    "small": lambda: load_config("debug").decoder,
    "wide": DecoderConfig,
    "internlm2_1_8b": lambda: load_config("internlm2_1_8b").decoder,
}
Size = tyro.extras.literal_type_from_choices(SIZES)
PROBE_BYTES = {"cpu": 2**28, "gpu": 2**32}
READINGS = 8  # of that array, one behind the other
PIECE = 32  # tokens that are timed by themselves: an answer, not the start of a program


def llama(sizes: DecoderConfig) -> LlamaForCausalLM:
    """transformers' model with random weights, in float32 on the CPU."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(sizes, eos_token_id=None, pad_token_id=0)).eval()


def ours(
    sizes: DecoderConfig, theirs: LlamaForCausalLM, dtype: str
) -> tuple[Any, dict[str, jax.Array]]:
    """The structure of our decoder, and the same weights."""

    def split(form: type[Decoder]) -> tuple[Any, Any]:
        return nnx.split(
            nnx.eval_shape(lambda: form(sizes, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
        )

    tensors = {name: value.cpu().numpy() for name, value in theirs.state_dict().items()}
    stacked = convert(flatten(split(InternLM2)[1]), tensors, table.llama_rules(), table.IGNORED)
    weights = {k: jnp.array(v, dtype) for k, v in decoding_layout(stacked).items()}
    return split(DecodingInternLM2)[0], weights


def tokens(rows: int, length: int, sizes: DecoderConfig) -> np.ndarray:
    """Random tokens [rows, length]."""
    return np.random.default_rng(rows).integers(1, sizes.vocab_size, (rows, length), np.int32)


def their_logits(theirs: LlamaForCausalLM, ids: np.ndarray, last: int) -> np.ndarray:
    """Of so many last positions [B, last, V], in one pass."""
    with torch.inference_mode():
        inputs = torch.from_numpy(ids).long().to(theirs.device)
        logits = theirs(inputs, logits_to_keep=last).logits
    return logits.float().cpu().numpy()


def our_logits(graphdef: Any, weights: Any, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Of the positions after the prompt [B, T - prompt, V], token by token as decoding goes."""

    def step(weights: Any, cache: Any, ids: jax.Array, start: jax.Array) -> Any:
        decoder = nnx.merge(graphdef, unflatten(weights))
        positions = start + jnp.arange(ids.shape[1])[None]
        hidden, cache = decoder(decoder.embed(ids), positions, cache)
        return decoder.logits(hidden[:, -1:])[..., : decoder.config.vocab_size], cache

    run = jax.jit(step, donate_argnums=1)
    empty = jax.jit(lambda w: nnx.merge(graphdef, unflatten(w)).empty_cache(*ids.shape))
    _, cache = run(weights, empty(weights), ids[:, :prompt], 0)
    seen = []
    for position in range(prompt, ids.shape[1]):
        logits, cache = run(weights, cache, ids[:, position : position + 1], position)
        seen.append(np.asarray(logits))
    return np.concatenate(seen, axis=1)


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, to its end."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def compare(name: str, batches: list[int], prompt: int, new: int, repeat: int, dtype: str) -> None:
    """Prints a line of a table for each batch size."""
    sizes, backend = SIZES[name](), jax.default_backend()
    theirs = llama(sizes).to("cuda" if backend == "gpu" else "cpu")
    graphdef, weights = ours(sizes, theirs, dtype)
    ids, rounded = tokens(1, prompt + new, sizes), dtype != "float32"
    exact = their_logits(theirs, ids, new) if rounded else None
    rotary = theirs.model.rotary_emb
    frequencies = rotary.inv_freq
    theirs = theirs.to(getattr(torch, dtype))
    rotary.inv_freq = frequencies  # in bfloat16 they would be others
    if rounded:
        both = {
            "ours": our_logits(graphdef, weights, ids, prompt),
            "transformers'": their_logits(theirs, ids, new),
        }
        best, deviation = exact.argmax(axis=-1), exact.std()
        for side, logits in both.items():
            error = np.sqrt(np.mean((logits - exact) ** 2)) / deviation
            same = np.mean(logits.argmax(axis=-1) == best)
            print(
                f"{name}, {side} next tokens after the same tokens: {100 * same:.1f}% those of "
                f"float32; error of the logits {100 * error:.2f}% of their deviation"
            )
    needed = sum(v.nbytes for k, v in weights.items() if not k.startswith("embed"))
    of_position = 2 * sizes.num_kv_heads * sizes.embed_dim // sizes.num_heads * sizes.num_layers
    needed_of_row = of_position * (prompt + new / 2) * jnp.dtype(dtype).itemsize

    def decoder(weights: Any) -> InternLM2:
        return nnx.merge(graphdef, unflatten(weights))

    first = jax.jit(
        lambda w, *inputs: prefill(
            decoder(w), *inputs, stop_ids=(-1,), num_slots=prompt + new, max_new_tokens=new
        )
    )
    further = jax.jit(
        lambda w, state, until: decode_until(decoder(w), state, until, stop_ids=(-1,)),
        donate_argnums=1,
        compiler_options=compiler.DECODING.get(backend),
    )
    probe = jnp.ones(PROBE_BYTES[backend] // 4, jnp.float32)
    read = jax.jit(jnp.sum)

    def readings() -> list[jax.Array]:
        return [read(probe) for _ in range(READINGS)]

    vocab = -(-sizes.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    length = min(PIECE, new - 1)
    for rows in batches:
        ids = tokens(rows, prompt, sizes)
        inputs = (
            jax.jit(lambda w, rows=rows: decoder(w).empty_cache(rows, 0))(weights),
            np.int32(0),
            ids,
            np.full(rows, prompt, np.int32),
            np.zeros((rows, vocab), bool),
            make_sampling(Decoding(), rows),
        )
        tensor = torch.from_numpy(ids).long().to(theirs.device)

        def generate(count: int, tensor: torch.Tensor = tensor) -> torch.Tensor:
            with torch.inference_mode():
                tokens = theirs.generate(
                    tensor,
                    attention_mask=torch.ones_like(tensor),
                    max_new_tokens=count,
                    do_sample=False,
                    cache_implementation="static",
                    disable_compile=True,
                )
            return tokens.cpu()  # which waits for it

        said = np.asarray(further(weights, first(weights, *inputs), new).tokens_BT)
        same = (said == generate(new)[:, prompt:].numpy()).mean()
        if rows == 1:
            read_again = np.concatenate([ids, said[:, :-1]], axis=1)
            own = our_logits(graphdef, weights, read_again, prompt).argmax(axis=-1)
            share = 100 * (own == said[:, 1:]).mean()
            print(f"{name}, tokens that are also chosen one by one: {share:.1f}%")
        times: dict[str, list[float]] = {}

        def note(what: str, value: float, times: dict[str, list[float]] = times) -> None:
            times.setdefault(what, []).append(value)

        for _ in range(repeat):
            start = time.perf_counter()
            state = jax.block_until_ready(first(weights, *inputs))
            note("prefill", time.perf_counter() - start)
            start = time.perf_counter()
            for until in range(1 + length, new + length, length):
                piece = time.perf_counter()
                state = jax.block_until_ready(further(weights, state, min(until, new)))
                if until <= new:
                    note("piece", time.perf_counter() - piece)
                    note("probe", seconds(readings))
                    start += times["probe"][-1]
            note("decode", time.perf_counter() - start)
            note("their prefill", seconds(lambda: generate(1)))
            note("theirs", seconds(lambda: generate(new)))
        t = {what: float(np.median(values)) for what, values in times.items()}
        whole = [p + d for p, d in zip(times["prefill"], times["decode"], strict=True)]
        bandwidth = READINGS * probe.nbytes / min(times["probe"])
        rate = rows * (new - 1) / t["decode"]
        best = rows * length / min(times["piece"])
        limit = rows * bandwidth / (needed + rows * needed_of_row)
        their_rate = rows * (new - 1) / (t["theirs"] - t["their prefill"])
        print(
            f"{name}, batch {rows}: {rows * new / np.median(whole):.1f} tokens/s with prefill "
            f"(transformers {rows * new / t['theirs']:.1f}, ratio "
            f"{t['theirs'] / np.median(whole):.2f}); decoding alone {rate:.1f} (transformers "
            f"{their_rate:.1f}, ratio {rate / their_rate:.2f}), at best {best:.1f}, "
            f"{100 * best / limit:.0f}% of the limit {limit:.1f} at {bandwidth / 1e9:.1f} GB/s; "
            f"same tokens {100 * same:.1f}%"
        )


def matrix_rate(dtype: str) -> float:
    """Floating-point operations per second of a large matmul."""
    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x)
    return 2 * 2048**3 / float(np.median([seconds(lambda: product(x, x)) for _ in range(9)]))


@dataclasses.dataclass(frozen=True)
class DecodingArgs:
    """Options of the command."""

    sizes: tuple[Size, ...] = tuple(SIZES)  # of the decoder
    batches: tuple[int, ...] = (1, 8)  # rows of a batch
    prompt: int = 512  # tokens of the prompt
    new: int = 128  # tokens of the answer
    repeat: int = 5  # median of so many
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line per size and batch."""
    args = parse(DecodingArgs, argv, __doc__)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(
        f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} threads, "
        f"{matrix_rate(args.dtype) / 1e9:.0f} GFLOP/s in {args.dtype}"
    )
    for name in args.sizes:
        compare(name, args.batches, args.prompt, args.new, args.repeat, args.dtype)


if __name__ == "__main__":
    main()
