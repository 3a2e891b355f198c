"""Patterns: the sets of taps that a 3x3 kernel may keep (ClickTrain, arXiv 2011.10170).

A pattern is a boolean (kh, kw) array, True where the tap is kept. A pattern set is a boolean
``(P, kh, kw)`` array; its order matters, because ties between patterns go to the lowest index.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

# The twelve 4-of-9 patterns that the paper's authors publish with their recipes, in their order.
# The first four are the 2x2 corner blocks; the sets of 4, 8 and 12 are prefixes of this list.
_FIXED_PATTERNS = (
    "000/011/011",
    "000/110/110",
    "011/011/000",
    "110/110/000",
    "000/001/111",
    "000/111/010",
    "010/011/010",
    "010/110/010",
    "111/010/000",
    "000/100/111",
    "111/100/000",
    "000/101/011",
)
FIXED_SIZES = (4, 8, 12)


def parse(text: str) -> np.ndarray:
    """A pattern from text, rows parted by "/": ``parse("110/110/000")`` is bool (3, 3)."""
    rows = text.split("/")
    if any(len(row) != len(rows[0]) or set(row) - {"0", "1"} for row in rows):
        raise ValueError(f"pattern {text!r} is not rows of 0 and 1 of equal length, such as '110/110/000'")
    return np.array([[digit == "1" for digit in row] for row in rows])


def to_text(pattern: Any) -> str:
    """The inverse of `parse`."""
    return "/".join("".join("1" if tap else "0" for tap in row) for row in np.asarray(pattern))


def fixed_set(num_patterns: int) -> np.ndarray:
    """The published hand-made set of 4, 8 or 12 patterns.

    Args:
        num_patterns: 4, 8 or 12.

    Returns:
        bool (num_patterns, 3, 3); every pattern keeps 4 taps.

    Raises:
        ValueError: another number.

    Source: the recipes of ClickTrain's authors; the sets are nested.
    """
    if num_patterns not in FIXED_SIZES:
        raise ValueError(f"num_patterns={num_patterns!r}: fixed sets exist for 4, 8 and 12 patterns")
    return np.stack([parse(text) for text in _FIXED_PATTERNS[:num_patterns]])


def check_set(patterns: Any) -> Any:
    """Validate a pattern set and return it as a boolean array.

    Args:
        patterns: bool or 0/1 array (P, kh, kw), 1 <= P <= 255; may be traced.

    Raises:
        ValueError: wrong rank or number, or (for concrete values) an entry that is neither 0 nor 1, or an
            empty pattern.
    """
    shape = tuple(jnp.shape(patterns))
    if len(shape) != 3:
        raise ValueError(f"patterns of shape {shape}: expected (P, kh, kw), one boolean grid a pattern")
    # Ids are stored in a byte each.
    if not 1 <= shape[0] <= 255:
        raise ValueError(f"{shape[0]} patterns: expected 1 to 255")
    if shape[1] * shape[2] > 32:
        raise ValueError(f"patterns of {shape[1]}x{shape[2]} taps: at most 32 taps are supported")
    if isinstance(patterns, jax.core.Tracer):
        return patterns.astype(bool)
    array = np.asarray(patterns)
    if not np.isin(array, (0, 1)).all():
        raise ValueError("patterns hold values other than 0 and 1: expected booleans, True where a tap is kept")
    array = array.astype(bool)
    if not array.any(axis=(1, 2)).all():
        raise ValueError("a pattern keeps no tap: remove whole kernels through the plan's fractions instead")
    return array
