"""What is claimed of ClickTrain, read from the records of a comparison, each with its verdict.

Every difference and ratio is of runs of one seed; between measured points `experiments.report.frontier` reads, and
beyond them nothing is said. The claims: no more end-to-end time than dense training; pruning after training (PAT) takes
up to 2.3 times as long at like accuracy and compression; pruning during training (PDT) loses more accuracy at like
compression in like time, or compresses less at like accuracy; a narrower dense net of equal latency is less accurate.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from experiments.report import frontier
from experiments.report.comparison_records import BATCHES, Cell, Study, mean

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "not measured"
# Of measured runs that say neither.
UNTOLD = "cannot be told"
OUTSIDE = "outside the measured range"
TIME_GOAL, TIME_LIMIT = 0.85, 1.05
PAT_RATIO, LIKE_ACCURACY = 2.3, 0.3  # times; points
LIKE_COMPRESSION, LIKE_TIME = 0.05, 0.10
_EXACT = 1e-9


class Claim(NamedTuple):
    """A sentence with its figures, and whether it holds."""

    verdict: str
    text: str


class Reading(NamedTuple):
    """One cell's part in a claim: a table's row, and what it says of the claim."""

    row: tuple[str, ...]
    verdict: str
    value: float | None = None


class Part(NamedTuple):
    """Claims of one kind with the table that they were read from; no rows, no table."""

    title: str
    explained: str
    claims: list[Claim]
    header: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()


def parts(study: Study) -> list[Part]:
    """All claims on a study."""
    return [against_dense(study), against_pat(study), against_pdt(study), against_narrow(study)]


def spread(values: Mapping[int, float], digits: int = 2, *, signed: bool = False) -> str:
    """Mean and standard deviation over seeds; "not measured" of none, no spread where all are equal."""
    if not values:
        return UNKNOWN
    middle = statistics.fmean(values.values())
    text = f"{middle:+.{digits}f}" if signed else f"{middle:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    if len(values) > 1 and max(values.values()) - min(values.values()) > 1e-12 * abs(middle):
        text += f" ± {statistics.stdev(values.values()):.{digits}f}"
    return text


def against_dense(study: Study) -> Part:
    """(a) ClickTrain's seconds over dense's."""
    # Where what is saved is spent on more epochs, nothing is said of what a run of dense's length saves.
    length = set(study.dense.column("epochs").values())
    as_long = [cell for cell in study.of("ClickTrain") if set(cell.column("epochs").values()) <= length]
    if study.of("ClickTrain") and not as_long:
        return Part("Time against dense training", "", [])
    cells = [(cell, study.time(cell)) for cell in as_long]
    measured = sorted(((cell, ratio) for cell, ratio in cells if ratio), key=lambda one: mean(one[1]))
    goal = f"ClickTrain's {study.clock} are at most {TIME_GOAL:g} of dense training's (goal)"
    limit = f"they are at most {TIME_LIMIT:g} of dense training's in every ClickTrain run's mean"
    if not measured:
        return Part("Time against dense training", "", [Claim(UNKNOWN, goal), Claim(UNKNOWN, limit)])
    said = []
    for cell, ratio in (measured[0], measured[-1]):
        alone = study.ratio(cell, "train_seconds")
        told = f"; training alone {spread(alone)}" if alone else ""
        said.append(f"{spread(ratio)} (n={len(ratio)}; {cell.label}{told})")
    ratios = [mean(ratio) for _, ratio in measured]
    within, missing = sum(ratio <= TIME_LIMIT + _EXACT for ratio in ratios), len(cells) - len(measured)
    apart = f" ({missing} more: {UNKNOWN})" if missing else ""
    return Part(
        "Time against dense training",
        "",
        [
            Claim(
                HOLDS if ratios[0] <= TIME_GOAL + _EXACT else UNTOLD if missing else FAILS,
                f"{goal}: the least is {said[0]}{apart}.",
            ),
            Claim(
                FAILS if within < len(ratios) else UNTOLD if missing else HOLDS,
                f"{limit}: {within} of {len(ratios)} cells{apart}; the most is {said[1]}.",
            ),
        ],
    )


def against_pat(study: Study) -> Part:
    """(b) The smallest budget of PAT that comes within 0.3 points of ClickTrain at like compression."""
    readings = [_pat_reading(study, cell) for cell in study.of("ClickTrain")]
    readings = [reading for reading in readings if reading is not None]
    text = (
        f"pruning after training (PAT) needs up to {PAT_RATIO:g} times ClickTrain's {study.clock} to come within "
        f"{LIKE_ACCURACY:g} points of it at like compression"
    )
    verdict = _any(reading.verdict for reading in readings)
    if readings:
        text += ": " + "; ".join(f"{reading.row[4]} ({reading.row[0]})" for reading in readings)
    explained = (
        f"PAT cells whose compression is within {100 * LIKE_COMPRESSION:g}% of the ClickTrain cell's; budgets are "
        f"their {study.clock} over ClickTrain's, paired by seed. The claim counts the smallest measured budget "
        'whose mean accuracy is near enough; "between budgets" reads the frontier (the best accuracy of all budgets '
        'at most so large) in between. "At most": the smallest measured budget comes near enough already, a smaller '
        'one might too. "Not reached": no measured budget does.'
    )
    header = (
        "ClickTrain cell",
        "PAT budgets",
        "PAT's accuracy less ClickTrain's, by budget",
        "verdict",
        "ratio",
        "between budgets",
    )
    return Part("Pruning after training", explained, [Claim(verdict, f"{text}.")], header, [r.row for r in readings])


def _pat_reading(study: Study, cell: Cell) -> Reading | None:
    """None without a PAT cell of like compression and a common seed."""
    budgets = []
    for other in study.of("PAT"):
        mine, theirs = study.seconds(cell), study.seconds(other)
        seeds = mine.keys() & theirs.keys()
        like = _likeness(mean(study.compression(other)), mean(study.compression(cell)))
        if seeds and like is not None and like <= LIKE_COMPRESSION:
            ratio = {seed: theirs[seed] / mine[seed] for seed in sorted(seeds)}
            budgets.append((mean(ratio), _differences(other.top1(), cell.top1()), ratio))
    if not budgets:
        return None
    budgets.sort(key=lambda budget: budget[0])
    reached = [place for place, (_, gap, _) in enumerate(budgets) if mean(gap) >= -LIKE_ACCURACY - _EXACT]
    between = frontier.solve([(budget, mean(gap)) for budget, gap, _ in budgets], -LIKE_ACCURACY, "rising")
    if not reached:
        # It may take longer, or never come so near: that is no ratio.
        verdict, said, value = UNTOLD, f"not reached within {budgets[-1][0]:.2f}", None
    else:
        value, _, ratio = budgets[reached[0]]
        said = spread(ratio)
        if reached[0] == 0:
            said = f"at most {said}"
            verdict = FAILS if value < PAT_RATIO else UNTOLD
        else:
            verdict = HOLDS if value >= PAT_RATIO - _EXACT else FAILS
        if len(ratio) < 2:
            said, verdict = f"{said} (one seed)", UNTOLD
    gaps = ", ".join(f"{spread(gap, signed=True)} at {budget:.2f}" for budget, gap, _ in budgets)
    known = between is not None and reached and reached[0] > 0
    row = (cell.label, str(len(budgets)), gaps, verdict, said, f"{between:.2f}" if known else "")
    return Reading(row, verdict, value)


def against_pdt(study: Study) -> Part:
    """(c) Accuracy at like compression, and compression at like accuracy, in like time."""
    claims, rows = [], []
    for name, family in study.families("ClickTrain").items():
        readings = [(other, *_pdt_reading(study, family, other)) for other in study.of("PDT")]
        for other, accuracy, compression in readings:
            conv = f"{_text(mean(study.compression(other)))}x"
            rows.append((other.label, name, conv, *accuracy.row, *compression.row))
        for place, what, best in (
            (1, "is more accurate at like compression", "points"),
            (2, "compresses more at like accuracy", "times"),
        ):
            found = [reading[place] for reading in readings]
            text = f'in like time "{name}" {what} than pruning during training (PDT){_range(found, best)}'
            claims.append(Claim(_all(reading.verdict for reading in found), f"{text}."))
    if not claims:
        claims = [Claim(UNKNOWN, "ClickTrain against pruning during training (PDT) in like time.")]
    explained = (
        f"Read between the cells of a ClickTrain family, linear in log compression, at the PDT cell's compression "
        f"(or at the family's nearest end, if within {100 * LIKE_COMPRESSION:g}%), and at its accuracy. Time is PDT's "
        f"{study.clock} over ClickTrain's at that point: like within {100 * LIKE_TIME:g}%; beyond it, a verdict "
        "stands only where the unequal time speaks against it. Where ClickTrain is better, or worse, than the PDT cell "
        "at every measured compression, the ratio is a bound. Published: up to 2.1 points, up to 2.2 times."
    )
    header = (
        "PDT cell",
        "against",
        "conv",
        "accuracy, ClickTrain less PDT",
        "time, PDT over ClickTrain",
        "compression, ClickTrain over PDT",
        "time there",
    )
    return Part("Pruning during training", explained, claims, header, rows)


def _pdt_reading(study: Study, family: Sequence[Cell], other: Cell) -> tuple[Reading, Reading]:
    """At like compression, and at like accuracy."""
    xs = [mean(study.compression(cell)) for cell in family]
    x = mean(study.compression(other))
    nothing = Reading((UNKNOWN, ""), UNKNOWN)
    if x is None or None in xs:
        return nothing, nothing
    accuracies, seconds = [cell.top1() for cell in family], [study.seconds(cell) for cell in family]

    def time_at(shares: Mapping[int, float]) -> dict[int, float]:
        mine = frontier.by_seed(dict(enumerate(seconds)), shares)
        return {seed: value / mine[seed] for seed, value in study.seconds(other).items() if seed in mine}

    shares = frontier.weights(xs, x, tolerance=LIKE_COMPRESSION)
    like_compression = Reading((OUTSIDE, ""), UNTOLD)
    if shares is not None:
        gap = _differences(frontier.by_seed(dict(enumerate(accuracies)), shares), other.top1())
        if gap:
            like_compression = _in_time(f"{spread(gap, signed=True)}{_weak(gap)}", mean(gap), 0.0, time_at(shares))
            if _weak(gap):
                like_compression = like_compression._replace(verdict=UNTOLD)
        else:
            like_compression = nothing
    # Means here, of the seeds that all have: a curve through single runs does not fall.
    seeds = set(other.top1()).intersection(*accuracies)
    if not seeds:
        return like_compression, nothing
    curve = [(place, {seed: top1[seed] for seed in seeds}) for place, top1 in zip(xs, accuracies)]
    theirs = {seed: other.top1()[seed] for seed in seeds}
    reached = frontier.solve([(place, mean(top1)) for place, top1 in curve], mean(theirs), "falling")
    if reached is None:
        like_accuracy = _beyond(curve, theirs, x, time_at)
    else:
        there = time_at(frontier.weights(xs, reached, tolerance=_EXACT))
        like_accuracy = _in_time(f"{reached / x:.2f}", reached / x, 1.0, there)
    return like_compression, _of_seeds(like_accuracy, len(seeds))


def _of_seeds(reading: Reading, count: int) -> Reading:
    """One seed tells nothing."""
    if count > 1 or reading.verdict == UNKNOWN:
        return reading
    return reading._replace(row=(f"{reading.row[0]} (one seed)", *reading.row[1:]), verdict=UNTOLD)


def _beyond(
    curve: Sequence[tuple[float, Mapping[int, float]]],
    theirs: Mapping[int, float],
    x: float,
    time_at: Callable[[Mapping[int, float]], dict[int, float]],
) -> Reading:
    """Where ClickTrain is better, or worse, at every compression: its end is a bound, which may be enough to tell."""
    # The envelope, as `frontier.solve` reads it: a dip that a higher compression makes good is none.
    lowest = min(top1 for _, top1 in frontier.envelope([(place, mean(top1)) for place, top1 in curve], "falling"))
    is_better = lowest > mean(theirs)
    end, accuracies = (max if is_better else min)(curve, key=lambda point: point[0])
    text = f"{'more' if is_better else 'less'} than {end / x:.2f} ({OUTSIDE})"
    gap = _differences(accuracies, theirs)
    if is_better != (end / x > 1):
        return Reading((text, ""), UNTOLD)
    found = _in_time(text, end / x, 1.0, time_at(frontier.weights([place for place, _ in curve], end)))
    found = found._replace(value=None)
    if len(gap) > 1 and _weak(gap):
        return found._replace(row=(text + _weak(gap), *found.row[1:]), verdict=UNTOLD)
    return found


def _range(found: Sequence[Reading], unit: str) -> str:
    """The least and the most of what was measured, and how many cells the claim is true of."""
    values = [reading.value for reading in found if reading.value is not None]
    counted = [reading.verdict for reading in found]
    text = ""
    if values:
        form = "+.2f" if unit == "points" else ".2f"
        text = f": {min(values):{form}} to {max(values):{form}} {unit}"
    if found:
        told = counted.count(HOLDS) + counted.count(FAILS)
        text += f"; true of {counted.count(HOLDS)} of {told} cells"
        text += f", {len(found) - told} cannot be told" if told < len(found) else ""
    return text


def _in_time(text: str, value: float, threshold: float, time: Mapping[int, float]) -> Reading:
    """A value that should exceed a threshold, in like time; ``time`` is PDT's over ClickTrain's, by seed."""
    ratio = mean(time)
    if ratio is None:
        return Reading((text, UNKNOWN), UNKNOWN, value)
    like = abs(ratio - 1) <= LIKE_TIME + _EXACT
    if value > threshold:
        verdict = HOLDS if like or ratio > 1 else UNTOLD
    else:
        verdict = FAILS if like or ratio < 1 else UNTOLD
    apart = "" if like else f", not like: {100 * abs(ratio - 1):.0f}% {'more' if ratio > 1 else 'less'}"
    return Reading((text, f"{spread(time)}{apart}"), verdict, value)


def against_narrow(study: Study) -> Part:
    """(d) A dense net of smaller width, read at equal latency, multiply-adds and convolution weights."""
    narrow = [*study.of("narrow"), study.dense] if study.of("narrow") and study.dense.runs else []
    sizes: list[tuple[str, Callable[[Cell], float | None]]] = [
        *((f"equal latency, N={batch}", lambda cell, batch=batch: cell.latency_s(batch)) for batch in BATCHES),
        ("equal multiply-adds", lambda cell: mean(cell.column("retained_multiply_adds"))),
        ("equal convolution weights", lambda cell: mean(cell.column("conv_retained"))),
    ]
    cells = study.of("ClickTrain") if narrow else []
    table = [(cell, [_narrow_reading(cell, narrow, size) for _, size in sizes]) for cell in cells]
    claims = []
    for place, batch in enumerate(BATCHES):
        found = [readings[place] for _, readings in table]
        text = f"ClickTrain is more accurate than a narrower dense net of equal latency (N={batch})"
        text += _range(found, "points")
        outside = sum(reading.row[0] == OUTSIDE for reading in found)
        if outside:
            text += f" ({outside} {OUTSIDE} of the narrow nets' latencies)"
        claims.append(Claim(_all(reading.verdict for reading in found), f"{text}."))
    rows = [(cell.label, *(reading.row[0] for reading in readings)) for cell, readings in table]
    explained = (
        "ClickTrain's accuracy less that of a dense net of smaller width, in points, read between the measured widths, "
        "the full one among them, linear in the logarithm of what is equal; paired by seed."
    )
    header = ("ClickTrain cell", *(f"at {what}" for what, _ in sizes))
    return Part("Narrower dense nets", explained, claims, header, rows)


def _narrow_reading(cell: Cell, narrow: Sequence[Cell], size: Callable[[Cell], float | None]) -> Reading:
    x, known = size(cell), [other for other in narrow if size(other) is not None]
    if x is None or len(known) < 2:
        return Reading((UNKNOWN,), UNKNOWN)
    # What is larger than every dense net is compared with the largest of them, which is no slower.
    x = min(x, max(size(other) for other in known))
    shares = frontier.weights([size(other) for other in known], x)
    if shares is None:
        return Reading((OUTSIDE,), UNTOLD)
    theirs = frontier.by_seed({place: other.top1() for place, other in enumerate(known)}, shares)
    gap = _differences(cell.top1(), theirs)
    if not gap:
        return Reading((UNKNOWN,), UNKNOWN)
    return Reading((f"{spread(gap, signed=True)}{_weak(gap)}",), _told(gap), mean(gap))


def _differences(mine: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    return {seed: mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())}


def _told(gap: Mapping[int, float]) -> str:
    """Whether a difference that should be positive is, as far as its spread over seeds tells."""
    return UNTOLD if _weak(gap) else HOLDS if mean(gap) > 0 else FAILS


def _weak(gap: Mapping[int, float]) -> str:
    """A remark where a mean difference is no larger than its own spread over seeds."""
    if len(gap) < 2:
        return " (one seed)"
    return " (within the spread)" if abs(mean(gap)) <= statistics.stdev(gap.values()) else ""


def _likeness(one: float | None, other: float | None) -> float | None:
    """By which fraction two numbers differ."""
    if one is None or other is None:
        return None
    return math.expm1(abs(math.log(one / other)))


def _text(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}"


def _any(verdicts: Iterable[str]) -> str:
    """Of a claim that says "up to"."""
    found = set(verdicts)
    return next((verdict for verdict in (HOLDS, FAILS, UNTOLD) if verdict in found), UNKNOWN)


def _all(verdicts: Iterable[str]) -> str:
    """Of a claim on every cell: one that fails is enough; to hold, at least half must tell."""
    found = list(verdicts)
    if FAILS in found:
        return FAILS
    if 2 * found.count(HOLDS) >= len(found) > 0:
        return HOLDS
    return UNTOLD if {HOLDS, UNTOLD} & set(found) else UNKNOWN
