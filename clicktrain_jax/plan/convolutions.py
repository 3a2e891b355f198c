"""Which leaves of a tree are kernels of two-dimensional convolutions, and in what layout, as names and shapes tell.

Nothing in an array says what it is used for. What is taken for a convolution by itself must look like one; whatever
does not, a rule that names it declares to be one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from clicktrain_jax.trees import KERNEL_AXES

Axes = Literal["HWIO", "OIHW"]
Shape = tuple[int, ...]

# Positions, in the other layout, of the axes in the order of this one.
TO_HWIO = {"HWIO": (0, 1, 2, 3), "OIHW": (2, 3, 1, 0)}
FROM_HWIO = {"HWIO": (0, 1, 2, 3), "OIHW": (3, 2, 0, 1)}

_KERNEL = re.compile(r"kernel|weight|conv|filter|^w$", re.IGNORECASE)
_TABLE = re.compile(r"embed|(^|_)pos(_|\d|$)|position|token|table|prompt|bias", re.IGNORECASE)
_STACKED = re.compile(r"^(Scan|Vmap)([A-Z_]|$)|^(?i:scan|vmap|stacked)|(?i:scanned|conv_?1d)")
_LOCAL = re.compile(r"conv_?local|local_?conv|locally|(^|_)local(_|\d|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attention|attn|(^|_)mha(_|\d|$)|^(query|key|value|qkv)$", re.IGNORECASE)
_SHORTCUT = re.compile(r"shortcut|downsample", re.IGNORECASE)
# Words that name other things too: what they name is a shortcut where it has a single tap.
_SHORTCUT_1X1 = re.compile(r"(^|_)proj(_|\d|$)|skip|identity", re.IGNORECASE)


def permuted(shape: Shape, order: tuple[int, ...]) -> Shape:
    """A shape with its axes in another order."""
    return tuple(shape[axis] for axis in order)


def bias_of(name: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the bias that stands beside a kernel, without axes of 1; None when there is none."""
    module, slash, last = name.rpartition("/")
    beside = shapes.get(module + slash + {"w": "b"}.get(last, "bias"))
    return None if beside is None else tuple(size for size in beside if size > 1) or (1,)


def speaks_of_kernels(names: Iterable[str]) -> bool:
    """Whether the tree calls its kernels something like "kernel": leaves of other names are none then."""
    return any(_KERNEL.search(name.rpartition("/")[2]) for name in names)


def why_not(name: str, shape: Shape, bias: Shape | None = None, known: bool = False) -> str | None:
    """Why a 4-D leaf is not taken for a convolution's kernel (kh, kw, cin, cout); None when it is.

    Args:
        name: the leaf's name.
        shape: its shape.
        bias: from `bias_of`. One number a filter is what an ordinary convolution has.
        known: from `speaks_of_kernels`, over the tree's 4-D leaves.
    """
    *modules, last = name.split("/")
    kh, kw, cin, cout = shape
    if _TABLE.search(last):
        return "named like a table of positions or tokens"
    if known and not _KERNEL.search(last):
        return "not named like a kernel, as others of this tree are"
    if bias in ((cout,), (cin,)):
        return None
    if any(_STACKED.search(key) for key in modules):
        return "named like kernels that are stacked by a scan or vmap"
    if any(_LOCAL.search(key) for key in modules):
        return "named like local kernels, one at every place"
    attends = any(_ATTENTION.search(key) for key in modules) and not (modules and "conv" in modules[-1].lower())
    if attends and (kh, kw) != (1, 1):
        return "named like an attention's"
    if layout(shape, bias) == "OIHW":
        return "looks like OIHW"
    if bias is not None:
        return f"its bias of {bias} is not one number a filter: stacked or local kernels"
    if kh != kw and min(kh, kw) > 1:
        return f"{kh}x{kw} is not square: stacked one-dimensional kernels?"
    if max(kh, kw) > 11 and cin > 4 or kh == kw > 7 and kh % 2 == 0 and cin > 4:
        return f"{kh}x{kw} is no usual kernel size"
    return None


