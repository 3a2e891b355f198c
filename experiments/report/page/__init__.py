"""The page a person can look at: one self-contained HTML file about an exported run.

`facts` reads the data, which may be missing or broken; `words` and `charts` say and draw what follows; page.html lays
it out, and escapes whatever it is given.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clicktrain_jax import extras
from experiments.report.page import charts, words, writing
from experiments.report.page.facts import DENSE, MANIFEST, NET, WEIGHTS, Facts

SECTIONS = {
    "accuracy": "Accuracy by epoch",
    "sizes": "File sizes",
    "latency": "Latency",
    "layers": "Layer by layer",
    "patterns": "Patterns",
    "shape": "What this shape means for speed",
    "usage": "How to use the files",
    "provenance": "Where it comes from",
}
# Text of a JSON file may hold what no HTML document may: control characters, half of a surrogate pair.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


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

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed; the message names the extra.
    """
    with extras.brings("experiments"):
        return _template().render(facts=Facts(data)).lstrip()


@functools.cache
def _template() -> Any:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.globals |= {
        "DENSE": DENSE,
        "NET": NET,
        "MANIFEST": MANIFEST,
        "WEIGHTS": WEIGHTS,
        "sections": SECTIONS,
        "words": words,
        "charts": charts,
        "style": Markup(charts.STYLE),
        "svg": Markup,
    }
    for name in ("figures", "percent", "times", "size", "ms", "milliseconds", "count_of"):
        environment.filters[name] = _of_known(getattr(writing, name))
    return environment.get_template("page.html")


def _shown(value: Any) -> Any:
    """What stands in the page for a value: escaped, unless it is markup, after this."""
    if value is None:
        return words.NOT_RECORDED
    return _FORBIDDEN.sub("\ufffd", value) if type(value) is str else value


def _of_known(function: Any) -> Any:
    """A filter that leaves what is not known as it is."""
    return lambda value, *arguments: None if value is None else function(value, *arguments)
