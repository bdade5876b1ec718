"""The tiny pretrained parts: their texts are true, and PyTorch's classes compute the same."""

import ml_dtypes
import numpy as np
import pytest
import tiny_siglip
import tiny_text
import torch
from flax import nnx
from pretrain import PretrainArgs, tiny_config, write
from support import random_weights

from htfa_jax.common import param_paths
from htfa_jax.config import override
from htfa_jax.models.factory import Model
from htfa_jax.training import vq_stage
from weights_convert import to_hf, vq
from weights_convert.convert import convert
from weights_convert.source import Source


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Sizes even smaller than tiny."""
    small = {
        "siglip.embed_dim": 32, "siglip.num_layers": 2, "siglip.num_heads": 2,
        "siglip.mlp_dim": 48, "level2.num_heads": 2, "decoder.vocab_size": 300,
    }  # fmt: skip
    return override(tiny_config(PretrainArgs(out=tmp_path_factory.mktemp("tiny"))), small)


def rounded(x):
    """What bfloat16 keeps."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)


META = {"category": "bottle", "color": "orange", "occlusion": 0.8}


def test_captions_state_what_is_so():
    rng = np.random.default_rng(0)
    seen = {kind: set() for kind in tiny_text.KINDS}
    for kind in tiny_text.KINDS:
        image = tiny_text.truth(kind, META)
        for _ in range(200):
            text, stated = tiny_text.caption(image, rng)
            seen[kind].add(text)
            facts = dict(fact.split("=") for fact in stated)
            assert all(image.facts[group] == value for group, value in facts.items())
            assert set(facts) <= set(image.known)
            assert ("bottle" in text) == ("category" in facts)
            assert ("orange" in text) == ("color" in facts)
            assert "a orange" not in text and "an bottle" not in text
    assert "a hand hides most of a bottle" in seen["original"]
    assert "an orange bottle and no hand" in seen["target"] - seen["original"]
    assert "a 3D model of a bottle" in seen["reconstruction"]
    assert not any("orange" in text for text in seen["reconstruction"])
    assert not any("hand" in text for text in seen["blend"])


def test_which_pairs_fit():
    """A caption fits where all that it states is shown; a colour that nobody knows is left out."""
    other = {"category": "bottle", "color": "red", "occlusion": 0.1}
    images = [tiny_text.truth("original", META), tiny_text.truth("target", other),
                tiny_text.truth("reconstruction", META)]  # fmt: skip
    stated = [("category=bottle",), ("category=bottle", "color=orange"),
              ("category=bottle", "hand=no")]  # fmt: skip
    shown = np.stack([tiny_text.vectors(p.facts) for p in images]).astype(float)
    unknown = np.stack([tiny_text.unknown(p) for p in images]).astype(float)
    claims = np.stack([tiny_text.vectors(s) for s in stated]).astype(float)
    fits, counts = tiny_siglip.fitting(shown, unknown, claims)
    np.testing.assert_array_equal(
        counts, [[True, True, True], [True, True, True], [True, False, True]]
    )
    np.testing.assert_array_equal(
        fits & counts, [[True, True, False], [True, False, True], [True, False, True]]
    )


@pytest.mark.slow
def test_both_towers_are_those_of_transformers(config, tmp_path):
    from transformers import SiglipModel

    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: tiny_siglip.TwoTowers(config, rngs=nnx.Rngs(0)))
    )
    model = Model(graphdef, param_paths.flatten(state))
    params = {
        k: np.asarray(v, "bfloat16").astype("float32") for k, v in random_weights(model).items()
    }
    write(
        tmp_path / "s", tiny_siglip.tensors(params, config.siglip), tiny_siglip.description(config)
    )
    theirs = SiglipModel.from_pretrained(tmp_path / "s", dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    image_BHWC = rng.uniform(-1, 1, (3, 112, 112, 3)).astype(np.float32)
    tokens_BL = rng.integers(0, 300, (2, tiny_siglip.CAPTION_TOKENS))
    ours = model.merge(params)
    logits = ours.logits(ours.see(image_BHWC), ours.read(tokens_BL))
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(tokens_BL),
            pixel_values=torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy()),
        ).logits_per_image
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=1e-4)


def test_the_loss_is_that_of_transformers():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (5, 5)).astype(np.float32)
    fits = np.eye(5, dtype=bool)
    ours = tiny_siglip.sigmoid_loss(logits, fits, np.ones_like(fits))
    # As SiglipModel.forward(return_loss=True) computes it.
    signs = torch.from_numpy(2.0 * fits - 1)
    expected = -torch.nn.functional.logsigmoid(signs * torch.from_numpy(logits)).sum(-1).mean()
    assert ours == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_the_tokenizer_is_that_of_transformers(config, tmp_path):
    from transformers import JanusVQVAE

    model = vq_stage.build_vq(config)
    params = {k: rounded(v) for k, v in random_weights(model).items()}
    write(tmp_path / "vq", to_hf.vq_tensors(params), to_hf.vq_config(config.vq, config.image_size))
    theirs = JanusVQVAE.from_pretrained(tmp_path / "vq", dtype=torch.float32).eval()
    ours, stem = model.merge(params), config.vq.stem
    rng = np.random.default_rng(0)
    image_BHWC = rng.uniform(-1, 1, (2, 112, 112, 3)).astype(np.float32)
    squares = image_BHWC.reshape(2, 112 // stem, stem, 112 // stem, stem, 3)
    pixels = squares.transpose(0, 2, 4, 5, 1, 3).reshape(2, 3 * stem**2, 112 // stem, -1)
    # Which code is nearest, transformers decides without normalising, unlike Janus's own code.
    codes_BM = rng.integers(0, config.vq.codebook_size, (2, 49))
    with torch.no_grad():
        z_BEHW = theirs.quant_conv(theirs.encoder(torch.from_numpy(pixels.copy())))
        squares = theirs.decode(torch.from_numpy(codes_BM)).permute(0, 2, 3, 1)
    expected = torch.nn.functional.normalize(z_BEHW.flatten(2).transpose(1, 2), dim=-1)
    np.testing.assert_allclose(ours.encoder(image_BHWC), expected, atol=2e-4, rtol=1e-4)
    pixels = squares.reshape(2, 112 // stem, 112 // stem, stem, stem, 3).transpose(2, 3)
    expected = pixels.reshape(2, 112, 112, 3)
    np.testing.assert_allclose(ours.decode(codes_BM), expected, atol=2e-4, rtol=1e-4)
    source = Source(str(tmp_path / "vq"))
    spec = vq.conversion_spec(source)
    assert spec.sizes == config.vq
    back = dict(convert(spec.shapes, {k: source.read(k) for k in source.keys}, spec.rules, {}))
    for path, value in params.items():
        np.testing.assert_array_equal(np.asarray(back[path], np.float32), value)
