"""What users call says the shape of every array that it takes or gives."""

import inspect
import re

import pytest

import clicktrain_jax as ct
import pallas_kernels as pk

_ARRAY = re.compile(r"\bArray\b|ndarray")
# (), (channels,), (kh, kw, cin, cout), (...); or in words.
_SHAPE = re.compile(r"\((|\.\.\.|\w+,|[\w* ]+(, ?[\w* ]+)+)\)|\bscalar|\bshaped? |\blikewise|\b(as|of) `")
PUBLIC = {
    f"{library.__name__}.{name}": value
    for library in (ct, ct.channels, ct.importance, ct.methods, ct.patterns, ct.reduction, pk)
    for name, value in vars(library).items()
    if not name.startswith("_") and inspect.isfunction(value) and value.__module__.startswith(library.__name__)
} | {"pallas_kernels.pattern_conv": pk.pattern_conv.pattern_conv}


def entries(function):
    """{parameter: its text} of the docstring's Args, "Returns" among it; and all of the text before them."""
    text = inspect.getdoc(function) or ""
    summary, _, sections = text.partition("\nArgs:\n")
    found = {"": summary}
    for names, said in re.findall(r"^    ([\w, `*]+): (.*(?:\n {8}.*)*)", sections, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), said)
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_arrays_have_shapes(name):
    said = entries(PUBLIC[name])
    assert said[""], "no docstring"
    for parameter in inspect.signature(PUBLIC[name]).parameters.values():
        given = str(parameter.annotation)
        # A random key has none, and functions tell of theirs in words.
        if _ARRAY.search(given) and "Callable" not in given and parameter.name != "key":
            text = said.get(parameter.name, said[""])
            assert _SHAPE.search(text), f"{parameter.name}: {text!r} says no shape"
