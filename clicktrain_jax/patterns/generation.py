"""Pattern sets generated from the scores of a net, by how often kernels ask for them or by what they retain.

The abstract of ClickTrain (arXiv 2011.10170) names dynamic pattern generation without defining it; the definition
here is this project's own. Candidates are all tap sets of the wanted number of taps. Each layer's scores are scaled
to a total of 1, so that no layer outvotes another by its size or its scale; layers without any score do not count.

* ``frequency``: the sets that are most often the top taps of a kernel. A kernel has one vote, a layer's votes weigh
  1 together; kernels without any score have none.
* ``coverage``: the sets that together retain most when every kernel takes the best of them (`objective`), a monotone
  submodular function. From each of three sets, the greedy one (within 1 - 1/e of the optimum), that of ``frequency``
  and the published one of that size, patterns are exchanged while that helps; the best of the results is taken.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.patterns import search, tap_sets
from clicktrain_jax.patterns.kernels import Kernels, gather, sample
from clicktrain_jax.patterns.sets import FIXED_SIZES, check_set, fixed_set
from clicktrain_jax.patterns.tap_sets import Size
from clicktrain_jax.trees import Tree, has_negative, has_non_finite, is_kernel_shape, named_leaves

METHODS = ("coverage", "frequency")
MAX_PATTERNS = 255
MAX_KERNELS = 32768


def generate(
    scores: Tree,
    num_patterns: int,
    *,
    entries: int = 4,
    method: str = "coverage",
    centre: bool = False,
    complementary: bool = False,
    kernel_size: Size | None = None,
    names: Collection[str] | None = None,
    max_kernels: int = MAX_KERNELS,
) -> jax.Array:
    """A pattern set for the layers of a score tree. Jittable; all but ``scores`` is static.

    Args:
        scores: any tree of arrays, non-negative; the 4-D leaves (kh, kw, cin, cout) with kh * kw > 1 count.
        num_patterns: P, 1 to 255 and at most the number of candidates.
        entries: taps that each pattern keeps, 1 to kh * kw - 1.
        method: ``"coverage"`` or ``"frequency"``, see the module.
        centre: only patterns that keep the centre tap.
        complementary: the set consists of P / 2 pairs of disjoint patterns, chosen by coverage: greedily, then
            pairs are exchanged while that helps. For kernels of up to 9 taps.
        kernel_size: leaves of other sizes do not count; needed when there are several.
        names: leaves of other names do not count.
        max_kernels: when there are more kernels, the search for coverage runs on so many of them, see
            `clicktrain_jax.patterns.kernels.sample`. Its result and what it started from are then compared on all.

    Returns:
        bool (P, kh, kw), all different, in the order of `candidates`: the same set is always the same array. With
        ``complementary``, patterns 2i and 2i + 1 are disjoint, and the pairs are in the order of their first.

    Raises:
        ValueError: no leaf counts, or leaves of several kernel sizes; numbers that do not fit; NaN, infinite or
            negative scores (seen outside jit only).

    Above 9 taps the candidates are the 256 most frequent top tap sets of the kernels (of
    ``max_kernels`` at most, at even distances within each layer).
    """
    size, layers = _counted(scores, kernel_size, names)
    _check_numbers(size, num_patterns, entries, method, centre, complementary)
    if not isinstance(max_kernels, int) or max_kernels < 1:
        raise ValueError(f"max_kernels={max_kernels}: expected 1 or more")
    options = (size, num_patterns, entries, method, centre, complementary, max_kernels)
    return _generate(layers, *options)


def objective(
    scores: Tree, patterns: Any, *, kernel_size: Size | None = None, names: Collection[str] | None = None
) -> jax.Array:
    """The share of a score tree that a pattern set retains, every layer counting alike. Jittable.

    Args:
        scores: as in `generate`; all kernels are counted.
        patterns: bool (P, kh, kw), of any numbers of taps.
        kernel_size: leaves of other sizes do not count; by default that of the patterns.
        names: leaves of other names do not count.

    Returns:
        float32 scalar in [0, 1]: the mean over the layers that have any score of
        (sum over kernels of the best pattern's score) / (sum of all scores); 0 without any such layer.

    Raises:
        ValueError: as in `generate` and in `check_set`; patterns of another kernel size.
    """
    patterns = check_set(patterns)
    size = tuple(patterns.shape[1:])
    if kernel_size not in (None, size):
        raise ValueError(f"patterns of {size[0]}x{size[1]} taps, kernel_size={kernel_size}: give patterns of that size")
    _, layers = _counted(scores, size, names)
    return _objective(layers, patterns)


@dataclasses.dataclass(frozen=True)
class Generated:
    """A pattern set to be generated when the masks are selected, from the scores of the selection.

    Attributes:
        num_patterns: patterns in a set.
        method: ``"coverage"`` or ``"frequency"``.
        centre: only patterns that keep the centre tap.
        per_layer: a set for every layer rather than one for the net.
        complementary: sets of pairs of disjoint patterns.

    Raises:
        ValueError: values that no kernel could be given.
    """

    num_patterns: int
    method: str = "coverage"
    centre: bool = False
    per_layer: bool = False
    complementary: bool = False

    def __post_init__(self):
        for name in ("centre", "per_layer", "complementary"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False")
        _check_options(self.num_patterns, self.method, self.centre, self.complementary)

    def check(self, sizes: Mapping[str, Size], entries: Mapping[str, int]) -> None:
        """Refuse layers that no such set can be made for, before there are scores.

        Args:
            sizes: ``{name: (kh, kw)}``.
            entries: ``{name: taps that the layer's patterns keep}``.

        Raises:
            ValueError: numbers that do not fit a layer's kernels; the layer is named.
        """
        for name, size in sizes.items():
            try:
                _check_numbers(size, self.num_patterns, entries[name], self.method, self.centre, self.complementary)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}; give make_plan entries, or other patterns, for it") from error

    def sets(self, scores: Mapping[str, Any], entries: Mapping[str, int]) -> dict[str, jax.Array]:
        """Generate the sets of the layers named in ``entries``; jittable.

        Args:
            scores: ``{name: non-negative (kh, kw, cin, cout)}``; names that ``entries`` lacks are ignored.
            entries: ``{name: taps that the layer's patterns keep}``, static.

        Returns:
            ``{name: bool (num_patterns, kh, kw)}`` for the layers above 1x1: one set for all layers of the same
            kernel size and entries, or one for each layer with ``per_layer``.

        Raises:
            ValueError: a name without scores; as in `generate`.
        """
        groups: dict[Any, list[str]] = {}
        for name, taps in entries.items():
            if name not in scores:
                raise ValueError(f"no scores for {name!r}: expected one array for every layer to be given patterns")
            size = jnp.shape(scores[name])[:2]
            if math.prod(size) > 1:
                groups.setdefault((size, taps, name if self.per_layer else ""), []).append(name)
        result = {}
        for (size, taps, _), group in groups.items():
            patterns = generate(
                {name: scores[name] for name in group},
                self.num_patterns,
                entries=taps,
                method=self.method,
                centre=self.centre,
                complementary=self.complementary,
                kernel_size=size,
            )
            result.update(dict.fromkeys(group, patterns))
        return result


@partial(jax.jit, static_argnums=tuple(range(1, 8)))
def _generate(
    layers: Sequence[jax.Array],
    size: Size,
    count: int,
    entries: int,
    method: str,
    centre: bool,
    pairs: bool,
    limit: int,
) -> jax.Array:
    kernels = gather(layers)
    if math.prod(size) <= tap_sets.MAX_TAPS_LISTED:
        listed = tap_sets.candidates(size, entries, centre=centre)
        if pairs:
            return _in_pairs(kernels, size, listed, count // 2, limit)
        words, usable = jnp.asarray(tap_sets.to_words(listed)), jnp.ones(len(listed), bool)
        votes = tap_sets.votes(kernels, size, listed, centre)
    else:
        words, votes = tap_sets.ranked(kernels, size, count, entries, centre, limit)
        usable = votes >= 0
    frequent = jax.lax.top_k(votes, count)[1].astype(jnp.int32)
    if method == "frequency":
        return tap_sets.to_patterns(words[frequent], size)
    retained = search.retained(sample(kernels, limit), tap_sets.tap_indices(words, size, entries))
    clash = jnp.eye(len(words), dtype=bool)
    starts = [search.greedy(retained, clash, usable, count), frequent]
    if size == (3, 3) and entries == 4 and count in FIXED_SIZES:
        published = fixed_set(count)
        if published[:, 1, 1].all() or not centre:
            starts.append(jnp.argmax(tap_sets.to_words(published)[:, None] == words[None], axis=1).astype(jnp.int32))
    starts = jnp.stack(starts)
    finished = jax.lax.map(lambda start: search.exchange(retained, clash, usable, start), starts)
    values = jax.lax.map(lambda chosen: search.value(retained, chosen), finished)
    chosen = finished[jnp.argmax(values)]
    if kernels.number > limit:
        # What is best on the sample need not be on all kernels.
        sets = jnp.concatenate([chosen[None], starts])
        values = jax.lax.map(lambda each: kernels.share(tap_sets.to_patterns(words[each], size)), sets)
        chosen = sets[jnp.argmax(values)]
    return tap_sets.to_patterns(words[chosen], size)


def _in_pairs(kernels: Kernels, size: Size, listed: np.ndarray, num_pairs: int, limit: int) -> jax.Array:
    """(2 * num_pairs, kh, kw): the search over pairs of disjoint candidates; pairs that share a pattern clash."""
    flat = listed.reshape(len(listed), -1)
    first, second = np.nonzero(np.triu(~(flat[:, None] & flat).any(axis=2)))
    members = np.stack([first, second], axis=1)
    clash = jnp.asarray((members[:, None, :, None] == members[None, :, None, :]).any(axis=(2, 3)))
    indices = tap_sets.tap_indices(jnp.asarray(tap_sets.to_words(listed)), size, int(flat[0].sum()))
    retained = search.retained(sample(kernels, limit), indices)
    retained = jnp.maximum(retained[first], retained[second])
    usable = jnp.ones(len(members), bool)
    chosen = search.greedy(retained, clash, usable, num_pairs)
    # Pairs are numbered in the order of their first patterns.
    chosen = jnp.sort(search.exchange(retained, clash, usable, chosen))
    return jnp.asarray(listed)[jnp.asarray(members)[chosen].reshape(-1)]


@jax.jit
def _objective(layers: Sequence[jax.Array], patterns: jax.Array) -> jax.Array:
    return gather(layers).share(patterns)


def _counted(scores: Tree, kernel_size: Size | None, names: Collection[str] | None) -> tuple[Size, list[jax.Array]]:
    """The kernel size and the leaves that count."""
    if kernel_size is not None:
        tap_sets.check_size(kernel_size)
    by_name = dict(named_leaves(scores))
    unknown = sorted(set(names or ()) - set(by_name))
    if unknown:
        raise ValueError(f"names: the scores have no leaf {unknown[0]!r}; they have {list(by_name)[:4]}")
    layers: dict[Size, list[jax.Array]] = {}
    for name, leaf in by_name.items():
        if leaf is None or (names is not None and name not in names) or not is_kernel_shape(jnp.shape(leaf)):
            continue
        shape = jnp.shape(leaf)
        size = shape[0], shape[1]
        if math.prod(shape) == 0 or math.prod(size) == 1 or (kernel_size is not None and size != kernel_size):
            continue
        if has_non_finite(leaf) or has_negative(leaf):
            raise ValueError(f"scores of {name!r} hold NaN, infinite or negative values: expected importance scores")
        layers.setdefault(size, []).append(jnp.asarray(leaf))
    if len(layers) > 1:
        raise ValueError(f"kernels of several sizes, {sorted(layers)}: say by kernel_size which the patterns are for")
    if not layers:
        wanted = "larger than 1x1" if kernel_size is None else f"of kernel_size={kernel_size}"
        raise ValueError(f"no leaf of the scores is a convolution's (kh, kw, cin, cout) {wanted}: nothing to go by")
    return layers.popitem()


def _check_options(num_patterns: int, method: str, centre: bool, complementary: bool) -> None:
    if not isinstance(num_patterns, int) or isinstance(num_patterns, bool) or not 1 <= num_patterns <= MAX_PATTERNS:
        raise ValueError(f"num_patterns={num_patterns!r}: expected 1 to {MAX_PATTERNS}")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {METHODS}")
    if not complementary:
        return
    if num_patterns % 2:
        raise ValueError(f"num_patterns={num_patterns}: complementary sets consist of pairs, give an even number")
    if method != "coverage" or centre:
        raise ValueError(
            "complementary pairs are chosen by coverage, and two patterns that keep the centre are not disjoint: "
            "leave method and centre at their defaults"
        )


def _check_numbers(size: Size, num_patterns: int, entries: int, method: str, centre: bool, complementary: bool) -> None:
    _check_options(num_patterns, method, centre, complementary)
    tap_sets.check_entries(size, entries, centre)
    what = f"patterns of {entries} of {size[0]}x{size[1]} taps"
    possible = tap_sets.number_of_sets(size, entries, centre)
    if num_patterns > possible:
        raise ValueError(f"num_patterns={num_patterns}: there are {possible} {what}{' with the centre' * centre}")
    if not complementary:
        return
    taps = math.prod(size)
    if taps > tap_sets.MAX_TAPS_LISTED or 2 * entries > taps:
        raise ValueError(
            f"complementary: no pairs of disjoint {what}; at most half the taps, and of kernels of up to "
            f"{tap_sets.MAX_TAPS_LISTED} taps"
        )
    # Every pattern has so many partners, and a taken pair rules out 2 * partners - 1 of all pairs, itself included.
    partners = math.comb(taps - entries, entries)
    pairs = math.ceil(possible * partners / 2 / (2 * partners - 1))
    if num_patterns > 2 * pairs:
        raise ValueError(f"num_patterns={num_patterns}: up to {2 * pairs} complementary {what} are supported")
