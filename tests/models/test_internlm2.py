import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support import count_matmuls, taken_apart
from transformers import LlamaConfig, LlamaForCausalLM

from htfa_jax.config import DecoderConfig
from htfa_jax.models.decoding import DecodingInternLM2, decoding_layout
from htfa_jax.models.internlm2 import InternLM2
from htfa_jax.models.layers import run_layers
from weights_convert import internlm2 as table
from weights_convert.convert import convert

CONFIG = DecoderConfig(
    vocab_size=150,
    embed_dim=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    mlp_dim=68,
    rope_theta=777.0,
    rms_norm_eps=1e-3,
)
LENGTH = 512


def structure_of(form=InternLM2, config=CONFIG, **options):
    return taken_apart(form(config, dtype=jnp.float32, rngs=nnx.Rngs(0), **options))[0]


@pytest.fixture(scope="module")
def pair():
    """(our structure and weights, transformers' model), the same random weights."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.embed_dim,
            intermediate_size=CONFIG.mlp_dim,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
            rms_norm_eps=CONFIG.rms_norm_eps,
            max_position_embeddings=2048,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.3 * noise if "norm" in name else 1.5 * noise * p.shape[-1] ** -0.5)
    structure = structure_of()
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    weights = convert(structure.shapes, tensors, table.llama_rules(), table.IGNORED)
    return structure, weights, theirs


def tokens(batch=2, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length))


def positions(batch, length, start=0):
    return jnp.broadcast_to(jnp.arange(start, start + length)[None], (batch, length))


@pytest.mark.slow
def test_every_layer_agrees_with_transformers_on_a_long_prompt(pair):
    """Rotary positions are the identity at 0: a wrong rotation shows far from it."""
    structure, weights, theirs = pair
    ids = tokens()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True)
    module = structure.merge(weights)
    x = module.embed(ids)

    def block(layer, x, _):
        x, _ = layer(x, positions(*ids.shape), None, None)
        return x, x

    _, outputs = run_layers(module.layers, x, block)
    hidden = [*outputs[:-1], module.norm(outputs[-1])]
    for ours, target in zip(hidden, expected.hidden_states[1:], strict=True):
        target = target.numpy()
        np.testing.assert_allclose(ours, target, rtol=0, atol=1e-4 * np.abs(target).max())
    logits = module.logits(module(x, positions(*ids.shape))[0])
    target = expected.logits.numpy()
    np.testing.assert_allclose(
        logits[..., : CONFIG.vocab_size], target, rtol=0, atol=1e-4 * np.abs(target).max()
    )
    assert np.all(logits[..., CONFIG.vocab_size :] == -np.inf)


@pytest.mark.slow
@pytest.mark.parametrize("form", [InternLM2, DecodingInternLM2])
def test_attention_weights_are_those_of_transformers(pair, form):
    """Of tokens that follow others in a cache, in both forms of the decoder."""
    _, weights, theirs = pair
    start, ids = 50, tokens(length=90)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), output_attentions=True)
    decoder = structure_of(form).merge(weights if form is InternLM2 else decoding_layout(weights))
    x = decoder.embed(ids)
    _, cache = decoder(x[:, :start], positions(2, start), decoder.empty_cache(2, 100))
    rest = positions(2, 40, start)
    seen = decoder.with_attention(x[:, start:], rest, cache, lambda weights_BNTS: weights_BNTS)
    assert seen.attention.shape == (3, 2, 6, 40, 100)
    for ours, target in zip(seen.attention, expected.attentions, strict=True):
        np.testing.assert_allclose(ours[..., :90], target.numpy()[:, :, start:], atol=1e-4)
        np.testing.assert_allclose(ours.sum(axis=-1), 1, rtol=1e-5)
    hidden, after = decoder(x[:, start:], rest, cache)
    np.testing.assert_allclose(seen.hidden_BTD, hidden, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), seen.cache, after)


def test_internlm2_names_give_the_same_weights(pair):
    """InternLM2 fuses queries, keys and values by key head: [head, its queries + key + value]."""
    structure, weights, theirs = pair
    llama = {k: v.numpy() for k, v in theirs.state_dict().items()}
    head = CONFIG.embed_dim // CONFIG.num_heads
    group = CONFIG.num_heads // CONFIG.num_kv_heads
    renames = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
    }
    tensors = {}
    for key, value in llama.items():
        if "_proj.weight" in key and key.split("self_attn.")[-1][0] in "qkv":
            continue
        for old, new in renames.items():
            key = key.replace(old, new)
        tensors[key] = value
    for i in range(CONFIG.num_layers):
        q, k, v = (llama[f"model.layers.{i}.self_attn.{n}_proj.weight"] for n in "qkv")
        rows = []
        for g in range(CONFIG.num_kv_heads):
            rows += [q[g * group * head : (g + 1) * group * head]]
            rows += [k[g * head : (g + 1) * head], v[g * head : (g + 1) * head]]
        tensors[f"model.layers.{i}.attention.wqkv.weight"] = np.concatenate(rows)
    converted = convert(structure.shapes, tensors, table.internlm2_rules(CONFIG), table.IGNORED)
    assert converted.keys() == weights.keys()
    for path in weights:
        np.testing.assert_array_equal(converted[path], weights[path])


def test_causal_by_gradient(pair):
    structure, weights, _ = pair
    x = jax.random.normal(jax.random.key(0), (1, 70, CONFIG.embed_dim))

    def one_output(x):
        return jnp.sum(structure.merge(weights)(x, positions(1, 70))[0][0, 40] ** 2)

    reach = np.abs(jax.grad(one_output)(x)[0]).max(axis=-1)
    assert np.all(reach[:41] > 0)
    np.testing.assert_array_equal(reach[41:], 0)


def test_cached_equals_uncached_for_rows_of_different_lengths(pair):
    """Prompts padded behind, then words one by one at each row's own position."""
    structure, weights, _ = pair
    module = structure.merge(weights)
    ids, lengths, room = tokens(3, 80), np.array([64, 7, 33]), 90
    whole, _ = module(module.embed(ids), positions(3, 80))

    padded = np.where(np.arange(64)[None] < lengths[:, None], ids[:, :64], 99)
    cache = module.empty_cache(3, room)
    hidden, cache = module(module.embed(padded), positions(3, 64), cache)
    rows = np.arange(3)
    np.testing.assert_allclose(
        hidden[rows, lengths - 1], whole[rows, lengths - 1], rtol=1e-4, atol=1e-4
    )
    step = jax.jit(lambda x, p, cache: structure.merge(weights)(x, p, cache))
    for i in range(12):
        at = lengths + i
        x = module.embed(ids[rows, at][:, None])
        hidden, cache = step(x, jnp.asarray(at)[:, None], cache)
        np.testing.assert_allclose(hidden[:, 0], whole[rows, at], rtol=1e-4, atol=1e-4)


