"""Reading between measured points: piecewise linear in a logarithm, monotone envelopes, never beyond the range.

Points are pairs ``(x, y)``: a budget, a compression or a latency, all positive, and an accuracy. Several points of one
x count as their mean. What lies outside the points is None, for nothing was measured there.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

Points = Sequence[tuple[float, float]]


def weights(xs: Sequence[float], x: float, *, tolerance: float = 0.0) -> dict[int, float] | None:
    """How much each measured x counts for the reading at another: linear in log x between the two neighbours.

    With these the y of every seed is read alike, which keeps differences paired.

    Args:
        xs: measured, positive, in any order.
        x: where to read.
        tolerance: one that lies outside by no more than this fraction is read at the end of the range.

    Returns:
        ``{place in xs: weight}``, the weights summing to 1; None outside the range.

    Raises:
        ValueError: an x that is not a positive number.
    """
    for value in (*xs, x):
        if not 0 < value < math.inf:
            raise ValueError(f"x={value!r}: expected a positive number, as it is read on a logarithmic scale")
    if not xs:
        return None
    low, high = min(xs), max(xs)
    if low / (1 + tolerance) <= x <= high * (1 + tolerance):
        x = min(max(x, low), high)
    else:
        return None
    left, right = max(value for value in xs if value <= x), min(value for value in xs if value >= x)
    share = 0.0 if left == right else math.log(x / left) / math.log(right / left)
    found: dict[int, float] = {}
    for value, weight in ((left, 1.0 - share), (right, share)):
        places = [place for place, other in enumerate(xs) if other == value]
        if weight > 0:
            found |= {place: weight / len(places) for place in places}
    return found


def envelope(points: Points, direction: Literal["rising", "falling"]) -> list[tuple[float, float]]:
    """The best that is to be had, by ascending x.

    Args:
        points: measured, in any order.
        direction: "rising": y at each x is the best of all at most so large (a larger budget need not be used up).
            "falling": the best of all at least so large (a net compressed more is compressed enough).

    Raises:
        ValueError: another direction.
    """
    if direction not in ("rising", "falling"):
        raise ValueError(f"direction={direction!r}: expected 'rising' or 'falling'")
    ordered = [
        (x, sum(ys) / len(ys))
        for x, ys in ((x, [y for _, y in group]) for x, group in itertools.groupby(sorted(points), lambda one: one[0]))
    ]
    if direction == "falling":
        ordered.reverse()
    best = itertools.accumulate((y for _, y in ordered), max)
    found = [(x, y) for (x, _), y in zip(ordered, best)]
    return found if direction == "rising" else found[::-1]


def solve(points: Points, y: float, direction: Literal["rising", "falling"]) -> float | None:
    """The x at which the envelope takes a value: the smallest of a rising one, the largest of a falling one.

    Args:
        points: measured, in any order.
        y: the accuracy to be had.
        direction: of the `envelope`.

    Returns:
        x, linear in log x between the neighbours; None where y lies above or below every measured one.

    Raises:
        ValueError: another direction, or an x that is not a positive number.
    """
    best = envelope(points, direction)
    weights([x for x, _ in best], 1.0)  # refuses what has no logarithm
    if direction == "falling":
        best.reverse()
    # By ascending y now; the first point that reaches it ends the stretch to look in.
    for place, (x, reached) in enumerate(best):
        if reached == y:
            return x
        if reached > y:
            if place == 0:
                return None
            before, low = best[place - 1]
            share = (y - low) / (reached - low)
            return math.exp(math.log(before) + share * math.log(x / before))
    return None


def by_seed(values: Mapping[int, Mapping[int, float]], shares: Mapping[int, float]) -> dict[int, float]:
    """The reading of each seed: the weighted mean of what it has at the places of `weights`.

    Args:
        values: by place, then by seed.
        shares: from `weights`.

    Returns:
        By seed, of those that every place has.
    """
    common = set.intersection(*(set(values[place]) for place in shares))
    return {seed: sum(share * values[place][seed] for place, share in shares.items()) for seed in sorted(common)}
