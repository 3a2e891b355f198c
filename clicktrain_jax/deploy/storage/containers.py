"""From trees to leaves by name, and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.masks import FullMask, LayerMask, Masks, build_masks, check_shape
from clicktrain_jax.plan.convolutions import Axes, check_axes, layouts, tap_axes
from clicktrain_jax.trees import Tree, check_same_names, is_kernel_shape, key_name, map_named, named_leaves, nest


def check_names(names: Iterable[str]) -> None:
    """Raise a ValueError for names that nested dictionaries or a file's header cannot hold."""
    known = set(names)
    for name in known:
        if not name.isprintable():
            raise ValueError(f"leaf name {name!r} is not printable: rename it")
        if name == "__metadata__":
            raise ValueError("a leaf cannot be called '__metadata__': the file format keeps that name for itself")
        keys = name.split("/")
        for end in range(1, len(keys)):
            if "/".join(keys[:end]) in known:
                raise ValueError(f"{name!r} lies inside of the leaf {'/'.join(keys[:end])!r}: rename one of them")


def find_prefix(names: Iterable[str], mask_names: list[str]) -> str:
    """What stands before each mask's name in the name of its leaf: "", "params/" and the like.

    Raises:
        ValueError: there is none, or more than one.
    """
    known = set(names)
    if set(mask_names) <= known:
        return ""
    first = mask_names[0]
    prefixes = sorted(name.removesuffix(first) for name in known if name.endswith("/" + first))
    fitting = [prefix for prefix in prefixes if all(prefix + name in known for name in mask_names)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"masks fit the variables below {fitting[0]!r} and {fitting[1]!r}: give all names")
    check_same_names(sorted(known), mask_names, "masks")
    raise AssertionError("names that are the same have the prefix ''")


def masks_by_name(
    masks: Any, shapes: Mapping[str, tuple[int, ...] | None], axes: dict[str, Axes | None]
) -> tuple[str, dict[str, FullMask | None]]:
    """The masks' prefix (see `find_prefix`), and the masks by the variables' names; None at dense leaves.

    Args:
        masks: `Masks`, or one boolean tree.
        shapes: of the variables, by name; None for a leaf that is None.
        axes: the layout that each kernel looks like; where its mask tells, that is written into it.

    Raises:
        ValueError: masks of another tree, of other shapes, or not bool.
    """
    whole = not isinstance(masks, Masks)
    masks = Masks.of(masks)
    if not masks.names:
        raise ValueError("masks have no leaves: give None for no masks")
    prefix = find_prefix(shapes, list(masks.names))
    found: dict[str, FullMask | None] = dict.fromkeys(prefix + name for name in masks.names)
    for name, layer in jax.device_get(masks.layers).items():
        name = prefix + name
        if isinstance(layer, LayerMask):
            axes[name] = "OIHW" if np.ndim(layer.kernel) == 4 else "HWIO"
        parts = FullMask(*(None if leaf is None else _bools(name, leaf, shapes) for leaf in layer.full()))
        found[name] = split(parts.kernel, axes.get(name)) if whole else parts
    return prefix, found


def _bools(name: str, leaf: Any, shapes: Mapping[str, tuple[int, ...] | None]) -> np.ndarray:
    mask, shape = np.asarray(leaf), shapes[name]
    if shape is None:
        raise ValueError(f"there is a mask for {name!r}, and the leaf is None: expected None there too")
    if mask.dtype != bool:
        raise ValueError(f"the mask of {name!r} has dtype {mask.dtype}, expected bool: True where a weight stays")
    check_shape(name, np.broadcast_to(False, shape), mask)
    return mask


def split(keep: np.ndarray, axes: Axes | None = None) -> FullMask:
    """Pattern and kernel mask of one mask of weights: kernels without any weight are removed, patterns are the rest.

    Args:
        keep: bool, of any shape.
        axes: the layout of a kernel; None for (kh, kw, cin, cout).
    """
    if not is_kernel_shape(keep.shape):
        return FullMask(keep, None)
    taps = tap_axes(keep.shape, axes or "HWIO")
    if all(keep.shape[axis] == 1 for axis in taps):
        return FullMask(None, keep)
    kernel = np.broadcast_to(keep.any(axis=taps, keepdims=True), keep.shape)
    return FullMask(keep | ~kernel, kernel)


def masks_from_zeros(params: Tree, axes: Axes | None = None) -> Masks:
    """The masks that a checkpoint's zeros tell of.

    Args:
        params: tree of arrays.
        axes: the layout of the kernels, "HWIO" or "OIHW"; None goes by their shapes and biases.

    Returns:
        `Masks` with the containers of ``params``, bool arrays at its 4-D floating leaves that hold exact zeros and
        None elsewhere. A kernel that is zero at all taps is removed, and its pattern is all True; the others' patterns
        are their taps that are not zero (NaN is not). 1x1 leaves have no pattern.
    """
    check_axes(axes)
    found: dict[str, FullMask] = {}
    looks = layouts({name: jnp.shape(leaf) for name, leaf in named_leaves(params) if leaf is not None})
    for name, leaf in named_leaves(params):
        if leaf is None or not is_kernel_shape(jnp.shape(leaf)) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        keep = np.asarray(leaf) != 0
        if not keep.all():
            found[name] = split(keep, axes or looks[name])
    return build_masks(params, found)


def fill(like: Tree, leaves: Mapping[str, Any]) -> Tree:
    """The containers of ``like`` with new leaves by name.

    Raises:
        ValueError: other names, shapes or dtypes than those of ``like``.
    """
    check_same_names([name for name, _ in named_leaves(like)], list(leaves), "like")

    def put(name: str, expected: Any) -> Any:
        leaf = leaves[name]
        if (leaf is None) != (expected is None):
            raise ValueError(f"like: {name!r} is None in one of 'like' and the export, not in the other")
        if leaf is None:
            return None
        if jnp.shape(leaf) != jnp.shape(expected):
            raise ValueError(f"like: {name!r} has shape {jnp.shape(expected)}, the export holds {jnp.shape(leaf)}")
        if hasattr(expected, "dtype") and expected.dtype != leaf.dtype:
            raise ValueError(f"like: {name!r} has dtype {expected.dtype}, the export holds {leaf.dtype}")
        return leaf

    return map_named(put, like)


def fill_masks(like: Tree | None, prefix: str, masks: Mapping[str, FullMask | None]) -> Masks:
    """`Masks` by name in the containers that ``like`` has below the prefix.

    They become nested dictionaries where there is no ``like``, or where its leaves are more than the masks'.
    """
    masks = {name.removeprefix(prefix): mask for name, mask in masks.items()}
    inner = None if like is None else _below(like, prefix)
    if inner is None or {name for name, _ in named_leaves(inner)} != set(masks):
        inner = nest(dict.fromkeys(masks))
    return build_masks(inner, {name: mask for name, mask in masks.items() if mask is not None})


def _below(tree: Tree, prefix: str) -> Tree | None:
    """The subtree below a prefix, found one level of containers at a time; None when there is none."""
    for key in prefix.split("/")[:-1]:
        children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node, tree=tree: node is not tree)[0]
        found = [child for path, child in children if path and key_name(path[0]) == key]
        if len(found) != 1:
            return None
        tree = found[0]
    return tree
