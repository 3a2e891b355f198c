"""Fixed splits: the same for every run on every machine, whatever the training seed.

All rest on one order in which every prefix mirrors the class frequencies. Its shuffles come from
PCG64 through `Generator.random` and a stable sort, whose streams numpy keeps stable.
"""

import numpy as np

# Two seeds, so that a slim train subset is not chosen by the draw that chose the validation part.
HOLDOUT_SEED = 20210614
SUBSET_SEED = 20210615


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Shuffles 0..N-1 so that every prefix is class-balanced.

    An example that comes k-th in its class's shuffle is placed at (k + 1/2) / (class size); equal
    places are in random order. With classes of equal size, a prefix holds each class equally
    often, give or take one.

    Args:
        labels: Integers, (N,).
        seed: Of this order alone.

    Returns:
        int64 (N,), a permutation of 0..N-1.
    """
    labels = np.asarray(labels)
    random = np.random.Generator(np.random.PCG64(seed)).random(len(labels))
    shuffled = np.argsort(random, kind="stable")
    place = np.empty(len(labels), np.float64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((random, place))


def hold_out(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits 0..N-1 in two, class-stratified: (kept (N - count,), held out (count,)).

    Both are int64 and ascending, so each part keeps its source's order.

    Raises:
        ValueError: If `count` leaves either part empty.
    """
    if not 0 < count < len(labels):
        raise ValueError(
            f"cannot hold {count} of {len(labels)} train examples out for validation; expected "
            f"1..{len(labels) - 1}: use eval_split='test' or a larger data set"
        )
    order = stratified_order(labels, HOLDOUT_SEED)
    return np.sort(order[count:]), np.sort(order[:count])


def balanced_subset(labels: np.ndarray, count: int) -> np.ndarray:
    """The first `count` indices, int64, of a fixed class-balanced order; subsets are nested.

    Raises:
        ValueError: If there are fewer examples than `count`, or `count` is below 1.
    """
    if not 1 <= count <= len(labels):
        raise ValueError(
            f"train_examples={count}, but the train part has {len(labels)} examples; expected "
            f"1..{len(labels)}, or None for all"
        )
    return stratified_order(labels, SUBSET_SEED)[:count]
