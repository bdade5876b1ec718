import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support import compile_as_for, golden, taken_apart
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from htfa_jax.config import VQConfig
from htfa_jax.models.vq import VQ, depth_to_space, l2_normalize, space_to_depth
from htfa_jax.sharding.mesh import Backend
from weights_convert import vq as table
from weights_convert.convert import convert

CONFIG = VQConfig(
    base_channels=32,
    channel_multipliers=(1, 1, 2),
    num_res_blocks=2,
    attention="lowest",
    z_channels=12,
    codebook_size=50,
    codebook_dim=6,
    normalize_codes=True,
)
SIZE = 32  # 8 x 8 codes


def structure_of(config=CONFIG):
    return taken_apart(VQ(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))[0]


@pytest.fixture(scope="module")
def pair():
    """(our structure and weights, transformers' model), the same random weights."""
    torch.manual_seed(0)
    theirs = JanusVQVAE(
        JanusVQVAEConfig(
            base_channels=CONFIG.base_channels,
            channel_multiplier=list(CONFIG.channel_multipliers),
            num_res_blocks=CONFIG.num_res_blocks,
            latent_channels=CONFIG.z_channels,
            embed_dim=CONFIG.codebook_dim,
            num_embeddings=CONFIG.codebook_size,
            num_patches=8,
        )
    ).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise, fan_in = torch.randn_like(p), p[0].numel() if p.ndim > 1 else 1
            p.copy_(
                1 + 0.2 * noise
                if "norm" in name and "weight" in name
                else noise * (0.1 if p.ndim == 1 else fan_in**-0.5)
            )
        # Codes from encoder outputs, so that distances are not all alike. Of length 1, because
        # transformers normalises codes only when it decodes them.
        z = theirs.quant_conv(theirs.encoder(torch.from_numpy(images(9)).permute(0, 3, 1, 2)))
        z = z.permute(0, 2, 3, 1).reshape(-1, CONFIG.codebook_dim)[: CONFIG.codebook_size]
        theirs.quantize.embedding.weight.copy_(torch.nn.functional.normalize(z, dim=-1))
    structure = structure_of()
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    return structure, convert(structure.shapes, tensors, table.RULES, table.IGNORED), theirs


def images(seed=0, batch=3):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, SIZE, SIZE, 3)).astype("f")


@pytest.mark.slow
def test_agrees_with_transformers(pair):
    structure, weights, theirs = pair
    image, module = images(), structure.merge(weights)
    with torch.no_grad():
        x = torch.from_numpy(image.transpose(0, 3, 1, 2))
        z = theirs.quant_conv(theirs.encoder(x)).permute(0, 2, 3, 1).reshape(3, 64, -1)
        codes = theirs.encode(x).image_tokens.reshape(3, 64)
        painted = theirs.decode(codes).permute(0, 2, 3, 1).numpy()
    unit = torch.nn.functional.normalize(z, dim=-1).numpy()
    np.testing.assert_allclose(module.encoder(image), unit, atol=1e-4)
    products = unit @ np.asarray(module.vectors()).T
    best, second = -np.sort(-products, axis=-1)[..., :2].transpose(2, 0, 1)
    clear = best - second > 1e-4
    assert clear.mean() > 0.99
    ours = np.asarray(module.encode(image))
    np.testing.assert_array_equal(ours[clear], codes.numpy()[clear])
    assert len(np.unique(ours)) > 10
    np.testing.assert_allclose(
        module.decode(codes.numpy()), painted, rtol=0, atol=1e-4 * np.abs(painted).max()
    )


@pytest.mark.slow
def test_quantisation_agrees_with_reference_vectors():
    """Euclidean distance, and the straight-through gradient."""
    g = golden("vq")
    structure = structure_of(
        VQConfig(
            base_channels=4,
            channel_multipliers=(1,),
            num_res_blocks=1,
            z_channels=4,
            codebook_size=24,
            codebook_dim=6,
        )
    )
    weights = {p: jnp.zeros(s.shape) for p, s in structure.shapes.items()}
    weights["codebook"] = jnp.asarray(g["codebook"])
    module, z = structure.merge(weights), jnp.asarray(g["z"])
    vectors, codes = module.straight_through(z)
    np.testing.assert_array_equal(codes, g["ids"])
    np.testing.assert_allclose(vectors, g["quantized"], rtol=1e-5, atol=1e-5)
    grad = jax.grad(
        lambda z: jnp.sum(structure.merge(weights).straight_through(z)[0] * g["cotangent"])
    )(z)
    np.testing.assert_allclose(grad, g["grad_z"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_middle_attention_only_has_none_in_the_levels():
    structure = structure_of(VQConfig(**{**CONFIG.__dict__, "attention": "middle"}))
    assert not [p for p in structure.shapes if ".attentions." in p]
    assert [p for p in structure.shapes if "middle.attention" in p]


@pytest.mark.slow
def test_a_stem_keeps_sizes_and_is_undone():
    image = images()
    np.testing.assert_array_equal(depth_to_space(space_to_depth(image, 4), 4), image)
    config = VQConfig(**{**CONFIG.__dict__, "stem": 2, "channel_multipliers": (1, 2)})
    structure = structure_of(config)
    module = structure.merge({p: 0.1 * jnp.ones(s.shape) for p, s in structure.shapes.items()})
    codes = module.encode(image)
    assert codes.shape == (3, 64)
    assert module.decode(codes).shape == image.shape


@pytest.mark.parametrize("backend", [Backend("cpu"), Backend("gpu", 9)], ids=lambda b: b.platform)
def test_the_nearest_code_is_found_exactly(backend, monkeypatch):
    """Among vectors that lie close together, against float64."""
    rng = np.random.default_rng(0)
    z = l2_normalize(jnp.asarray(rng.normal(size=(2, 300, 8))))
    vectors = l2_normalize(jnp.asarray(rng.normal(size=(512, 8))))
    structure = structure_of(
        VQConfig(**{**CONFIG.__dict__, "codebook_size": 512, "codebook_dim": 8})
    )
    weights = {p: jnp.zeros(s.shape) for p, s in structure.shapes.items()} | {"codebook": vectors}
    exact = np.float64(z) @ np.float64(vectors).T
    compile_as_for(monkeypatch, backend)
    nearest = jax.jit(lambda z: structure.merge(weights).nearest(z))
    np.testing.assert_array_equal(nearest(z), exact.argmax(axis=-1))
