"""The tap sets that a generated pattern set is chosen from: all of them, or those that kernels rank top.

Inside, a tap set is a *word*: an integer of one bit a tap, the first tap the highest, so that larger words come first
in the order of `candidates`.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.patterns.kernels import Kernels, ordered_sum

Size = tuple[int, int]

# All tap sets of a 3x3 kernel, 126 at most, are candidates; of a 5x5 kernel there are 12,650 with 4 taps.
MAX_TAPS_LISTED = 9
MAX_TAPS = 32
_NUM_RANKED = 256


def candidates(kernel_size: Size, entries: int, *, centre: bool = False) -> np.ndarray:
    """All tap sets of ``entries`` taps, in the order of `itertools.combinations` over taps read row by row.

    Args:
        kernel_size: (kh, kw), 2 to 9 taps.
        entries: taps in each set, 1 to kh * kw - 1.
        centre: only the sets that keep the centre tap; kh and kw must be odd.

    Returns:
        bool (C, kh, kw), C = C(kh * kw, entries), or C(kh * kw - 1, entries - 1) with ``centre``.

    Raises:
        ValueError: more than 9 taps, or entries that do not fit.

    Example:
        >>> candidates((3, 3), 4).shape
        (126, 3, 3)
    """
    check_entries(kernel_size, entries, centre)
    if math.prod(kernel_size) > MAX_TAPS_LISTED:
        raise ValueError(
            f"kernel_size={kernel_size}: all tap sets are listed for kernels of up to {MAX_TAPS_LISTED} taps; "
            "above, `generate` takes the sets that the kernels rank top"
        )
    return _first_sets(kernel_size, entries, centre, None)


def votes(kernels: Kernels, size: Size, listed: np.ndarray, centre: bool) -> jax.Array:
    """float32 (C,): how often each listed tap set is a kernel's top taps, each layer's votes weighing 1 together."""
    words = to_words(listed)
    number = np.zeros(2 ** math.prod(size), np.int32)
    number[words] = np.arange(len(words))
    top, voting = _top_words(kernels.scores, size, int(listed[0].sum()), centre)
    layers = len(kernels.sizes)
    # Counted as integers, which sum to the same in any order; those without a vote past the end.
    boxes = jnp.where(voting, jnp.asarray(number)[top], 0).reshape(-1)[: kernels.number]
    boxes += jnp.concatenate([jnp.full(count, len(words) * index) for index, count in enumerate(kernels.sizes)])
    boxes = jnp.where(voting.reshape(-1)[: kernels.number], boxes, len(words) * layers)
    counts = jnp.bincount(boxes, length=len(words) * layers + 1)[:-1].reshape(layers, len(words))
    return ordered_sum(counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1))


def ranked(
    kernels: Kernels, size: Size, count: int, entries: int, centre: bool, limit: int
) -> tuple[jax.Array, jax.Array]:
    """The most frequent top tap sets and, should they be too few, the first in order.

    Returns:
        Words uint32 (C,), and votes int32 (C,): 0 for those that no kernel ranks top, -1 for unusable ones.
    """
    layers = len(kernels.sizes)
    top, voting = (values.reshape(-1) for values in _top_words(kernels.scores, size, entries, centre))
    words, weights = [], []
    for start, number in zip(np.cumsum((0, *kernels.sizes)), kernels.sizes):
        taken = slice(start, start + number, math.ceil(number * layers / limit))
        words.append(top[taken])
        # Shares of one as integers, which sum to the same in any order.
        share = (2**30 // layers) // jnp.maximum(voting[taken].sum(), 1)
        weights.append(jnp.where(voting[taken], share, 0).astype(jnp.int32))
    # Sorted by their complements, larger words come first.
    words, weights = jax.lax.sort([~jnp.concatenate(words), jnp.concatenate(weights)], num_keys=1)
    begins = jnp.concatenate([jnp.ones(1, bool), words[1:] != words[:-1]])
    group = jnp.cumsum(begins) - 1
    sums = jax.ops.segment_sum(weights, group, num_segments=len(words))
    most, places = jax.lax.top_k(sums, min(_NUM_RANKED, len(words)))
    distinct = jnp.zeros(len(words), jnp.uint32).at[group].set(~words)
    frequent = jnp.where(most > 0, distinct[places], 0)
    spare = jnp.asarray(to_words(_first_sets(size, entries, centre, count)))
    known = (spare[:, None] == frequent[None]).any(axis=1)
    spare_votes = jnp.where(known, -1, 0).astype(jnp.int32)
    return jnp.concatenate([frequent, spare]), jnp.concatenate([jnp.where(most > 0, most, -1), spare_votes])


def _top_words(scores: jax.Array, size: Size, entries: int, centre: bool) -> tuple[jax.Array, jax.Array]:
    """(taps, ...) -> uint32 (...), each kernel's top taps, ties to the first taps; and whether it has any score."""
    values = list(scores)
    if centre:
        values[len(values) // 2] = jnp.full_like(values[0], jnp.inf)
    # How many taps come before each one; of two taps one does.
    rank = [jnp.zeros(scores.shape[1:], jnp.int32)] * len(values)
    for later in range(len(values)):
        for earlier in range(later):
            ahead = (values[later] > values[earlier]).astype(jnp.int32)
            rank[earlier] += ahead
            rank[later] += 1 - ahead
    words = ordered_sum([jnp.where(rank[tap] < entries, bit, jnp.uint32(0)) for tap, bit in enumerate(_bits(size))])
    return words, (scores > 0).any(axis=0)


def check_size(size: Size) -> None:
    """Raise a ValueError unless it is the (kh, kw) of a kernel that patterns are possible on."""
    valid = isinstance(size, tuple) and len(size) == 2 and all(_is_int(length) and length > 0 for length in size)
    if not valid or not 2 <= math.prod(size) <= MAX_TAPS:
        raise ValueError(f"kernel_size={size!r}: expected (kh, kw) of 2 to {MAX_TAPS} taps, such as (3, 3)")


def check_entries(size: Size, entries: int, centre: bool) -> None:
    """Raise a ValueError unless kernels of that size can keep so many taps."""
    check_size(size)
    taps = math.prod(size)
    if not _is_int(entries) or not 1 <= entries < taps:
        raise ValueError(f"entries={entries!r}: expected 1 to {taps - 1} taps kept of a {size[0]}x{size[1]} kernel")
    if centre and (size[0] % 2 == 0 or size[1] % 2 == 0):
        raise ValueError(f"centre=True: a {size[0]}x{size[1]} kernel has no centre tap; leave centre out")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number_of_sets(size: Size, entries: int, centre: bool) -> int:
    """How many tap sets there are."""
    return math.comb(math.prod(size) - centre, entries - centre)


def _first_sets(size: Size, entries: int, centre: bool, number: int | None) -> np.ndarray:
    """bool (number, kh, kw): the first tap sets in order; None for all."""
    taps = range(math.prod(size))
    middle = len(taps) // 2
    others = [tap for tap in taps if tap != middle] if centre else taps
    sets = itertools.islice(itertools.combinations(others, entries - centre), number)
    rows = sorted(tuple(sorted((*chosen, middle) if centre else chosen)) for chosen in sets)
    return np.stack([np.isin(taps, row) for row in rows]).reshape(-1, *size)


def _bits(size: Size) -> jax.Array:
    """uint32 (taps,): a tap set's word has the first tap as its highest bit, so that larger words come first."""
    taps = math.prod(size)
    return jnp.left_shift(jnp.uint32(1), jnp.arange(taps - 1, -1, -1, dtype=jnp.uint32))


def to_words(patterns: np.ndarray) -> np.ndarray:
    """bool (C, kh, kw) -> uint32 (C,)."""
    flat = patterns.reshape(len(patterns), -1)
    return (flat * (1 << np.arange(flat.shape[1] - 1, -1, -1, dtype=np.uint64))).sum(axis=1).astype(np.uint32)


def to_patterns(words: jax.Array, size: Size) -> jax.Array:
    """uint32 (P,) -> bool (P, kh, kw), in the order of the candidates."""
    words = ~jnp.sort(~words)
    return ((words[:, None] & _bits(size)[None]) != 0).reshape(-1, *size)


def tap_indices(words: jax.Array, size: Size, entries: int) -> jax.Array:
    """uint32 (C,) -> int32 (C, entries), ascending; for a word of another number of taps, anything valid."""
    kept = (words[:, None] & _bits(size)[None]) != 0
    return jnp.argsort(~kept, axis=1, stable=True)[:, :entries].astype(jnp.int32)
