"""VQ tokenizers of four codebases compute the same after conversion."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file
from torch.nn import Conv2d, Embedding, GroupNorm, Module, ModuleList, functional
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
)
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from htfa_jax.checkpoints.weights import WEIGHTS, load_component, read_weights
from htfa_jax.common.param_paths import flatten
from htfa_jax.config import VQConfig
from htfa_jax.errors import CheckpointError
from htfa_jax.models.factory import Model
from htfa_jax.models.layers import make_rngs
from htfa_jax.models.vq import VQ
from weights_convert import vq
from weights_convert.convert import plan
from weights_convert.folder import write_folder
from weights_convert.source import Source
from weights_convert.verify import verify

# As deep as the published ones, but narrow.
SIZES = VQConfig(
    base_channels=32,
    channel_multipliers=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    attention="lowest",
    z_channels=12,
    codebook_size=20,
    codebook_dim=6,
    normalize_codes=True,
)
CHAMELEON = VQConfig(**{**vars(SIZES), "attention": "middle", "normalize_codes": False})
BATCH, SIDE, GRID = 3, 64, 4


# The architecture as taming-transformers ("down") and Janus ("conv_blocks") write it; modules are
# called what they are called there, so the names of the tensors are the published ones.


class Block(Module):
    def __init__(self, inside, out):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(32, inside, 1e-6), Conv2d(inside, out, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(32, out, 1e-6), Conv2d(out, out, 3, padding=1)
        if inside != out:
            self.nin_shortcut = Conv2d(inside, out, 1)

    def forward(self, x):
        y = self.conv1(functional.silu(self.norm1(x)))
        y = self.conv2(functional.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(Module):
    def __init__(self, width):
        super().__init__()
        self.norm = GroupNorm(32, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (part(y).flatten(2) for part in (self.q, self.k, self.v))
        weights = torch.softmax(q.mT @ k / q.shape[1] ** 0.5, dim=-1)
        return x + self.proj_out((v @ weights.mT).reshape(x.shape))


class Downsample(Module):
    def __init__(self, width):
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(Module):
    def __init__(self, width):
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(functional.interpolate(x, scale_factor=2.0))


class Half(Module):
    """Encoder or decoder."""

    def __init__(self, style, sizes, decoder):
        super().__init__()
        self.style, self.is_decoder, last = style, decoder, len(sizes.channel_multipliers) - 1
        widths = [sizes.base_channels * m for m in sizes.channel_multipliers]
        order = range(last, -1, -1) if decoder else range(last + 1)
        width = widths[last] if decoder else sizes.base_channels
        self.conv_in = Conv2d(sizes.z_channels if decoder else 3, width, 3, padding=1)
        middle = [Block(widths[last], widths[last]), Attention(widths[last])]
        middle.append(Block(widths[last], widths[last]))
        if style == "janus":
            self.mid = ModuleList(middle)
        else:
            self.mid = Module()
            self.mid.block_1, self.mid.attn_1, self.mid.block_2 = middle
        levels = ModuleList()
        for i in order:
            level, blocks, level.attn = Module(), ModuleList(), ModuleList()
            for _ in range(sizes.num_res_blocks + decoder):
                blocks.append(Block(width, widths[i]))
                width = widths[i]
                if i == last and sizes.attention == "lowest":
                    level.attn.append(Attention(width))
            setattr(level, "res" if style == "janus" else "block", blocks)
            if decoder and i:
                level.upsample = Upsample(width)
            if not decoder and i < last:
                level.downsample = Downsample(width)
            # taming-transformers puts the decoder's levels in front of each other.
            levels.insert(0 if decoder and style == "taming" else len(levels), level)
        setattr(self, self.list_name, levels)
        self.norm_out = GroupNorm(32, width, 1e-6)
        self.conv_out = Conv2d(width, 3 if decoder else sizes.z_channels, 3, padding=1)

    @property
    def list_name(self):
        return "conv_blocks" if self.style == "janus" else "up" if self.is_decoder else "down"

    def forward(self, x):
        levels = list(getattr(self, self.list_name))
        levels = levels[::-1] if self.is_decoder and self.style == "taming" else levels
        x = self.conv_in(x)
        if self.is_decoder:
            x = self.middle(x)
        for level in levels:
            for j, block in enumerate(level.res if self.style == "janus" else level.block):
                x = block(x)
                x = level.attn[j](x) if len(level.attn) else x
            for sample in ("upsample", "downsample"):
                x = getattr(level, sample)(x) if hasattr(level, sample) else x
        x = x if self.is_decoder else self.middle(x)
        return self.conv_out(functional.silu(self.norm_out(x)))

    def middle(self, x):
        for block in self.mid.children():
            x = block(x)
        return x


class Reference(Module):
    def __init__(self, style, sizes):
        super().__init__()
        self.encoder, self.decoder = Half(style, sizes, False), Half(style, sizes, True)
        self.quantize = Module()
        self.quantize.embedding = Embedding(sizes.codebook_size, sizes.codebook_dim)
        if style == "janus":
            self.quantize.register_buffer("codebook_used", torch.zeros(65536))
        self.quant_conv = Conv2d(sizes.z_channels, sizes.codebook_dim, 1)
        self.post_quant_conv = Conv2d(sizes.codebook_dim, sizes.z_channels, 1)


def images(seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (BATCH, SIDE, SIDE, 3)).astype("f")
    # Brightness and contrast that change from place to place, or all codes were alike.
    coarse = np.random.default_rng(seed + 1).uniform(-1, 1, (2, BATCH, GRID, GRID, 3)).astype("f")
    shift, contrast = coarse.repeat(SIDE // GRID, axis=2).repeat(SIDE // GRID, axis=3)
    return x * contrast + shift


def continuous(theirs, x_BHWC):
    """[B, M, E], not normalised."""
    x = torch.from_numpy(x_BHWC.transpose(0, 3, 1, 2))
    return theirs.quant_conv(theirs.encoder(x)).flatten(2).mT


@torch.no_grad()
def randomized(theirs, seed):
    """Random weights, none of them zero, and codes from what the encoder gives."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in theirs.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        is_scale, fan_in = "norm" in name and "weight" in name, p[0].numel()
        p.copy_(1 + 0.2 * noise if is_scale else noise * (0.1 if p.ndim == 1 else fan_in**-0.5))
    table = theirs.quantize.embedding.weight
    z = continuous(theirs, images(9)).flatten(0, 1)
    table.copy_(z[torch.randperm(len(z), generator=generator)[: len(table)]])
    return theirs.eval()


