"""How the mask of one leaf is stored: three codings, of which the smallest is taken.

A mask is looked at as bool (taps, cin, cout): a kernel is what one filter (cout) does to one input channel (cin).
Filters of equal masks are stored once, and a number for each filter tells which it has; tiles of filters thus cost
next to nothing. Of the unique filters are stored:

- "bits": the set of patterns that occur; a bit for each kernel, 1 where it stays; the pattern's number for each
  kernel that stays.
- "indices": the set of patterns; with a filter's kernels sorted by pattern, how many there are of each pattern, and
  the input channel of each kernel.
- "weights": a bit for each weight, whatever the mask.

Weights that stay are stored elsewhere, in the order of the leaf, so the coding does not touch them.
"""

import math
from typing import NamedTuple

import numpy as np

from clicktrain_jax.deploy.storage.bits import pack, packed_bytes, unpack, width_of
from clicktrain_jax.masks import FullMask

CODINGS = ("bits", "indices", "weights")
# Patterns are told apart as the bits of a 64-bit word.
_MAX_PATTERN_TAPS = 64


class Coding(NamedTuple):
    """What the manifest says of a stored mask.

    Attributes:
        coding: one of `CODINGS`.
        parts: "pattern", "kernel" or "both", as in `FullMask`.
        kept: weights that stay, of all filters.
        filters: unique filters.
        patterns: patterns that occur; 0 for "weights".
        kernels: kernels that stay in the unique filters; 0 for "weights".
        kernel_weights: the kernel mask is not the same at all taps and stands apart, a bit a weight ("weights" only).
    """

    coding: str
    parts: str
    kept: int
    filters: int
    patterns: int = 0
    kernels: int = 0
    kernel_weights: bool = False


def view_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(taps, cin, cout) of a leaf's shape: the last two axes are channels, all others together are taps."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def encode(mask: FullMask) -> tuple[Coding, bytes]:
    """Store a mask in the smallest coding.

    Args:
        mask: of one leaf. Where a kernel is removed its pattern is of no account.

    Returns:
        What the manifest is told, and the bytes.
    """
    combined = mask.combined()
    view = view_shape(combined.shape)
    if combined.size == 0:
        return Coding("weights", mask.parts, 0, view[2], kernel_weights=mask.parts == "both"), b""
    words = combined.reshape(view)
    kernel = None if mask.parts != "both" else mask.kernel.reshape(view)
    whole_kernels = kernel is None or bool((kernel == kernel[:1]).all())
    rows = [np.packbits(words.reshape(-1, view[2]), axis=0)]
    if kernel is not None:
        rows.append(np.packbits((kernel[:1] if whole_kernels else kernel).reshape(-1, view[2]), axis=0))
    first, filter_of = _unique_columns(np.concatenate(rows))
    words = words[:, :, first]
    kernel = None if kernel is None else kernel[:, :, first]
    head = _encode_filters(filter_of, len(first))
    kept = int(np.count_nonzero(combined))

    weights = Coding("weights", mask.parts, kept, len(first))
    body = pack(words, 1)
    if kernel is not None and not (whole_kernels and (kernel[0] == words.any(axis=0)).all()):
        weights = weights._replace(kernel_weights=True)
        body += pack(kernel, 1)
    found = [(weights, body)]
    if whole_kernels and view[0] <= _MAX_PATTERN_TAPS:
        stays = words.any(axis=0) if kernel is None else kernel[0]
        table, pattern_ids = _find_patterns(words, stays)
        coding = Coding("bits", mask.parts, kept, len(first), len(table), pattern_ids.size)
        table_bytes = pack(table, 1)
        found.append((coding, table_bytes + pack(stays, 1) + pack(pattern_ids, width_of(len(table)))))
        if len(table) <= view[0] * view[1]:  # with more patterns their counts alone outweigh a bit a weight
            lists = _encode_lists(stays, pattern_ids, len(table))
            found.append((coding._replace(coding="indices"), table_bytes + lists))
    coding, body = min(found, key=lambda one: len(one[1]))
    return coding, head + body


def stored_bytes(coding: Coding, shape: tuple[int, ...]) -> int:
    """How many bytes `encode` made of a mask of this shape, from what the manifest says."""
    taps, cin, cout = view_shape(shape)
    size = packed_bytes(cout, width_of(coding.filters)) if coding.filters < cout else 0
    if coding.coding == "weights":
        one = packed_bytes(taps * cin * coding.filters, 1)
        return size + one * (2 if coding.kernel_weights else 1)
    size += packed_bytes(coding.patterns * taps, 1)
    if coding.coding == "bits":
        return size + packed_bytes(cin * coding.filters, 1) + packed_bytes(coding.kernels, width_of(coding.patterns))
    counts = packed_bytes(coding.filters * coding.patterns, width_of(cin + 1))
    return size + counts + packed_bytes(coding.kernels, width_of(cin))


