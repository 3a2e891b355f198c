"""The method once more, independent of the package: numpy loops over kernels, sums in float64.

Read from method.md, sections 3 to 6. Slow on purpose: nothing here is clever.
"""

import math
from fractions import Fraction

import numpy as np

EPSILON = 1e-8


def to_hwio(array):
    return np.transpose(array, (2, 3, 1, 0))


def removed_count(percent, number):
    """``percent`` percent of ``number``, rounded up, in exact arithmetic."""
    return math.ceil(Fraction(percent, 100) * number)


def blocks(size, step):
    step = step or size
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def kernel_mask(scores, percent, tile=(1, 1)):
    """bool (kh, kw, cin, cout): the smallest tiles removed, ties by lowest index, filters (cout) outermost."""
    scores = np.asarray(scores, np.float64)
    filters, channels = tile
    tiles = [(o, i) for o in blocks(scores.shape[3], filters) for i in blocks(scores.shape[2], channels)]
    ranked = sorted((scores[:, :, i, o].sum(), index) for index, (o, i) in enumerate(tiles))
    mask = np.ones(scores.shape, bool)
    for _, index in ranked[: removed_count(percent, len(tiles))]:
        o, i = tiles[index]
        mask[:, :, i, o] = False
    return mask


def pattern_mask(scores, patterns, tile=(1, 1)):
    """bool (kh, kw, cin, cout): each tile's best pattern, ties to the lowest index; None for 1x1 kernels."""
    scores = np.asarray(scores, np.float64)
    if scores.shape[:2] == (1, 1):
        return None
    filters, channels = tile
    mask = np.zeros(scores.shape, bool)
    for o in blocks(scores.shape[3], filters):
        for i in blocks(scores.shape[2], channels):
            taps = scores[:, :, i, o].sum(axis=(2, 3))
            best, best_score = 0, -np.inf
            for index, pattern in enumerate(patterns):
                retained = taps[np.asarray(pattern, bool)].sum()
                if retained > best_score:
                    best, best_score = index, retained
            mask[:, :, i, o] = np.asarray(patterns[best], bool)[:, :, None, None]
    return mask


def lasso_sum(weight, keep):
    """One layer's sum over kernels of sqrt(sum over taps of the marked weights squared + eps)."""
    marked = np.zeros(weight.shape) if keep is None else np.where(keep, 0.0, np.asarray(weight, np.float64))
    return sum(
        math.sqrt(float((marked[:, :, i, o] ** 2).sum()) + EPSILON)
        for i in range(weight.shape[2])
        for o in range(weight.shape[3])
    )


def lasso_gradient(weight, keep):
    marked = np.zeros(weight.shape) if keep is None else np.where(keep, 0.0, np.asarray(weight, np.float64))
    return marked / np.sqrt((marked**2).sum(axis=(0, 1), keepdims=True) + EPSILON)