@functools.cache
def program(sizes):
    """weights, images -> continuous codes, codes, painted images; compiled once."""
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: VQ(sizes, dtype=jnp.dtype("float32"), rngs=make_rngs(0)))
    )
    structure = Model(graphdef, flatten(state))

    @jax.jit
    def run(weights, x):
        module = structure.merge(weights)
        z = module.encoder(x)
        codes = module.nearest(z)
        return z, codes, module.decode(codes) if sizes.has_decoder else None

    return run


def converted(source, spec, folder):
    """The program with the weights of a weight folder that was written to `folder`."""
    write_folder(source, spec, folder)
    weights = load_component(folder, "vq", spec.sizes, spec.shapes)
    weights = {path: array.astype(np.float32) for path, array in weights.items()}
    return functools.partial(program(spec.sizes), weights)


@torch.no_grad()
def agree(ours, theirs, sizes):
    """Asserts equal continuous codes, codes and (if there is a decoder) images."""
    x, table = images(), theirs.quantize.embedding.weight
    z = continuous(theirs, x)
    if sizes.normalize_codes:
        z, table = functional.normalize(z, dim=-1), functional.normalize(table, dim=-1)
    our_z, our_codes, our_image = map(np.array, ours(x))
    np.testing.assert_allclose(our_z, z.numpy(), rtol=0, atol=1e-4 * np.abs(z.numpy()).max())
    distances = ((z[:, :, None] - table[None, None]) ** 2).sum(-1)
    best, second = distances.topk(2, largest=False).values.unbind(-1)
    clear = (second - best > 1e-4 * distances.max()).numpy()
    assert clear.mean() >= 0.99
    np.testing.assert_array_equal(our_codes[clear], distances.argmin(-1).numpy()[clear])
    assert len(np.unique(our_codes)) > 10
    if sizes.has_decoder:
        grid = table[torch.from_numpy(our_codes)].mT.unflatten(2, (GRID, GRID))
        painted = theirs.decoder(theirs.post_quant_conv(grid)).permute(0, 2, 3, 1).numpy()
        atol = 1e-4 * np.abs(painted).max()
        np.testing.assert_allclose(our_image, painted, rtol=0, atol=atol)


