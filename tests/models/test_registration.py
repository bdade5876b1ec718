import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import golden, nhwc, random_batch, tiny

from htfa_jax.models import registration
from htfa_jax.models.registration import Affine

G = golden("level2_affine")


def whole(batch, size):
    return jnp.tile(jnp.array([[0, 0, size, size]], jnp.float32), (batch, 1))


@pytest.mark.parametrize("name,threshold", [("boxes", 0.01), ("boxes_threshold_0.6", 0.6)])
def test_intensity_boxes_agree_with_reference_vectors(name, threshold):
    images = nhwc(G["images"])
    bright = registration.foreground(images, whole(len(images), 56), threshold)
    np.testing.assert_array_equal(registration.box_of(bright)[0], G[name])


def test_boxes_of_one_channel_agree_with_reference_vectors():
    one = nhwc(G["images"][:, :1])
    bright = registration.foreground(one, whole(len(one), 56), 0.01)
    np.testing.assert_array_equal(registration.box_of(bright)[0], G["boxes_one_channel"])


def pair_affines() -> Affine:
    boxes = jnp.asarray(G["boxes"], jnp.float32)
    return registration.affine_between(boxes[G["pairs"][:, 0]], boxes[G["pairs"][:, 1]])


def test_matrices_agree_with_reference_vectors():
    affine, expected = pair_affines(), G["matrices"]
    np.testing.assert_allclose(affine.scale_B2, expected[:, [0, 1], [0, 1]], rtol=1e-6)
    np.testing.assert_allclose(affine.shift_B2, expected[:, :2, 2], rtol=1e-5, atol=1e-5)


def test_aligned_features_agree_with_reference_vectors():
    features = jnp.asarray(G["align.features"])
    mask = alignment_mask(G["align.mask"][:, 0])
    for i in range(len(G["pairs"])):
        affine = jax.tree.map(lambda x, i=i: jnp.tile(x[i : i + 1], (2, 1)), pair_affines())
        out = registration.resample_tokens(features, affine, (56, 56), offset=0.0)
        np.testing.assert_allclose(out, G["align.plain"][i], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out * mask, G["align.masked"][i], rtol=1e-5, atol=1e-5)


def alignment_mask(mask):
    from htfa_jax.models.registration import at_cells

    return at_cells(jnp.asarray(mask), 8)[..., None]


def test_cell_centres_map_onto_each_other():
    """An image of its own coordinates, moved: every cell must hold where it came from."""
    size, cells = 40, 10
    affine = Affine(jnp.array([[0.5, 0.8]]), jnp.array([[6.0, 3.0]]))
    centre = (jnp.arange(cells) + 0.5) * (size / cells)
    grid = jnp.stack(jnp.meshgrid(centre, centre), axis=-1)[None]  # (x, y) of each cell
    out = registration.resample(grid, affine, (size, size))
    expected = (grid - affine.shift_B2[:, None, None]) / affine.scale_B2[:, None, None]
    inside = ((expected > 2) & (expected < size - 2)).all(axis=-1)
    assert inside.sum() > 10
    np.testing.assert_allclose(out[inside], expected[inside], rtol=1e-5)


def test_a_box_lands_on_the_other_box():
    """Warping a filled box by the boxes' affine fills the original's box, and nothing else."""
    size = 60
    box_orig, box_recon = jnp.array([[10.0, 20, 30, 15]]), jnp.array([[25.0, 5, 20, 40]])
    recon = registration.box_mask(box_recon, (size, size))[..., None].astype(jnp.float32)
    out = registration.resample(
        recon, registration.affine_between(box_orig, box_recon), (size, size)
    )
    expected = registration.box_mask(box_orig, (size, size))
    np.testing.assert_array_equal(out[..., 0] > 0.5, expected)


def test_identity_changes_nothing_and_outside_is_zero():
    image = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    np.testing.assert_allclose(
        registration.resample(image, registration.identity_affine(2), (12, 12)), image, atol=1e-6
    )
    far = Affine(jnp.ones((2, 2)), jnp.full((2, 2), 30.0))
    np.testing.assert_array_equal(registration.resample(image, far, (12, 12)), 0)


@pytest.mark.slow
def test_every_sample_uses_its_own_box():
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    boxes = (
        jnp.array([[2.0, 3, 8, 9], [5.0, 1, 6, 12]]),
        jnp.array([[1.0, 1, 10, 5], [0.0, 4, 9, 9]]),
    )
    affine = registration.affine_between(*boxes)
    both = registration.resample(images, affine, (16, 16))
    for i in range(2):
        alone = jax.tree.map(lambda x, i=i: x[i : i + 1], affine)
        np.testing.assert_allclose(
            registration.resample(images[i : i + 1], alone, (16, 16))[0],
            both[i],
            rtol=1e-5,
            atol=1e-6,
        )

    config = tiny()
    batch = random_batch(config, size=3)
    together = registration.register(batch, config)
    for i in range(3):
        alone = registration.register(jax.tree.map(lambda x, i=i: x[i : i + 1], batch), config)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a[0], b[i], rtol=1e-4, atol=1e-5)


def test_box_sources_in_order_of_preference():
    size = 20
    dark = np.zeros((4, size, size, 3), np.float32)
    dark[:, 4:9, 6:12] = 0.7
    dark[3] = 0.5  # an ordinary photograph: everything is foreground
    known = [
        (jnp.full((4, 4), 1.0), jnp.array([True, False, False, False]), registration.BOXES),
        (jnp.full((4, 4), 2.0), jnp.array([True, True, False, False]), registration.MASK),
    ]
    box, source = registration.find_box(dark, whole(4, size), 0.01, known)
    expected = [registration.BOXES, registration.MASK, registration.INTENSITY, registration.NO_BOX]
    np.testing.assert_array_equal(source, expected)
    np.testing.assert_array_equal(box[:3], [[1] * 4, [2] * 4, [6, 4, 6, 5]])


def test_padding_is_not_foreground():
    """Letterbox padding is grey after normalisation, and must not become the object."""
    image = np.full((1, 20, 20, 3), 0.5, np.float32)
    image[0, 5:15] = 0.0  # the image: a dark stripe between padding
    image[0, 8:11, 3:7] = 0.9
    region = jnp.array([[0.0, 5, 20, 10]])
    box, source = registration.find_box(image, region, 0.01, [])
    np.testing.assert_array_equal(box, [[3, 8, 4, 3]])
    assert source[0] == registration.INTENSITY


def test_a_black_image_has_no_box_and_counts_as_a_whole():
    region = jnp.array([[0.0, 8, 32, 16]])
    box, source = registration.find_box(np.zeros((1, 32, 32, 3), np.float32), region, 0.01, [])
    np.testing.assert_array_equal(box, region)
    assert source[0] == registration.NO_BOX