def test_tied_head_is_the_embedding_and_nothing_else():
    config = DecoderConfig(**{**CONFIG.__dict__, "tie_head": True})
    structure = structure_of(config=config)
    assert not [path for path in structure.shapes if path.startswith("head")]
    module = structure.merge({p: jnp.ones(s.shape) for p, s in structure.shapes.items()})
    logits = module.logits(jnp.ones((1, 1, CONFIG.embed_dim)))
    np.testing.assert_allclose(logits[0, 0, : CONFIG.vocab_size], CONFIG.embed_dim)


def test_without_text_there_is_neither_embedding_nor_head():
    paths = structure_of(with_text=False).shapes
    assert not [path for path in paths if path.startswith(("head", "embed"))]


@pytest.mark.slow
def test_dropout_needs_a_key_and_differs_between_layers(pair):
    _, weights, _ = pair
    structure = structure_of(config=DecoderConfig(**{**CONFIG.__dict__, "dropout": 0.3}))
    x = jax.random.normal(jax.random.key(0), (1, 20, CONFIG.embed_dim))

    def run(key):
        return structure.merge(weights)(x, positions(1, 20), key=key)[0]

    np.testing.assert_array_equal(run(None), run(None))
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.allclose(run(jax.random.key(1)), run(None))
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_computes_again_and_changes_nothing(pair, remat):
    """Matmuls of attention alone with "dots"; with "full" all of a block but the last."""
    _, weights, _ = pair
    x = jax.random.normal(jax.random.key(0), (1, 24, CONFIG.embed_dim))

    def gradient(remat):
        structure = structure_of(remat=remat)

        def loss(weights):
            return jnp.sum(jnp.sin(structure.merge(weights)(x, positions(1, 24))[0]))

        return jax.jit(jax.grad(loss))(weights), count_matmuls(jax.grad(loss), weights)

    (plain, plain_products), (saved, products) = gradient("none"), gradient(remat)
    assert products - plain_products == {"dots": 2, "full": 8}[remat]
    for path, value in saved.items():
        np.testing.assert_allclose(value, plain[path], rtol=1e-3, atol=1e-4, err_msg=path)