def arrays(source, spec):
    """{path: array}"""
    steps = plan(spec.shapes, source, spec.rules, spec.ignored, spec.prefix)
    return {step.path: step.transform(source.read(step.key)) for step in steps}


def saved(path, tensors, **wrapping):
    torch.save({name: tensors for name in wrapping} if wrapping else tensors, path)
    return Source(path)


@pytest.fixture(scope="module")
def janus():
    theirs = randomized(Reference("janus", SIZES), 1)
    with torch.no_grad():  # codes of any length: they are normalised before they are compared
        table = theirs.quantize.embedding.weight
        table *= torch.linspace(0.5, 2, len(table))[:, None]
    return theirs


@pytest.fixture(scope="module")
def taming():
    return randomized(Reference("taming", CHAMELEON), 2)


TRAINING = {
    "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
    "loss.discriminator.main.3.num_batches_tracked": torch.tensor(5),
    "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 4, 1, 1),
}


@pytest.fixture(scope="module")
def vqgan(taming, tmp_path_factory):
    """A checkpoint as Chameleon's vqgan.ckpt."""
    path = tmp_path_factory.mktemp("chameleon") / "vqgan.ckpt"
    return saved(path, taming.state_dict() | TRAINING, state_dict=True)


def chameleon_vqvae(taming):
    """transformers' model with the encoder of a taming-transformers one."""
    theirs = ChameleonVQVAE(ChameleonVQVAEConfig(**chameleon_options()))
    kept = {k: v for k, v in taming.state_dict().items() if not k.startswith("decoder.")}
    theirs.load_state_dict(kept)  # strict: these are the same names
    return theirs.eval()


def chameleon_options(sizes=SIZES):
    return {
        "base_channels": sizes.base_channels,
        "channel_multiplier": list(sizes.channel_multipliers),
        "num_res_blocks": sizes.num_res_blocks,
        "latent_channels": sizes.z_channels,
        "embed_dim": sizes.codebook_dim,
        "num_embeddings": sizes.codebook_size,
        "resolution": SIDE,
    }


@pytest.mark.slow
def test_janus_and_llamagen_agree_with_the_published_architecture(janus, tmp_path):
    tensors = {f"gen_vision_model.{k}": v for k, v in janus.state_dict().items()}
    others = {
        "gen_embed.weight": torch.ones(4, 2),
        "vision_model.vision_tower.norm.weight": torch.ones(3),
    }
    source = saved(tmp_path / "pytorch_model.bin", tensors | others)
    spec = vq.conversion_spec(source)
    assert (spec.sizes, spec.prefix) == (SIZES, "gen_vision_model.")
    agree(converted(source, spec, tmp_path / "vq"), janus, SIZES)

    llamagen = saved(tmp_path / "vq_ds16_c2i.pt", janus.state_dict(), model=True, optimizer=True)
    same = vq.conversion_spec(llamagen)
    assert (same.sizes, same.prefix) == (SIZES, "")
    expected = arrays(source, spec)
    for path, array in arrays(llamagen, same).items():
        np.testing.assert_array_equal(array, expected[path], path)