def decode(coding: Coding, data: bytes, shape: tuple[int, ...]) -> FullMask:
    """The inverse of `encode`; patterns are all True where the kernel is removed.

    Raises:
        ValueError: bytes that no mask gives.
    """
    taps, cin, cout = view_shape(shape)
    if len(data) != stored_bytes(coding, shape):
        raise ValueError(f"holds {len(data)} bytes of mask, expected {stored_bytes(coding, shape)}")
    reader = _Reader(data)
    filter_of = None
    if coding.filters < cout:
        filter_of = reader.numbers(cout, width_of(coding.filters))
        _require(cout == 0 or int(filter_of.max()) < coding.filters, "numbers of filters are out of range")
    whole = (taps, cin, coding.filters)
    if coding.coding == "weights":
        words = reader.bits(*whole)
        stays = words.any(axis=0, keepdims=True)
        if coding.kernel_weights:
            stays = reader.bits(*whole)
            _require(not (words & ~stays).any(), "weights stay where their kernel goes")
        pattern = words | ~stays if coding.parts == "both" else words
    else:
        _require(taps <= _MAX_PATTERN_TAPS, f"has {taps} taps, at most {_MAX_PATTERN_TAPS} fit into a pattern")
        table = reader.bits(coding.patterns, taps)
        if coding.coding == "bits":
            stays = reader.bits(cin, coding.filters)
            _require(int(np.count_nonzero(stays)) == coding.kernels, "its kernels are not as many as it says")
            numbers = reader.numbers(coding.kernels, width_of(coding.patterns))
            in_range = coding.kernels == 0 or int(numbers.max()) < coding.patterns
            _require(in_range, "numbers of patterns are out of range")
            ids = np.zeros(stays.shape, np.uint32 if coding.patterns > 255 else np.uint8)
            ids[stays] = numbers + ids.dtype.type(1)
        else:
            ids = _decode_lists(reader, cin, coding)
            stays = ids > 0
        # Kernels that go have number 0: all taps where the kernel mask tells of them, none where there is no such mask.
        table = np.concatenate([np.full((1, taps), coding.parts == "both"), table])
        dtype = _word_dtype(taps)
        weights = [dtype.type(1 << tap) for tap in range(taps)]
        words = (table * np.array(weights, dtype)).sum(axis=1, dtype=dtype)[ids]
        pattern = np.empty(whole, bool)
        for tap, weight in enumerate(weights):
            np.not_equal(words & weight, 0, out=pattern[tap])
        stays = stays[None]
    if filter_of is not None:
        pattern, stays = pattern[:, :, filter_of], stays[:, :, filter_of]
    pattern = pattern.reshape(shape)
    if coding.parts != "both":
        return FullMask(pattern, None) if coding.parts == "pattern" else FullMask(None, pattern)
    return FullMask(pattern, np.broadcast_to(stays, (taps, cin, cout)).reshape(shape))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


class _Reader:
    """Packed numbers, one run after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = memoryview(data), 0

    def bits(self, *shape: int) -> np.ndarray:
        return self.numbers(math.prod(shape), 1).view(bool).reshape(shape)

    def numbers(self, count: int, width: int) -> np.ndarray:
        values = unpack(self.data[self.at :], width, count)
        self.at += packed_bytes(count, width)
        return values


def _unique_columns(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For uint8 (n, columns): the first of each group of equal columns, and each column's group."""
    numbers: dict[bytes, int] = {}
    rows = np.ascontiguousarray(bits.T)
    group = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.uint32)
    return np.unique(group, return_index=True)[1], group


def _encode_filters(filter_of: np.ndarray, unique: int) -> bytes:
    return pack(filter_of, width_of(unique)) if unique < filter_of.size else b""


def _word_dtype(taps: int) -> np.dtype:
    return np.dtype(np.uint16 if taps <= 16 else np.uint64)


def _find_patterns(words: np.ndarray, stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patterns of the kernels that stay, bool (P, taps), and each such kernel's number in C order of (cin, cout)."""
    taps = words.shape[0]
    numbers = np.zeros(int(np.count_nonzero(stays)), _word_dtype(taps))
    for tap in range(taps):
        numbers |= words[tap][stays].astype(numbers.dtype) << numbers.dtype.type(tap)
    unique, ids = np.unique(numbers, return_inverse=True)
    table = (unique[:, None] >> np.arange(taps, dtype=unique.dtype)) & unique.dtype.type(1)
    return table.astype(bool), ids.astype(np.uint32)


def _encode_lists(stays: np.ndarray, pattern_ids: np.ndarray, patterns: int) -> bytes:
    """Kernels per (filter, pattern), then their input channels, filter by filter and pattern by pattern."""
    cin, filters = stays.shape
    channels, of_filter = np.nonzero(stays)
    groups = of_filter * patterns + pattern_ids
    counts = np.bincount(groups, minlength=filters * patterns).astype(np.uint32)
    order = np.argsort(groups, kind="stable")
    return pack(counts, width_of(cin + 1)) + pack(channels[order].astype(np.uint32), width_of(cin))


def _decode_lists(reader: _Reader, cin: int, coding: Coding) -> np.ndarray:
    """Numbers of patterns plus one, uint32 (cin, filters), 0 where a kernel goes."""
    counts = reader.numbers(coding.filters * coding.patterns, width_of(cin + 1))
    _require(int(counts.sum(dtype=np.int64)) == coding.kernels, "its kernels are not as many as it says")
    channels = reader.numbers(coding.kernels, width_of(cin))
    _require(coding.kernels == 0 or int(channels.max()) < cin, "input channels are out of range")
    groups = np.repeat(np.arange(counts.size), counts)
    ids = np.zeros((cin, coding.filters), np.uint32 if coding.patterns > 255 else np.uint8)
    if coding.kernels:
        ids[channels, groups // coding.patterns] = groups % coding.patterns + 1
    _require(int(np.count_nonzero(ids)) == coding.kernels, "a kernel is listed twice")
    return ids
