import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support import KEYS_BIAS, count_matmuls, taken_apart
from transformers import SiglipVisionConfig, SiglipVisionModel

from htfa_jax.config import SigLIPConfig
from htfa_jax.models.layers import run_layers
from htfa_jax.models.siglip import SigLIP, patches
from weights_convert import siglip as table
from weights_convert.convert import convert

CONFIG = SigLIPConfig(
    patch_size=8, embed_dim=30, num_layers=3, num_heads=5, mlp_dim=44, layer_norm_eps=1e-3
)
IMAGE_SIZE = 72  # 81 patches


@pytest.fixture(scope="module")
def pair():
    """(our structure and weights, transformers' model), the same random weights."""
    torch.manual_seed(0)
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=CONFIG.embed_dim,
            intermediate_size=CONFIG.mlp_dim,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            image_size=IMAGE_SIZE,
            patch_size=CONFIG.patch_size,
            layer_norm_eps=CONFIG.layer_norm_eps,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # nothing zero, nothing one
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else p.shape[-1] ** -0.5))
    structure, _ = taken_apart(SigLIP(CONFIG, IMAGE_SIZE, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    tensors = {k.removeprefix("vision_model."): v.numpy() for k, v in theirs.state_dict().items()}
    return structure, convert(structure.shapes, tensors, table.RULES, table.IGNORED), theirs


def images(seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (2, IMAGE_SIZE, IMAGE_SIZE, 3)).astype("f")


def close(ours, theirs, tolerance=1e-4):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_every_layer_agrees_with_transformers(pair):
    structure, weights, theirs = pair
    image = images()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2)), output_hidden_states=True)
    module = structure.merge(weights)
    x = module.patch_embed(patches(image, CONFIG.patch_size)) + module.position_embed[...][None]
    close(x, expected.hidden_states[0])

    def block(layer, x, _):
        x = layer(x)
        return x, x

    _, outputs = run_layers(module.layers, x, block)
    for i in range(CONFIG.num_layers):
        close(outputs[i], expected.hidden_states[i + 1])
    close(module(image), expected.last_hidden_state)


@pytest.mark.slow
def test_gradients_agree_with_transformers(pair):
    structure, weights, theirs = pair
    image = images(1)
    x = torch.from_numpy(image.transpose(0, 3, 1, 2)).requires_grad_()
    theirs.zero_grad()
    out = theirs(x).last_hidden_state
    cotangent = np.random.default_rng(2).standard_normal(out.shape).astype("f")
    (out * torch.from_numpy(cotangent)).sum().backward()

    def loss(weights, image):
        return jnp.sum(structure.merge(weights)(image) * cotangent)

    grads, grad = jax.grad(loss, argnums=(0, 1))(weights, image)
    close(grad.transpose(0, 3, 1, 2), x.grad, 1e-3)
    tensors = {
        name.removeprefix("vision_model."): np.zeros(p.shape) if p.grad is None else p.grad.numpy()
        for name, p in theirs.named_parameters()
    }
    expected = convert(structure.shapes, tensors, table.RULES, table.IGNORED)
    assert expected.keys() == grads.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    for path, value in expected.items():
        if f"siglip.{path}" == KEYS_BIAS:
            np.testing.assert_array_equal(grads[path], 0)
            assert np.abs(value).max() < 1e-5 * largest
        else:
            np.testing.assert_allclose(
                grads[path], value, rtol=0, atol=1e-3 * np.abs(value).max(), err_msg=path
            )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_saves_memory_and_changes_nothing(pair, remat):
    _, weights, _ = pair
    image = images(3)

    def gradient(remat):
        structure, _ = taken_apart(
            SigLIP(CONFIG, IMAGE_SIZE, dtype=jnp.float32, remat=remat, rngs=nnx.Rngs(0))
        )
        grad = jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(structure.merge(w)(image)))))
        lowered = grad.lower(weights)
        compiled, products = lowered.compile(), count_matmuls(grad, weights)
        return compiled(weights), compiled.memory_analysis().temp_size_in_bytes, products

    plain, plain_bytes, plain_products = gradient("none")
    saved, saved_bytes, products = gradient(remat)
    assert saved_bytes < 0.8 * plain_bytes
    # With "dots" only those of attention, which have a batch, are computed again; with "full" all
    # but the last, and that of the values' bias.
    again = {"dots": 2, "full": 8}[remat]
    assert products - plain_products == again
    for path, value in saved.items():
        np.testing.assert_allclose(value, plain[path], rtol=1e-3, atol=1e-4)