@pytest.mark.slow
def test_transformers_janus_alone_and_inside(tmp_path):
    options = chameleon_options() | {"num_patches": GRID, "projection_dim": 16}
    options["image_token_embed_dim"] = options.pop("resolution")
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 30, "intermediate_size": 8, **tiny}
    vision = {"image_size": 16, "patch_size": 8, "projection_dim": 16, **tiny}
    whole = JanusForConditionalGeneration(
        JanusConfig(text_config=text, vision_config=vision, vq_config=options)
    )
    theirs = randomized(whole.model.vqmodel, 3)
    with torch.no_grad():  # transformers normalises codes only where it decodes them
        table = theirs.quantize.embedding.weight
        table.copy_(functional.normalize(table, dim=-1))
    whole.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "alone")
    source, alone = Source(tmp_path / "whole"), Source(tmp_path / "alone")
    spec, same = vq.conversion_spec(source), vq.conversion_spec(alone)
    assert spec.sizes == same.sizes == SIZES
    assert (spec.prefix, same.prefix) == ("model.vqmodel.", "")
    agree(converted(source, spec, tmp_path / "vq"), theirs, SIZES)
    expected = arrays(source, spec)
    for path, array in arrays(alone, same).items():
        np.testing.assert_array_equal(array, expected[path], path)


@pytest.mark.slow
def test_taming_agrees_with_the_published_architecture(taming, vqgan, tmp_path):
    spec = vq.conversion_spec(vqgan)
    assert spec.sizes == CHAMELEON
    agree(converted(vqgan, spec, tmp_path / "vq"), taming, CHAMELEON)


@pytest.mark.slow
def test_transformers_chameleon_has_no_decoder(taming, tmp_path):
    theirs = chameleon_vqvae(taming)
    whole = ChameleonForConditionalGeneration(
        ChameleonConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vq_config=chameleon_options(),
            vocabulary_map={"<image>": 3, **{f"IMGIMG{chr(65 + i)}Z": 4 + i for i in range(9)}},
        )
    )
    whole.model.vqmodel.load_state_dict(theirs.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "alone")
    source, alone = Source(tmp_path / "whole"), Source(tmp_path / "alone")
    spec, same = vq.conversion_spec(source), vq.conversion_spec(alone)
    assert spec.sizes == same.sizes == VQConfig(**{**vars(CHAMELEON), "has_decoder": False})
    assert (spec.prefix, same.prefix) == ("model.vqmodel.", "")
    agree(converted(alone, same, tmp_path / "vq"), theirs, same.sizes)
    expected = arrays(source, spec)
    for path, array in arrays(alone, same).items():
        np.testing.assert_array_equal(array, expected[path], path)


@pytest.mark.slow
def test_a_second_checkpoint_gives_the_decoder(taming, vqgan, tmp_path):
    # As published: half the precision, with a prefix.
    half = {
        f"model.vqmodel.{k}": v for k, v in chameleon_vqvae(taming).bfloat16().state_dict().items()
    }
    other = {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}
    source = saved(tmp_path / "model.pt", half | other)
    spec, merged = vq.conversion_spec(source, vqgan), vq.Merged(source, vqgan)
    assert spec.sizes == CHAMELEON and spec.prefix == "model.vqmodel."
    expected = copy.deepcopy(taming)
    for part in (expected.encoder, expected.quant_conv, expected.quantize):
        part.bfloat16().float()
    agree(converted(merged, spec, tmp_path / "vq"), expected, CHAMELEON)
    names = [file["name"] for file in merged.hashes(merged.keys)]
    assert names == ["model.pt", "decoder_from/vqgan.ckpt"]


class Shapes:
    """Stands for a checkpoint whose values do not matter."""

    name, revision, config = "shapes.pt", None, {}

    def __init__(self, tensors, prefix=""):
        self.tensors = {prefix + key: value for key, value in tensors.items()}

    @property
    def keys(self):
        return list(self.tensors)

    def __contains__(self, key):
        return key in self.tensors

    def shape(self, key):
        return tuple(self.tensors[key].shape)

    def read(self, key):
        return self.tensors[key].numpy()


