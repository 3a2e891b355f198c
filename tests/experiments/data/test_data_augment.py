"""Augmentation: windows of the padded image, flips, mixtures, and values worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import normalise
from experiments.data.augment import crop, draw_crops, draw_mixture, mix

SHAPE = (64, 6, 5, 2)


def images(shape=SHAPE):
    # No zeros: a zero in the result is padding.
    return jnp.asarray(np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8))


def augment(key, batch, *, pad, flip):
    return crop(draw_crops(key, len(batch), pad=pad, flip=flip), batch, pad=pad)


def mixup(key, batch, labels):
    return mix(draw_mixture(key, len(batch), 0.3), batch, labels)


def windows(image, pad, flip):
    """Every crop of one padded image, keyed by its bytes: (top, left, flipped)."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    found = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[top : top + height, left : left + width]
            found[window.tobytes()] = (top, left, False)
            if flip:
                found[window[:, ::-1].tobytes()] = (top, left, True)
    return found


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("pad", "flip"), [(2, True), (2, False), (0, True)])
def test_results_are_windows_of_the_padded_image(pad, flip, jit):
    batch = images()
    function = jax.jit(augment, static_argnames=("pad", "flip")) if jit else augment
    result = function(jax.random.key(0), batch, pad=pad, flip=flip)
    assert result.dtype == jnp.uint8 and result.shape == SHAPE
    seen = [
        windows(before, pad, flip)[after.tobytes()]
        for before, after in zip(np.asarray(batch), np.asarray(result), strict=True)
    ]
    tops, lefts, flips = (set(values) for values in zip(*seen, strict=True))
    assert tops == lefts == set(range(2 * pad + 1))
    assert flips == ({False, True} if flip else {False})


def test_offsets_and_flips_are_uniform_and_independent():
    # One image many times, its windows recognised through a unique bright pixel in the middle.
    batch = jnp.zeros((18_000, 9, 9, 1), jnp.uint8).at[:, 4, 3, 0].set(255)
    batch = batch.at[:, 4, 5, 0].set(100)
    result = np.asarray(augment(jax.random.key(1), batch, pad=1, flip=True))[..., 0]
    _, rows, columns = np.nonzero(result == 255)
    _, _, others = np.nonzero(result == 100)
    flipped = others < columns
    cells = np.stack([rows - 3, (columns + others) // 2 - 3, flipped])
    counts = np.bincount(np.ravel_multi_index(cells, (3, 3, 2)), minlength=18)
    assert np.abs(counts - 1000).max() < 150  # About 5 standard deviations.


def test_same_key_same_result_other_key_other_result():
    batch = images()
    first, again, other = (np.asarray(augment(jax.random.key(seed), batch, pad=2, flip=True)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_nothing_asked_nothing_done():
    batch = images()
    np.testing.assert_array_equal(augment(jax.random.key(0), batch, pad=0, flip=False), batch)


def test_crop_refuses():
    crops = draw_crops(jax.random.key(0), 64, pad=4, flip=True)
    with pytest.raises(ValueError, match="float32.*expected uint8"):
        crop(crops, jnp.zeros(SHAPE), pad=4)
    with pytest.raises(ValueError, match=r"\(6, 5, 2\).*expected uint8 \(N, H, W, C\)"):
        crop(crops, images()[0], pad=4)


def test_normalise_by_hand():
    pixels = jnp.asarray([[[[0, 51, 255]]]], jnp.uint8)
    result = normalise(pixels, (0.5, 0.2, 0.25), (0.5, 0.4, 0.25))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [[[[-1.0, 0.0, 3.0]]]], atol=1e-6)


def test_normalise_refuses():
    with pytest.raises(ValueError, match="float32; expected uint8"):
        normalise(jnp.zeros(SHAPE), (0.5, 0.5), (0.2, 0.2))
    with pytest.raises(ValueError, match="mean has 3.*expected 2"):
        normalise(images(), (0.5, 0.5, 0.5), (0.2, 0.2))
    with pytest.raises(ValueError, match="std=.*above 0"):
        normalise(images(), (0.5, 0.5), (0.2, 0.0))


@pytest.mark.parametrize("one_hot", [False, True])
def test_mixup_is_the_stated_convex_combination(one_hot):
    labels = jnp.arange(64)
    batch = jnp.broadcast_to(labels.astype(jnp.float32)[:, None], (64, 3))
    given = jax.nn.one_hot(labels, 64) if one_hot else labels
    mixed, (first, second, lam) = mixup(jax.random.key(0), batch, given)
    partner = second.argmax(-1) if one_hot else second
    np.testing.assert_array_equal(first, given)
    np.testing.assert_array_equal(np.sort(partner), labels)  # A permutation.
    assert lam.shape == () and lam.dtype == jnp.float32 and 0 <= lam <= 1
    expected = lam * labels + (1 - lam) * partner
    np.testing.assert_allclose(mixed, np.broadcast_to(expected[:, None], (64, 3)), rtol=1e-6)


def test_lam_is_beta_distributed():
    batch, labels = jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 4000)
    lams = np.asarray(jax.vmap(lambda key: mixup(key, batch, labels)[1][2])(keys))
    assert lams.mean() == pytest.approx(0.5, abs=0.03)  # Symmetric ...
    assert (lams < 0.1).mean() == pytest.approx((lams > 0.9).mean(), abs=0.04)
    assert lams.var() == pytest.approx(1 / (4 * (2 * 0.3 + 1)), abs=0.01)  # ... with Beta's spread.


def test_mixup_keeps_dtype_and_follows_its_key():
    batch = normalise(images(), (0.4, 0.5), (0.2, 0.3)).astype(jnp.bfloat16)
    labels = jnp.arange(64)
    run = jax.jit(lambda seed: mixup(jax.random.key(seed), batch, labels))
    first, again, other = run(0), run(0), run(1)
    assert first[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1][2] == again[1][2] != other[1][2]


def test_a_mixture_refuses():
    with pytest.raises(ValueError, match="alpha=0"):
        draw_mixture(jax.random.key(0), 64, 0)


def test_partners_that_are_known_make_the_same_mixture():
    keys = jax.random.split(jax.random.key(7))
    batch, labels = images((8, 6, 5, 3)), jnp.arange(8)
    crops, mixture = draw_crops(keys[0], 8, pad=2, flip=True), draw_mixture(keys[1], 8, 0.3)

    def seen(crops, batch):
        return normalise(crop(crops, batch, pad=2), (0.5,) * 3, (0.25,) * 3)

    partners = seen(*jax.tree.map(lambda array: array[mixture.partner], (crops, batch)))
    found, expected = mix(mixture, seen(crops, batch), labels, partners), mix(mixture, seen(crops, batch), labels)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
