"""Crop, flip, mixup and normalisation: pure functions that run inside the jitted step.

Raw uint8 images stay on the device; an augmented batch exists only within its step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images / 255 - mean) / std, per channel.

    Args:
        images: uint8 (..., C).
        mean: C values, of pixels scaled to [0, 1].
        std: C values above 0.

    Returns:
        float32, shaped like `images`.

    Raises:
        ValueError: If `images` is not uint8, or mean and std do not fit it.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images are {images.dtype}; expected uint8, 0..255: normalise raw pixels, once")
    if len(mean) != images.shape[-1] or len(std) != images.shape[-1]:
        raise ValueError(
            f"mean has {len(mean)} and std {len(std)} values; expected {images.shape[-1]}, one a "
            f"channel of images {images.shape}: take both from the Dataset"
        )
    if min(std) <= 0:
        raise ValueError(f"std={tuple(std)}; expected values above 0: take it from the Dataset")
    scaled = images.astype(jnp.float32) / 255.0
    centred = scaled - jnp.asarray(mean, jnp.float32)
    return centred / jnp.asarray(std, jnp.float32)


class Crops(NamedTuple):
    """Which part of each padded image is taken, and which way round: int32 and bool (N,).

    Attributes:
        top: first row, 0..2 * pad.
        left: first column.
        flipped: left to right.
    """

    top: jax.Array
    left: jax.Array
    flipped: jax.Array


def draw_crops(key: jax.Array, count: int, *, pad: int, flip: bool) -> Crops:
    """Where so many images are cropped, and which are flipped: every offset is equally likely, each image's own.

    Args:
        key: Decides everything: same key, same result.
        count: Images.
        pad: Pixels added on each side; 0 for no crop.
        flip: Whether to flip half of the images, by chance, left to right.
    """
    row_key, column_key, flip_key = jax.random.split(key, 3)
    top = jax.random.randint(row_key, (count, 1), 0, 2 * pad + 1)
    left = jax.random.randint(column_key, (count, 1), 0, 2 * pad + 1)
    flipped = jax.random.bernoulli(flip_key, 0.5, (count, 1)) if flip else jnp.zeros((count, 1), bool)
    return Crops(top[:, 0], left[:, 0], flipped[:, 0])


def crop(crops: Crops, images: jax.Array, *, pad: int) -> jax.Array:
    """A crop of each zero-padded image back to its size, some of them flipped.

    The padding is zero in raw pixels (black), before normalisation.

    Args:
        crops: Of `draw_crops`, for as much padding.
        images: uint8 (N, H, W, C).
        pad: Pixels added on each side.

    Returns:
        uint8 (N, H, W, C).

    Raises:
        ValueError: If `images` is not uint8 of rank 4.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4:
        raise ValueError(
            f"images are {images.dtype}{images.shape}; expected uint8 (N, H, W, C): crop raw pixels, before normalise"
        )
    count, height, width, _ = images.shape
    rows = crops.top[:, None] + jnp.arange(height)  # (N, H), into the padded image
    columns = jnp.broadcast_to(jnp.arange(width), (count, width))
    columns = jnp.where(crops.flipped[:, None], width - 1 - columns, columns)
    columns = crops.left[:, None] + columns  # (N, W): crop and flip are one gather
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    # A single gather of pixels: 0.3 ms for 128 CIFAR images on two CPU cores, alone or in a scan,
    # with jax 0.10.2 and 0.12. A vmapped dynamic_slice takes 0.2 ms, but 4 ms in a scan on 0.10.2;
    # one-hot products take 1 to 3 ms, a select over the offsets 4 to 25 ms.
    batch = jnp.arange(count)[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]]


class Mixture(NamedTuple):
    """How a batch is mixed up.

    Attributes:
        lam: float32 scalar in [0, 1], the images' own share; 1 leaves them as they are.
        partner: int32 (N,), which image of the batch each is mixed with.
    """

    lam: jax.Array
    partner: jax.Array


def draw_mixture(key: jax.Array, count: int, alpha: float) -> Mixture:
    """One lam a batch, from Beta(alpha, alpha), and a random permutation of its images; alpha is 0.3 in the paper.

    Raises:
        ValueError: If alpha is not above 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}; expected above 0: leave mixup out to train without it")
    lam_key, partner_key = jax.random.split(key)
    lam = jax.random.beta(lam_key, alpha, alpha, dtype=jnp.float32)
    return Mixture(lam, jax.random.permutation(partner_key, count))


def mix(
    mixture: Mixture, images: jax.Array, labels: jax.Array, partners: jax.Array | None = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Mixes each image with another of its batch: lam * a + (1 - lam) * b. The loss mixes likewise.

    Args:
        mixture: Of `draw_mixture`.
        images: Floats (N, ...), normalised.
        labels: (N,) integers or (N, K) one-hot.
        partners: ``images[mixture.partner]`` where they are known.

    Returns:
        The mixed images, in dtype and shape of `images`, and (labels_a, labels_b, lam): `labels`, the partners' labels,
        and a float32 scalar in [0, 1].
    """
    lam, partner = mixture
    # In float32, so that bfloat16 images are rounded once.
    second = (images[partner] if partners is None else partners).astype(jnp.float32)
    first = images.astype(jnp.float32)
    mixed = (lam * first + (1.0 - lam) * second).astype(images.dtype)
    return mixed, (labels, labels[partner], lam)