JANUS_FULL = VQConfig(attention="lowest", codebook_size=16384, codebook_dim=8, normalize_codes=True)
FULL = {
    "Janus": (lambda: Reference("janus", JANUS_FULL), "gen_vision_model.", JANUS_FULL),
    "JanusVQVAE": (lambda: JanusVQVAE(JanusVQVAEConfig()), "model.vqmodel.", JANUS_FULL),
    "vqgan.ckpt": (lambda: Reference("taming", VQConfig()), "", VQConfig()),
    "ChameleonVQVAE": (
        lambda: ChameleonVQVAE(ChameleonVQVAEConfig()),
        "model.vqmodel.",
        VQConfig(has_decoder=False),
    ),
}


@pytest.mark.parametrize("kind", FULL)
def test_published_sizes(kind):
    make, prefix, sizes = FULL[kind]
    with torch.device("meta"):
        tensors = make().state_dict()
    source = Shapes(tensors, prefix)
    spec = vq.conversion_spec(source)
    assert (spec.sizes, spec.prefix) == (sizes, prefix)
    steps = plan(spec.shapes, source, spec.rules, spec.ignored, prefix)
    unused = {key.removeprefix(prefix) for key in source.keys} - {
        step.key.removeprefix(prefix) for step in steps
    }
    expected = {"quantize.codebook_used"} if kind == "Janus" else set()
    if not sizes.has_decoder:
        expected = {"post_quant_conv.weight", "post_quant_conv.bias"}
    assert unused == expected
    if kind == "Janus":  # LlamaGen's paper: 72 million
        assert sum(np.prod(s.shape) for s in spec.shapes.values()) // 10**6 == 71


def test_a_tokenizer_without_decoder_makes_no_images():
    module = nnx.eval_shape(
        lambda: VQ(VQConfig(has_decoder=False), dtype=jnp.dtype("float32"), rngs=make_rngs(0))
    )
    with pytest.raises(CheckpointError, match="cannot make them"):
        module.decode_vectors(np.zeros((1, 16, 256), np.float32))


SMALL = VQConfig(**{**vars(SIZES), "channel_multipliers": (1, 2), "num_res_blocks": 1})
STYLES = {
    "janus": ("gen_vision_model.", "decoder.conv_blocks.1.res.0.conv1.bias"),
    "taming": ("", "decoder.up.0.block.1.norm2.weight"),
}


@pytest.fixture
def small(request):
    """Tensors of a small checkpoint, their prefix, one of them."""
    with torch.device("meta"):
        tensors = Reference(request.param, SMALL).state_dict()
    return dict(tensors), *STYLES[request.param]


@pytest.mark.parametrize("small", STYLES, indirect=True)
def test_names_what_is_missing_and_what_is_too_much(small):
    tensors, prefix, lost = small
    del tensors[lost]
    tensors["decoder.surplus.weight"] = torch.ones(2)
    source = Shapes(tensors, prefix)
    spec = vq.conversion_spec(source)
    with pytest.raises(CheckpointError) as error:
        plan(spec.shapes, source, spec.rules, spec.ignored, spec.prefix)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2
    assert f"no tensor {prefix}{lost}" in lines[0]
    assert lines[1] == f"  tensor {prefix}decoder.surplus.weight is not used"


@pytest.mark.parametrize("small", ["taming"], indirect=True)
def test_taming_with_attention_and_other_names_of_the_codebook(small):
    tensors, _, _ = small
    spec = vq.conversion_spec(Shapes(tensors))
    assert spec.sizes == VQConfig(**{**vars(SMALL), "normalize_codes": False})
    averages = {"cluster_size": torch.empty(20), "embed_avg": torch.empty(20, 6)}
    averages = {f"quantize.embedding.{k}": v for k, v in averages.items()}
    plan(spec.shapes, Shapes(tensors | averages), spec.rules, spec.ignored)
    tensors["quantize.embed.weight"] = tensors.pop("quantize.embedding.weight")
    spec = vq.conversion_spec(Shapes(tensors))
    steps = plan(spec.shapes, Shapes(tensors), spec.rules, spec.ignored)
    assert [step.key for step in steps if step.path == "codebook"] == ["quantize.embed.weight"]


def without(*keys):
    return lambda tensors: [tensors.pop(key) for key in keys]