def convolutions(shapes: Mapping[str, Shape]) -> dict[str, str | None]:
    """Every 4-D leaf (kh, kw, cin, cout), and why it is not taken for a convolution's kernel (None: it is)."""
    kernels = {name: shape for name, shape in shapes.items() if len(shape) == len(KERNEL_AXES)}
    known = speaks_of_kernels(kernels)
    return {name: why_not(name, shape, bias_of(name, shapes), known) for name, shape in kernels.items()}


def is_shortcut(name: str, shape: Shape) -> bool:
    """Whether a convolution is named like a shortcut around a block."""
    keys = name.split("/")
    return any(_SHORTCUT.search(key) for key in keys) or (
        shape[:2] == (1, 1) and any(_SHORTCUT_1X1.search(key) for key in keys)
    )


def _kernel_like(height: int, width: int) -> bool:
    square = height == width and height in (1, 2, 3, 4, 5, 6, 7, 9, 11)
    return square or (min(height, width) == 1 and max(height, width) in (3, 5, 7, 9, 11))


def layout(shape: Shape, bias: Shape | None = None) -> Axes | None:
    """The layout of one kernel by its shape and its bias; None when it could be both."""
    if not _kernel_like(*shape[2:]):
        return "HWIO"
    if bias in ((shape[0],), (shape[3],)) and shape[0] != shape[3]:
        return "OIHW" if bias == (shape[0],) else "HWIO"
    return "OIHW" if max(shape[:2]) > 7 and not _kernel_like(*shape[:2]) else None


def layouts(shapes: Mapping[str, Shape]) -> dict[str, Axes | None]:
    """The layout of every 4-D leaf; None for one that nothing tells.

    What a shape leaves open, the other kernels decide when they agree. Without any, kernels called "weight" (as
    Equinox and PyTorch call them) stay open, and others are (kh, kw, cin, cout), as everywhere in jax.
    """
    # What has another reason not to be a kernel in either layout has no voice.
    single = {name: layout(shape, bias_of(name, shapes)) for name, shape in shapes.items() if len(shape) == 4}
    silent = {name for name, why in convolutions(shapes).items() if why is not None and single[name] == "HWIO"}
    voices = {found for name, found in single.items() if found is not None and name not in silent}

    def settle(name: str, found: Any) -> Axes | None:
        if found is not None:
            return found
        if voices == {"OIHW"}:
            return "OIHW"
        return None if not voices and name.rpartition("/")[2] == "weight" else "HWIO"

    return {name: settle(name, found) for name, found in single.items()}


def check_layout(name: str, shape: Shape, found: Axes | None) -> None:
    """Raise a ValueError when a kernel that is to be pruned does not look like (kh, kw, cin, cout)."""
    if found == "HWIO":
        return
    looks = "looks like OIHW" if found == "OIHW" else "could be HWIO (kh, kw, cin, cout) or OIHW"
    raise ValueError(
        f"{name!r} of shape {shape} {looks} (filters, channels, height, width), the layout of Equinox and PyTorch: "
        "give make_plan axes='OIHW', or axes='HWIO' if its axes are (kh, kw, cin, cout)"
    )


def tap_axes(shape: Shape, axes: Axes | None = None) -> tuple[int, int]:
    """The axes of a kernel's taps; without ``axes``, those of the layout that its shape looks like."""
    return (2, 3) if (axes or layout(shape)) == "OIHW" else (0, 1)


def cout_axis(shape: Shape, axes: Axes | None = None) -> int:
    """The axis of a kernel's filters, likewise."""
    return 0 if (axes or layout(shape)) == "OIHW" else 3


def check_axes(axes: Any) -> None:
    """Raise a ValueError for an unknown layout; None stands for one that is to be found."""
    if axes not in (None, *TO_HWIO):
        raise ValueError(f"axes={axes!r}: expected 'HWIO' (kh, kw, cin, cout) or 'OIHW', or None to go by the shapes")


def in_hwio(shapes: Mapping[str, Shape], axes: Axes | None) -> dict[str, Shape]:
    """Shapes with those of 4-D leaves as (kh, kw, cin, cout); ``axes`` None goes by what each looks like."""
    found = layouts(shapes) if axes is None else dict.fromkeys(shapes, axes)
    return {
        name: permuted(shape, TO_HWIO[found[name] or "HWIO"]) if len(shape) == len(KERNEL_AXES) else shape
        for name, shape in shapes.items()
    }
