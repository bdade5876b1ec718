import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import golden, taken_apart

from htfa_jax.config import DecoderConfig, Level3Config
from htfa_jax.models.internlm2 import InternLM2
from htfa_jax.models.level3_encoder_decoupling import EncoderDecoupling, MLPAdapter

G = golden("adapter_heads")


def decoupling(config, codebook_size, *, code_dim=3, decoder_dim=10):
    """Level 3 for understanding features of 4 numbers, with random weights."""
    return EncoderDecoupling(
        config,
        understand_dim=4,
        code_dim=code_dim,
        codebook_size=codebook_size,
        decoder_dim=decoder_dim,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "case,config",
    [
        ("default", Level3Config()),
        ("no_norm", Level3Config(adapter_mlp_dim=7, adapter_norm=False)),
    ],
)
def test_adapter_agrees_with_reference_vectors(case, config):
    structure, fresh = taken_apart(MLPAdapter(config, 12, 10, dtype=jnp.float32, rngs=nnx.Rngs(0)))

    def ours(prefix):
        names = {
            "fc1.kernel": "fc1.weight",
            "fc2.kernel": "fc2.weight",
            "norm.scale": "layer_norm.weight",
            "norm.bias": "layer_norm.bias",
        }
        return {p: jnp.asarray(G[f"adapter.{case}.{prefix}.{names.get(p, p)}"].T) for p in fresh}

    weights = ours("w")
    np.testing.assert_allclose(
        structure.merge(weights)(G["adapter.x"]), G[f"adapter.{case}.out"], rtol=1e-5, atol=1e-5
    )
    grads = jax.grad(
        lambda w: jnp.sum(structure.merge(w)(G["adapter.x"]) * G["adapter.cotangent"])
    )(weights)
    for path, expected in ours("grad").items():
        np.testing.assert_allclose(grads[path], expected, rtol=1e-4, atol=1e-4, err_msg=path)


def test_heads_agree_with_reference_vectors():
    """Both heads are bias-free and read their own part of the sequence."""
    hidden = jnp.asarray(G["heads.hidden"])
    level3 = decoupling(Level3Config(), 13)
    level3.head_generate.kernel[...] = jnp.asarray(G["heads.w.head_generate.weight"].T)
    np.testing.assert_allclose(
        level3.code_logits(hidden[:, 4:10]), G["heads.logits_generate"], rtol=1e-5, atol=1e-5
    )
    config = DecoderConfig(
        vocab_size=17, embed_dim=10, num_heads=5, num_kv_heads=1, mlp_dim=8, num_layers=1
    )
    decoder = InternLM2(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    kernel = np.zeros((10, 128), np.float32)
    kernel[:, :17] = G["heads.w.head_understand.weight"].T
    decoder.head.kernel[...] = jnp.asarray(kernel)
    logits = decoder.logits(hidden[:, 10:])
    np.testing.assert_allclose(logits[..., :17], G["heads.logits_understand"], rtol=1e-5, atol=1e-5)
    assert np.all(logits[..., 17:] == -np.inf)


def test_adapter_dropout_needs_a_key():
    module = MLPAdapter(
        Level3Config(adapter_dropout=0.5), 12, 10, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(G["adapter.x"])
    np.testing.assert_array_equal(module(x), module(x))
    first, again = (module(x, jax.random.key(k)) for k in (1, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, module(x))
    assert not np.allclose(first, module(x, jax.random.key(2)))


def test_a_fresh_head_finds_the_code_that_a_token_was_made_of():
    module = decoupling(Level3Config(), 30, code_dim=8, decoder_dim=64)
    vectors_CE = jax.random.normal(jax.random.key(0), (30, 8))
    module.head_generate.kernel[...] = module.tied_head_kernel(vectors_CE)
    logits = np.asarray(module.code_logits(module.generate(vectors_CE[None])))[0]
    # Tokens leave the adapter's norm with a mean square of 1.
    np.testing.assert_allclose(np.diag(logits), 6.0, rtol=1e-2)
    assert (logits.argmax(axis=1) == np.arange(30)).all()


def test_parts_that_are_off_have_no_parameters():
    def paths(config, codebook_size):
        module = decoupling(config, codebook_size)
        return {path.split(".")[0] for path in taken_apart(module)[1]}

    assert paths(Level3Config(), 9) == {"adapter_understand", "adapter_generate", "head_generate"}
    assert paths(Level3Config(), 0) == {"adapter_understand", "adapter_generate"}
    assert paths(Level3Config(generation=False), 0) == {"adapter_understand"}
