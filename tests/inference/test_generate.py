"""The compiled functions of decoding, against passes without a cache and against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support import compile_as_for, random_batch, random_weights, taken_apart
from transformers import LlamaConfig, LlamaForCausalLM

from htfa_jax.config import DecoderConfig, override
from htfa_jax.inference.generate import complete, decode_until, expected_image, prefill, read_images
from htfa_jax.inference.options import Decoding
from htfa_jax.inference.sampling import make_sampling
from htfa_jax.inference.weights import for_inference
from htfa_jax.kernels.matmul import is_one_token_on_gpu
from htfa_jax.models.decoding import DecodingInternLM2, decoding_layout
from htfa_jax.models.factory import build_model
from htfa_jax.models.internlm2 import InternLM2
from htfa_jax.sharding.mesh import Backend
from weights_convert import internlm2 as table
from weights_convert.convert import convert

NEW, SLOTS, PADDED = 6, 80, 16


@pytest.fixture(scope="module")
def decode(model):
    """(batch, prompts, function that decodes rows of both layouts)."""
    config, structure, weights = model
    batch = random_batch(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 390, n).astype(np.int32) for n in (9, 1, 16)]
    layouts = {
        "training": (structure, weights),
        "decoding": (build_model(config, DecodingInternLM2), for_inference(config.train, weights)),
    }

    def run(params, batch, prompt_BT, length_B, sampling, until, layout, stops):
        module = layouts[layout][0].merge(params)
        prefix = read_images(module, batch)
        state = prefill(
            module.decoder, prefix.cache, prefix_length(config), prompt_BT, length_B,
            jnp.zeros((len(length_B), 512), bool), sampling, stop_ids=stops,
            num_slots=SLOTS, max_new_tokens=NEW + 2,
        )  # fmt: skip
        return decode_until(module.decoder, state, until, stop_ids=stops), prefix

    run = jax.jit(run, static_argnums=(6, 7))

    def decode(rows, decoding=None, layout="decoding", stops=(389,), until=NEW, pad=3):
        prompt_BT = np.full((len(rows), PADDED), pad, np.int32)
        for line, row in zip(prompt_BT, rows, strict=True):
            line[: len(prompts[row])] = prompts[row]
        part = jax.tree.map(lambda x: x[np.array(rows)], batch)
        length_B = np.array([len(prompts[row]) for row in rows], np.int32)
        sampling = make_sampling(decoding or Decoding(), len(rows))
        return run(layouts[layout][1], part, prompt_BT, length_B, sampling, until, layout, stops)

    return batch, prompts, decode


def prefix_length(config):
    return config.patch_grid**2 + config.code_grid**2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["training", "decoding"])
def test_greedy_equals_the_whole_sequence_computed_anew(model, decode, layout):
    """Every token is the most probable of an uncached pass over all before it, and so probable."""
    config, structure, weights = model
    batch, prompts, run = decode
    state, _ = run([0, 1, 2], layout=layout)
    said, probability = np.asarray(state.tokens_BT), np.asarray(state.probability_BT)

    @jax.jit
    def logits(batch, tokens_BT):
        module = structure.merge(weights)
        prefix, _ = module.encode(batch)
        hidden, _ = module.decode(
            jnp.concatenate([prefix, module.decoder.embed(tokens_BT)], axis=1), 0
        )
        return module.decoder.logits(hidden[:, prefix.shape[1] :])

    for row, prompt in enumerate(prompts):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        tokens = np.zeros(16 + NEW, np.int32)
        tokens[: len(prompt)] = prompt
        tokens[len(prompt) : len(prompt) + NEW] = said[row, :NEW]
        answer = np.asarray(logits(one, tokens[None])[0])[len(prompt) - 1 :][:NEW]
        np.testing.assert_array_equal(said[row, :NEW], answer.argmax(axis=-1))
        expected = jax.nn.softmax(answer, axis=-1)[np.arange(NEW), said[row, :NEW]]
        np.testing.assert_allclose(probability[row, :NEW], expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_alone_says_the_same(decode, temperature):
    """Whatever stands beside it and behind it, when words are drawn too."""
    _, _, run = decode
    decoding = Decoding(temperature=temperature, top_p=0.9, repetition_penalty=1.3, seed=5)
    together = np.asarray(run([0, 1, 2], decoding)[0].tokens_BT)
    for row in range(3):
        alone = run([row], decoding, pad=7)[0].tokens_BT
        np.testing.assert_array_equal(alone[0, :NEW], together[row, :NEW])
    if temperature:
        other = Decoding(temperature=temperature, seed=6)
        assert not np.array_equal(run([0, 1, 2], other)[0].tokens_BT, together)


@pytest.mark.slow
def test_a_row_that_stops_leaves_the_others_alone(model, decode):
    _, prompts, run = decode
    said = np.asarray(run([0, 1, 2])[0].tokens_BT)[:, :NEW]
    # The last new word of a row that some other row never says.
    row, stop = next(
        (i, int(token))
        for i in range(3)
        for token in said[i, ::-1]
        if token != said[i, 0] and any(token not in said[k] for k in range(3) if k != i)
    )
    state, _ = run([0, 1, 2], stops=(stop,), until=NEW + 2)
    first = int(np.argmax(said[row] == stop))
    tokens = np.asarray(state.tokens_BT)
    np.testing.assert_array_equal(tokens[row, : first + 1], said[row, : first + 1])
    assert first > 0 and state.done_B[row]
    # Its place in the cache stays where it was when it stopped.
    assert int(state.length_B[row]) == prefix_length(model[0]) + len(prompts[row]) + first
    others = [k for k in range(3) if stop not in said[k]]
    np.testing.assert_array_equal(tokens[others, :NEW], said[others])


@pytest.mark.slow
def test_all_rows_stopped_ends_the_loop(decode):
    _, _, run = decode
    said = np.asarray(run([0, 1, 2])[0].tokens_BT)
    state, _ = run([0, 1, 2], stops=tuple(int(t) for t in np.unique(said[:, 0])))
    assert int(state.step) == 1 and state.done_B.all()


@pytest.mark.slow
def test_codes_are_those_of_training(model, decode):
    """The same logits as in the joint pass, and the image of the expected codes."""
    config, structure, weights = model
    batch, _, run = decode
    for layout in ("training", "decoding"):
        prefix = run([0, 1, 2], layout=layout)[1]
        output = jax.jit(lambda b: structure.merge(weights)(b))(batch)
        np.testing.assert_allclose(
            prefix.code_logits_BMC, output.code_logits_BMC, rtol=1e-3, atol=1e-4
        )
    module = structure.merge(weights)
    expected = module.vq.decoder(expected_vectors(module, prefix.code_logits_BMC))
    np.testing.assert_allclose(
        expected_image(module, prefix.code_logits_BMC), expected, rtol=1e-5, atol=5e-5
    )
    # Where the model is sure, that is the image of the codes themselves.
    codes = np.random.default_rng(0).integers(0, 22, prefix.code_logits_BMC.shape[:2])
    sure = 1e4 * jax.nn.one_hot(codes, 22)
    np.testing.assert_allclose(
        expected_image(module, sure), module.vq.decode(codes), rtol=1e-4, atol=1e-4
    )


def expected_vectors(module, logits):
    """The mean of the code vectors by their probability, code by code."""
    weights = np.exp(np.float64(logits))
    table = np.float64(module.vq.vectors())
    total = sum(weights[..., code, None] * table[code] for code in range(len(table)))
    return np.float32(total / weights.sum(axis=-1, keepdims=True))


@pytest.mark.slow
def test_one_pass_takes_the_expected_codes_or_draws_them(model, decode):
    _, structure, weights = model
    _, _, run = decode
    prefix = run([0, 1, 2], layout="training")[1]
    draw = jax.jit(lambda *options: complete(structure.merge(weights), prefix, *options))
    seeds = np.array([4, 4, 9], np.uint32)
    module = structure.merge(weights)
    expected = expected_vectors(module, prefix.code_logits_BMC)
    np.testing.assert_allclose(draw(seeds, 0.0, 1), expected, atol=1e-5)
    # Of one row with one seed many times: as often as the probabilities at that temperature say.
    many = jax.vmap(lambda s: complete(structure.merge(weights), prefix, s, 1.3, 1))(
        np.arange(2000, dtype=np.uint32)[:, None].repeat(3, axis=1)
    )
    drawn = np.asarray(many)[:, 1, 2, None] == np.asarray(module.vq.vectors())
    share = np.mean(drawn.all(axis=-1), axis=0)
    expected = jax.nn.softmax(prefix.code_logits_BMC[1, 2] / 1.3)
    np.testing.assert_allclose(share, expected, atol=0.05)


@pytest.mark.slow
def test_refinement_steps_keep_the_most_confident_cells(model, decode):
    """Two passes, computed anew without a cache."""
    config, structure, weights = model
    batch, _, run = decode
    prefix = run([0, 1, 2], layout="training")[1]
    module = structure.merge(weights)
    got = jax.jit(lambda k: complete(module, prefix, np.zeros(3, np.uint32), 0.0, k))(2)
    logits = np.asarray(prefix.code_logits_BMC)
    first, M = expected_vectors(module, logits), logits.shape[1]
    sureness = np.asarray(jax.nn.softmax(logits, axis=-1)).max(axis=-1)
    kept = np.zeros(logits.shape[:2], bool)
    for row in range(3):
        kept[row, np.argsort(-sureness[row])[: M - int(M * np.cos(np.pi / 4))]] = True
    tokens, _ = module.encode(batch)
    P = config.patch_grid**2
    known = module.level3.generate(first)
    tokens = tokens.at[:, P:].set(jnp.where(kept[..., None], known, tokens[:, P:]))
    hidden, _ = module.decode(tokens, 0)
    second = expected_vectors(module, module.level3.code_logits(hidden[:, P:]))
    np.testing.assert_allclose(got, np.where(kept[..., None], first, second), atol=1e-4)
    assert kept.any() and np.abs(second - first)[~kept].max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "rows"), [("cpu", 2), ("gpu", 1)])
def test_256_tokens_are_those_of_transformers(platform, rows, monkeypatch):
    """By matmuls, and by the sums that a GPU has in their place."""
    compile_as_for(monkeypatch, Backend(platform, 9))
    config = DecoderConfig(
        vocab_size=150, embed_dim=48, num_layers=3, num_heads=6, num_kv_heads=2, mlp_dim=68,
        rope_theta=777.0, rms_norm_eps=1e-3,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=150, hidden_size=48, intermediate_size=68, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 777.0},
            max_position_embeddings=2048, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.3 * noise if "norm" in name else 1.5 * noise * p.shape[-1] ** -0.5)
    shapes = taken_apart(InternLM2(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))[0].shapes
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    weights = decoding_layout(convert(shapes, tensors, table.llama_rules(), table.IGNORED))
    structure, _ = taken_apart(DecodingInternLM2(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    as_sums = [is_one_token_on_gpu(np.zeros((count, 1))) for count in (1, 2)]
    assert as_sums == [platform == "gpu", False]
    prompt = np.random.default_rng(0).integers(0, 150, (rows, 40)).astype(np.int32)
    with torch.no_grad():
        expected = theirs.generate(
            torch.from_numpy(prompt).long(),
            attention_mask=torch.ones(rows, 40),
            max_new_tokens=256,
            do_sample=False,
        )[:, 40:].numpy()

    @jax.jit
    def generate(weights):
        decoder = structure.merge(weights)
        state = prefill(
            decoder, decoder.empty_cache(rows, 0), 0, prompt, np.full(rows, 40),
            jnp.zeros((rows, 256), bool), make_sampling(Decoding(), rows), stop_ids=(-1,),
            num_slots=40 + 256, max_new_tokens=256,
        )  # fmt: skip
        return decode_until(decoder, state, 256, stop_ids=(-1,)).tokens_BT

    got = np.asarray(generate(weights))
    np.testing.assert_array_equal(got, expected)
    assert len(np.unique(got)) > 20  # tokens that repeat would hide a wrong position


def test_layouts_hold_the_same_numbers(model):
    config, structure, weights = model
    inside = {k.removeprefix("decoder."): v for k, v in weights.items() if k[:8] == "decoder."}
    out = decoding_layout(inside)
    assert out.keys() == {
        k.removeprefix("decoder.")
        for k in build_model(config, DecodingInternLM2).shapes
        if k.startswith("decoder.")
    }
    q, k, v = (inside[f"layers.attention.{name}_proj.kernel"][1].T for name in "qkv")
    np.testing.assert_array_equal(
        out["layers.1.attention.qkv_proj.kernel"], np.concatenate([q, k, v])
    )
    gate, up = (inside[f"layers.{name}_proj.kernel"][0].T for name in ("gate", "up"))
    np.testing.assert_array_equal(out["layers.0.gate_up_proj.kernel"], np.concatenate([gate, up]))
    np.testing.assert_array_equal(out["layers.0.norm2.scale"], inside["layers.norm2.scale"][0])
    np.testing.assert_array_equal(out["embed.embedding"], inside["embed.embedding"])


def test_matrices_are_cast_once_and_the_rest_is_not(model):
    config, structure, _ = model
    weights = random_weights(structure)
    cast = for_inference(override(config, {"train.dtype": "bfloat16"}).train, weights)
    for path, value in cast.items():
        matrix = path.endswith((".kernel", ".embedding")) and not path.startswith("level1.")
        assert value.dtype == (jnp.bfloat16 if matrix else jnp.float32), path
