"""The gallery: which patterns the kept kernels have, and how often."""

from collections.abc import Mapping

from experiments.report.page.charts import glyph
from experiments.report.page.facts import Facts, Layer
from experiments.report.page.markup import Html, count_of, el, join, percent
from experiments.report.page.overview import missing

# More than these of the net stand behind a click; of a layer they are only counted.
_SHOWN, _SHOWN_LAYER = 24, 12


def gallery(facts: Facts) -> Html:
    """The net's patterns, the most used first, and each layer's on demand."""
    having = [layer for layer in facts.layers if layer.patterns]
    counts: dict[str, int] = {}
    for layer in having:
        for text, count in layer.patterns.items():
            counts[text] = counts.get(text, 0) + count
    kept = sum(counts.values())
    if not kept:
        return missing("Patterns: not recorded, or no layer of this net has any.")
    used = _used(counts)
    where = f"{count_of(kept, 'kept kernel')} of {count_of(len(having), 'layer')}"
    words = f"{count_of(len(used), 'pattern')} in use by {where}."
    if len(counts) > len(used):
        words += f" {count_of(len(counts) - len(used), 'further pattern')} of the set: never used."
    words += " Filled squares are the taps that are kept."
    rest = used[_SHOWN:]
    more = el("details", el("summary", f"{count_of(len(rest), 'more pattern')}"), _list(rest, kept)) if rest else None
    layers = el(
        "details",
        el("summary", f"The patterns of each layer ({count_of(len(having), 'layer')})"),
        el("div", *map(_layer, having), class_="inner"),
    )
    return join([el("p", words), _list(used[:_SHOWN], kept), more, layers])


def _used(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Equally used ones stay in the order of their set."""
    return sorted(((text, count) for text, count in counts.items() if count > 0), key=lambda entry: -entry[1])


def _list(used: list[tuple[str, int]], kept: int, *, small: bool = False) -> Html:
    entries = (
        el("li", glyph(text, 30 if small else 48) or text, el("b", percent(count / kept, 1)), el("br"), f"{count:,}")
        for text, count in used
    )
    return el("ul", *entries, class_="patterns small" if small else "patterns")


def _layer(layer: Layer) -> Html:
    used, kept = _used(layer.patterns), sum(layer.patterns.values())
    words = f"{layer.name}: {count_of(kept, 'kept kernel')}, {count_of(len(used), 'pattern')}"
    rest = used[_SHOWN_LAYER:]
    others = sum(count for _, count in rest)
    counted = f"{count_of(len(rest), 'other pattern')}: {percent(others / kept, 1)}" if rest else None
    shown = _list(used[:_SHOWN_LAYER], kept, small=True) if used else None
    return el("details", el("summary", words), shown, el("p", counted, class_="soft") if counted else None)
