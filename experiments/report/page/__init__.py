"""The page a person can look at: one self-contained HTML file about an exported run."""

from collections.abc import Callable, Mapping
from typing import Any

from experiments.report.page import overview, patterns, speed, usage
from experiments.report.page.charts import hatches
from experiments.report.page.facts import Facts
from experiments.report.page.markup import Html, el, join
from experiments.report.page.style import STYLE

# Nothing is loaded and nothing is run, whatever the data holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

SECTIONS: dict[str, tuple[str, Callable[[Facts], Html]]] = {
    "accuracy": ("Accuracy by epoch", overview.accuracy),
    "sizes": ("File sizes", overview.sizes),
    "latency": ("Latency", speed.latency),
    "layers": ("Layer by layer", speed.layers),
    "patterns": ("Patterns", patterns.gallery),
    "shape": ("What this shape means for speed", speed.meaning),
    "usage": ("How to use the files", usage.usage),
    "provenance": ("Where it comes from", usage.provenance),
}


def render(data: Mapping[str, Any]) -> str:
    """Draw the page.

    It needs no network and no JavaScript; all text from the data is escaped. What the data does not hold is said to
    be "not measured" or "not recorded".

    Args:
        data: plain data, each part of which may be missing or None:
            ``summary`` (summary.json), ``metrics`` (the lines of metrics.jsonl), ``config``, ``setting``: of the run;
            ``manifest``: of the export, its "facts" as in `clicktrain_jax.export`;
            ``sizes``: ``dense_bytes`` of the whole net in float32, ``conv_dense_bytes``, ``conv_bytes`` (in the
            export, indices included), ``conv_index_bytes`` (of these, indices), ``header_bytes`` (manifest.json
            and the header of weights.safetensors), ``files`` {name: bytes} and ``layers`` {leaf name: bytes};
            ``timing``: ``device``, ``versions``, ``cores``, ``batches`` {batch size: {engine: {"median_s", "low_s",
            "high_s"}}} with the engines "dense (XLA)", "this net" and any others, low and high being the 20th and 80th
            percentiles, and ``layers`` [{"name", "dense_s", "pattern_s", "runs": "dense" or "pattern", "why"}], each
            alone, of the smallest batch.

    Returns:
        The HTML document.
    """
    facts = Facts(data)
    links = (el("a", title, href=f"#{key}") for key, (title, _) in SECTIONS.items())
    sections = (
        el("section", el("h2", title, id=f"{key}-heading"), draw(facts), id=key, aria_labelledby=f"{key}-heading")
        for key, (title, draw) in SECTIONS.items()
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("link", rel="icon", href="data:,"),
        el("title", f"{facts.name}: exported"),
        el("style", Html(STYLE)),
    )
    main = el("main", overview.head(facts), el("nav", *links, aria_label="Parts of this page"), *sections, _foot())
    return join([Html("<!doctype html>\n"), el("html", head, el("body", hatches(), main), lang="en"), "\n"])


def _foot() -> Html:
    return el("footer", "Made by clicktrain-jax from the run's records; this file needs no network.")
