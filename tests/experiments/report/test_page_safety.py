"""The page with data that are missing, broken or hostile; that it loads nothing and can be read by all."""

import copy
import functools
import json
import math
import random
import re
import sys

import pytest

from experiments.report import page
from experiments.report.page.charts import STYLE
from experiments.report.page.writing import figures, milliseconds, percent, size, times
from tests.experiments.report.page_data import Reader, example, read, seconds


@pytest.fixture
def data():
    return example()


def parts(data, path=()):
    """Paths of all parts of the data."""
    found = [path] if path else []
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return found + [each for key, value in inner for each in parts(value, (*path, key))]


def test_every_part_may_be_missing_or_broken(data, monkeypatch):
    data["metrics"] = data["metrics"][2:4]
    # Most parts change no drawing.
    monkeypatch.setattr(page.charts, "charts", functools.cache(page.charts.charts))
    paths, rng = parts(data), random.Random(0)
    strange = (None, "text", 0, -3, 1e300, math.nan, math.inf, 10**400, True, [], {}, [None], {"a": 1}, [[1, 2], 3])
    for path in paths:
        broken = copy.deepcopy(data)
        node = broken
        for key in path[:-1]:
            node = node[key]
        was, node[path[-1]] = node[path[-1]], rng.choice(strange)
        found = read(broken)
        # What was text, and the config, is shown as it is.
        words = " ".join(found.text(section) for section in found.words if section not in ("", "provenance"))
        assert isinstance(was, str) or not re.search(r"\b(nan|inf)\b", words), path


def test_text_of_the_data_is_harmless(data):
    evil = "<script>alert('x')</script>\"' onload=\"alert(1)\" &amp; \x00\x1b\ud800 ]]>"

    def poisoned(value):
        if isinstance(value, dict):
            return {key: poisoned(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poisoned(inner) for inner in value]
        return value + evil if isinstance(value, str) else value

    bad = poisoned(data)
    bad["timing"]["batches"]["1"][evil] = seconds(0.003)
    bad["sizes"]["files"][evil] = 5
    bad["config"][evil] = {evil: evil}
    bad["summary"]["layers"][1]["pattern_counts"][evil] = 7
    bad["summary"]["layers"][1]["name"] = evil
    text = page.render(bad)
    found = Reader(text)
    assert "script" not in {tag for tag, _ in found.tags}
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]
    assert evil.replace("\x00\x1b\ud800", "\ufffd" * 3) in "".join(found.words[""])
    text.encode("utf-8")


def test_nothing_is_loaded(data):
    text = page.render(data)
    found = Reader(text)
    assert not {tag for tag, _ in found.tags} & {"script", "img", "iframe", "object", "embed", "base", "form"}
    keys = ("href", "src", "xlink:href")
    links = [attributes[key] for _, attributes in found.tags for key in keys if key in attributes]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert "@import" not in text and all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    policy = next(attributes["content"] for _, attributes in found.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


def test_charts_can_be_read_without_seeing_them(data):
    found = read(data)
    identities = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    named = []
    for index, (tag, attributes) in enumerate(found.tags):
        if attributes.get("role") == "img":
            assert "aria-label" in attributes or found.tags[index + 1][0] == "title"
            assert set(attributes.get("aria-describedby", "").split()) <= set(identities)
            named.append(attributes.get("aria-label"))
        else:
            assert tag != "svg" or attributes["aria-hidden"] == "true"
    assert {"Accuracy by epoch", "Loss by epoch"} <= set(named)
    boxes = [attributes for _, attributes in found.tags if "scroll" in attributes.get("class", "").split()]
    assert len(boxes) >= 2 and any(box.get("tabindex") == "0" for box in boxes)


def luminance(colour):
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def test_colours_stand_out_in_light_and_dark():
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for part in STYLE.split(":root {")[1:3]]
    assert len(themes) == 2 and themes[0]["ink"] != themes[1]["ink"]
    for theme in themes:
        for front, back, least in (
            ("ink", "paper", 7),
            ("soft", "paper", 4.5),
            ("soft", "card", 4.5),
            ("net", "card", 4.5),
            ("net", "band-pruned", 3),
            ("net", "band-regularize", 3),
            ("dense", "band-dense", 3),
            ("file", "paper", 3),
            ("dense", "band-pruned", 3),
            ("dense", "paper", 3),
            ("index", "paper", 3),
            ("rest", "paper", 3),
        ):
            light, dark = sorted((luminance(theme[front]), luminance(theme[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (front, back, theme)


def test_numbers_are_written_for_people():
    assert [figures(value) for value in (0, 0.00123456, 0.9996, 12.345, 123.4, 1234.5)] == [
        "0",
        "0.00123",
        "1.00",
        "12.3",
        "123",
        "1,230",
    ]
    plain = [text.replace("\xa0", " ") for text in (size(999), size(999_600), size(37_700_000), size(1.2e9))]
    assert plain == ["999 bytes", "1.00 MB", "37.7 MB", "1.20 GB"]
    assert [percent(share).replace("\xa0", " ") for share in (0.98831, 0.00001, 0, 1)] == [
        "98.83 %",
        "< 0.01 %",
        "0.00 %",
        "100.00 %",
    ]
    assert [times(value) for value in (7.916, 11.46, 0.934, 0.996, 9.999, 0.0123)] == [
        "7.92×",
        "11.5×",
        "0.93×",
        "1.00×",
        "10.0×",
        "0.012×",
    ]
    assert milliseconds(0.0002).replace("\xa0", " ") == "0.200 ms"


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(data, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    page._template.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=rf"{package} is not installed.*clicktrain-jax\[experiments\]"):
        page.render(data)


def test_the_same_data_give_the_same_page(data):
    assert page.render(data) == page.render(json.loads(json.dumps(data)))