def with_(**shapes):
    return lambda tensors: tensors.update(
        {key.replace("__", "."): torch.empty(shape) for key, shape in shapes.items()}
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (without("encoder.conv_out.weight"), "shapes.pt has no tensor encoder.conv_out.weight"),
        (without("quantize.embedding.weight"), "no codebook: expected quantize.embedding.weight"),
        (without(vq.TAMING.first), r"shapes.pt holds no VQ tokenizer: .*found none"),
        (with_(quantize__proj__weight=(20, 12, 1, 1)), "Gumbel"),
        (with_(quantize__embedding__weight=(1, 20, 6)), r"of shape \(1, 20, 6\); expected 2 axes"),
        (with_(encoder__conv_in__weight=(16, 3, 3, 3)), "starts with 16 channels"),
        (with_(encoder__conv_in__weight=(64, 3, 3, 3)), "starts with 64 channels"),
        (with_(encoder__down__0__attn__0__q__weight=(32, 32, 1, 1)), r"levels \[0, 1\] of 2"),
        (
            with_(ema__encoder__down__0__block__0__conv1__weight=(32, 32, 3, 3)),
            "found encoder.down.0.block.0.conv1.weight, ema.encoder.down.0",
        ),
    ],
)
@pytest.mark.parametrize("small", ["taming"], indirect=True)
def test_refuses_what_ours_cannot_be(small, change, message):
    tensors, _, _ = small
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        vq.conversion_spec(Shapes(tensors))


def test_refuses_decoders_that_do_not_belong():
    tensors = Reference("taming", SMALL).state_dict()
    whole = Shapes(tensors)
    encoder = Shapes({k: v for k, v in tensors.items() if not k.startswith("decoder.")}, "vq.")
    vq.conversion_spec(encoder, whole)
    other = tensors | {"quantize.embedding.weight": tensors["quantize.embedding.weight"].flip(0)}
    larger = Reference("taming", VQConfig(**{**vars(SMALL), "codebook_size": 21})).state_dict()
    broken = {k: v for k, v in tensors.items() if k != "decoder.norm_out.bias"}
    for first, second, message in [
        (whole, whole, "shapes.pt has a decoder"),
        (encoder, encoder, "shapes.pt has no decoder"),
        (encoder, Shapes(other), "codes differ"),
        (encoder, Shapes(larger), "codebook_size 21 instead of 20"),
        (encoder, Shapes(broken), "no tensor decoder.norm_out.bias"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            vq.conversion_spec(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["taming", "janus", "transformers"])
def test_verify_runs_the_checkpoint_beside_ours(naming, tmp_path):
    """Of fewer levels; those of the published ones are compared above."""
    sizes = VQConfig(**{**vars(SMALL), "channel_multipliers": (1, 1, 2)})
    if naming == "transformers":
        theirs = randomized(JanusVQVAE(JanusVQVAEConfig(**chameleon_options(sizes))), 3)
        theirs.save_pretrained(tmp_path / "model")
        source = Source(tmp_path / "model")
    else:
        theirs = randomized(Reference(naming, sizes), 3)
        source = saved(tmp_path / "model.pt", theirs.state_dict())
    write_folder(source, vq.conversion_spec(source), tmp_path / "vq")
    shown = verify(tmp_path / "vq", source)
    assert "0 differ where the nearest is clear" in shown and "decoded image" in shown
    weights = read_weights(tmp_path / "vq")
    weights["decoder.conv_out.bias"] = weights["decoder.conv_out.bias"] + 1
    save_file(weights, tmp_path / "vq" / WEIGHTS)
    with pytest.raises(CheckpointError, match="does not compute what"):
        verify(tmp_path / "vq", source)


@pytest.mark.slow
def test_verify_takes_both_checkpoints_of_a_merged_one(taming, vqgan, tmp_path):
    source = saved(tmp_path / "model.pt", chameleon_vqvae(taming).state_dict())
    write_folder(vq.Merged(source, vqgan), vq.conversion_spec(source, vqgan), tmp_path / "vq")
    assert "decoded image" in verify(tmp_path / "vq", source, vqgan)
    with pytest.raises(CheckpointError, match="is not the file that"):
        verify(tmp_path / "vq", source)
