"""Masks: which taps and which kernels stay; building, viewing, applying and checking them.

A layer's choice is a `LayerMask`: a byte and a bool a kernel, and the set of patterns. The optimizer state holds a tree
of them, `Masks` is such a tree with two boolean views, ``pattern`` (each kernel keeps its pattern's taps) and
``kernel`` (whole kernels removed). The two are chosen independently of one another and a weight stays when both say so.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from clicktrain_jax.plan.convolutions import FROM_HWIO
from clicktrain_jax.trees import (
    Tree,
    check_same_names,
    is_none,
    map_named,
    named_leaves,
    path_keys,
    placed_like,
    replicated,
)

_FEW_PATTERNS = 16


class FullMask(NamedTuple):
    """The mask of one leaf, a bool for each weight: what others hand in, and what `LayerMask.full` spells out.

    Attributes:
        pattern: bool of the leaf's shape, or None where patterns do not apply.
        kernel: the same; one of the two is there.
    """

    pattern: Any
    kernel: Any

    @property
    def parts(self) -> str:
        """Which masks there are: "pattern", "kernel" or "both"."""
        if self.pattern is None or self.kernel is None:
            return "kernel" if self.pattern is None else "pattern"
        return "both"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf."""
        return jnp.shape(self.kernel if self.pattern is None else self.pattern)

    def combined(self) -> Any:
        """Bool of the leaf's shape, True where a weight stays."""
        if self.pattern is None or self.kernel is None:
            return self.kernel if self.pattern is None else self.pattern
        return self.pattern & self.kernel

    def full(self) -> "FullMask":
        """Itself."""
        return self

    def where(self, flag: Any) -> "FullMask":
        """This mask where a bool, perhaps traced, is True; where it is False, one that keeps all."""
        return FullMask(*(None if part is None else part | ~flag for part in self))

    def transposed(self, order: tuple[int, ...]) -> "FullMask":
        """The mask of the transposed leaf."""
        return FullMask(*(None if part is None else part.transpose(order) for part in self))


class LayerMask(NamedTuple):
    """The mask of one layer as it is chosen and kept.

    Attributes:
        pattern_ids: uint8 (cin, cout), the index of each kernel's pattern; None for 1x1 layers.
        kernel: bool (cin, cout), True where the kernel stays; (cout, cin, 1, 1) for a leaf that is OIHW. Without
            patterns it may have the leaf's own shape: then single weights stay or go.
        patterns: bool (P, kh, kw), the set that the ids index; None for 1x1 layers. Before the selection every pattern
            keeps all taps.
    """

    pattern_ids: Any
    kernel: Any
    patterns: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf: (kh, kw, cin, cout), or OIHW where ``kernel`` says so."""
        taps = (1, 1) if self.patterns is None else jnp.shape(self.patterns)[1:]
        if np.ndim(self.kernel) == 4 and self.patterns is None:
            return tuple(jnp.shape(self.kernel))
        if np.ndim(self.kernel) == 4:
            return (*jnp.shape(self.kernel)[:2], *taps)
        return (*taps, *jnp.shape(self.kernel))

    def full(self) -> FullMask:
        """Both masks as bool of the leaf's shape; no pattern for a 1x1 layer."""
        return _full(self, np) if isinstance(self.kernel, np.ndarray) else _compiled_full(self)

    def combined(self) -> jax.Array:
        """Bool of the leaf's shape, True where a weight stays."""
        return self.full().combined()


def _full(layer: LayerMask, xp: Any) -> FullMask:
    if layer.kernel.ndim == 4 and layer.patterns is None:
        return FullMask(None, layer.kernel)
    if layer.kernel.ndim == 4:
        parts = _full(layer._replace(kernel=layer.kernel[:, :, 0, 0].T), xp)
        return parts.transposed(FROM_HWIO["OIHW"])
    kernel = xp.broadcast_to(layer.kernel[None, None], layer.shape)
    if layer.patterns is None:
        return FullMask(None, kernel)
    if layer.shape[0] * layer.shape[1] > 32:
        return FullMask(xp.moveaxis(layer.patterns[layer.pattern_ids], (2, 3), (0, 1)), kernel)
    words = _words(layer, xp)
    # The barrier keeps a compiler from looking every kernel's word up again for each of its taps, in each loop over
    # weights that reads the mask.
    return FullMask(_spread(words if xp is np else jax.lax.optimization_barrier(words), layer.shape, xp), kernel)


def _words(layer: LayerMask, xp: Any) -> Any:
    """uint32 (cin, cout): each kernel's taps as bits. One table look-up a kernel; a gather of whole patterns would read
    nine times as many entries. In a small table XLA on a CPU finds an entry faster by comparing than by its gather."""
    taps = xp.arange(layer.shape[0] * layer.shape[1], dtype=xp.uint32)
    bits = xp.left_shift(layer.patterns.reshape(-1, taps.size).astype(xp.uint32), taps[None])
    table = xp.sum(bits, axis=1, dtype=xp.uint32)
    if xp is np or len(table) > _FEW_PATTERNS:
        return table[layer.pattern_ids]
    words = jnp.zeros(layer.pattern_ids.shape, jnp.uint32)
    for index in range(len(table)):
        words = jnp.where(layer.pattern_ids == index, table[index], words)
    return words


def _spread(words: Any, shape: tuple[int, ...], xp: Any) -> Any:
    """Bool (kh, kw, cin, cout) of words (cin, cout): a bit test a tap. Nothing is reshaped on the way, for which XLA's
    loops would divide at each weight."""
    taps = np.arange(shape[0] * shape[1], dtype=np.uint32).reshape(shape[:2])
    return (xp.right_shift(words[None, None], taps[:, :, None, None]) & xp.uint32(1)).astype(bool)


@partial(jax.jit, inline=True)
def _compiled_full(layer: LayerMask) -> FullMask:
    """One program outside of jit, and inside of it nothing that shows."""
    # What jit returned may be sharded in any way.
    return _full(LayerMask(*jax.tree.map(replicated, tuple(layer))), jnp)


class _Aside:
    """A value in a tree's structure by which structures do not differ."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Aside)

    def __hash__(self) -> int:
        return 0


@jax.tree_util.register_pytree_with_keys_class
class Masks:
    """The masks of a parameter tree: a `LayerMask` at each pruned leaf. A pytree of their arrays.

    ``Masks(pattern=tree, kernel=tree)`` is made of two boolean trees with the parameters' containers, True where a
    weight stays, each leaf of its weight's shape or None; `Masks.of` takes a tree of `LayerMask`. The attributes
    ``pattern`` and ``kernel`` are such trees again, made on demand, inside jit too: a 3x3 layer that is pruned has
    both, a 1x1 layer has ``kernel`` alone, a dense leaf has neither.

    Attributes:
        layers: ``{leaf name: LayerMask}``, or `FullMask` where the masks came as boolean trees; dense leaves are
            missing.
        names: of all leaves of the tree.
        pending: True for those that `clicktrain_jax.masks_of` reads between a run's selection and its prune: the
            weights they mark are not zero yet. Copies of them are too; masks that are built, or come out of jit, are
            not.

    Raises:
        ValueError: the two trees have other leaves than one another.
    """

    _fields = ("pattern", "kernel")
    pending = False

    def __init__(self, pattern: Tree, kernel: Tree) -> None:
        patterns, kernels = dict(named_leaves(pattern)), dict(named_leaves(kernel))
        check_same_names(list(patterns), list(kernels), "masks.kernel")
        pairs = {name: FullMask(_bools(name, leaf), _bools(name, kernels[name])) for name, leaf in patterns.items()}
        present = {name: pair for name, pair in pairs.items() if not (pair.pattern is None and pair.kernel is None)}
        self._fill(present, tuple(patterns), jax.tree.structure(pattern, is_leaf=is_none))

    def _fill(self, layers: dict[str, Any], names: tuple[str, ...], structure: Any, pending: Any = None) -> None:
        self.layers, self.names, self._structure = layers, names, structure
        self.pending = pending is not None and pending.value

    @classmethod
    def of(cls, tree: Any) -> "Masks":
        """Masks of any form: `Masks`, a tree of `LayerMask` (or of the dictionaries that a checkpoint read without a
        template makes of them) and None, or one boolean tree."""
        if isinstance(tree, cls):
            return tree
        with_paths, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_layer)
        found = {"/".join(path_keys(path)): leaf for path, leaf in with_paths}
        if any(name.rpartition("/")[2] == "by_magnitude" for name in found):
            raise ValueError("masks is an optimizer state: expected clicktrain_jax.masks_of(opt_state)")
        layers = {name: _as_layer(name, leaf) for name, leaf in found.items() if leaf is not None}
        return cls.tree_unflatten((tuple(found), structure), (layers,))

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """For jax."""
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self.layers))
        static = self.names, self._structure, _Aside(self.pending and not traced)
        return ((jax.tree_util.GetAttrKey("layers"), self.layers),), static

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "Masks":
        """For jax."""
        masks = object.__new__(cls)
        masks._fill(children[0], *static)
        return masks

    def __iter__(self):
        return iter((self.pattern, self.kernel))

    def _replace(self, **parts: Tree) -> "Masks":
        return type(self)(**{"pattern": self.pattern, "kernel": self.kernel} | parts)

    def __reduce__(self):
        return type(self), (self.pattern, self.kernel), {"pending": self.pending}

    def __repr__(self) -> str:
        layers = ", ".join(f"{name!r}: {tuple(layer.shape)}" for name, layer in self.layers.items())
        return f"Masks({len(self.layers)} of {len(self.names)} leaves: {layers})"

    def view(self, part: Callable[[Any], Any]) -> Tree:
        """The tree of ``part(layer mask)``; None at dense leaves."""
        return self._structure.unflatten(
            [part(self.layers[name]) if name in self.layers else None for name in self.names]
        )

    @property
    def pattern(self) -> Tree:
        """Bool (kh, kw, cin, cout), True where a weight is in its kernel's pattern; or None."""
        return self.view(lambda layer: layer.full().pattern)

    @property
    def kernel(self) -> Tree:
        """Bool (kh, kw, cin, cout), True where a weight's kernel stays; or None."""
        return self.view(lambda layer: layer.full().kernel)


def _is_layer(node: Any) -> bool:
    return (
        node is None
        or isinstance(node, (LayerMask, FullMask))
        or (isinstance(node, dict) and set(node) == set(LayerMask._fields))
    )


def _bools(name: str, mask: Any) -> Any:
    """A mask, of 0 and 1 too, as bool."""
    if not hasattr(mask, "astype") or mask.dtype == bool:
        return mask
    if isinstance(mask, Tracer):
        return mask != 0
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"masks: the mask of {name!r} has dtype {mask.dtype}, expected bool: True where a weight stays, or 0 and 1"
        )
    return mask.astype(bool)


def _as_layer(name: str, node: Any) -> LayerMask | FullMask:
    """A layer's mask of arrays, whatever wraps them (an nnx optimizer wraps arrays in variables)."""
    if isinstance(node, FullMask):
        return node
    if not isinstance(node, (LayerMask, dict)):
        return FullMask(None, _bools(name, node))
    fields = node if isinstance(node, dict) else node._asdict()
    arrays = {name: jax.tree.leaves(value) for name, value in fields.items()}
    return LayerMask(**{name: values[0] if values else None for name, values in arrays.items()})


def keep_all(shape: tuple[int, ...], num_patterns: int, axes: str = "HWIO") -> LayerMask:
    """The mask that keeps every weight of a (kh, kw, cin, cout) layer, with the shapes that a selection will fill.

    ``axes`` is the layout of the leaf, and so of the masks.
    """
    kh, kw, cin, cout = shape
    kernel = jnp.ones((cin, cout) if axes == "HWIO" else (cout, cin, 1, 1), bool)
    if kh * kw == 1:
        return LayerMask(None, kernel, None)
    return LayerMask(jnp.zeros((cin, cout), jnp.uint8), kernel, jnp.ones((num_patterns, kh, kw), bool))


def build_masks(tree: Tree, layers: Mapping[str, Any]) -> Masks:
    """Masks with the containers of ``tree`` from ``{name: LayerMask, or (pattern, kernel) of full shape}``."""
    found = {name: layer if isinstance(layer, LayerMask) else FullMask(*layer) for name, layer in layers.items()}
    names = tuple(name for name, _ in named_leaves(tree))
    return Masks.tree_unflatten((names, jax.tree.structure(tree, is_leaf=is_none)), (found,))


def layers_for(tree: Tree, masks: Masks | Tree | None, what: str = "masks") -> dict[str, LayerMask | FullMask]:
    """The layers' masks by name, for leaves of ``tree``; masks of a part of the tree leave the rest
    dense, None all of it.

    Raises:
        ValueError: masks of another tree, or of other shapes.
    """
    if masks is None:
        return {}
    masks = Masks.of(masks)
    leaves = dict(named_leaves(tree))
    check_same_names(list(leaves), [*(set(leaves) - set(masks.names)), *masks.names], what)
    for name, layer in masks.layers.items():
        if leaves[name] is None:
            continue
        for mask in [layer] if isinstance(layer, LayerMask) else [part for part in layer if part is not None]:
            check_shape(name, leaves[name], mask)
    return masks.layers


def combine(masks: Masks) -> Tree:
    """One boolean tree, True where a weight stays; None at dense leaves."""
    return Masks.of(masks).view(lambda layer: layer.combined())


def apply_masks(params: Tree, masks: Masks) -> Tree:
    """Set every masked weight to exactly zero.

    Args:
        params: tree of arrays.
        masks: `Masks` of that tree, or of a part of it; leaves without a mask are left as they are.

    Returns:
        The same tree, same dtypes, +0.0 where masked (also where the weight was NaN or infinite).

    Raises:
        ValueError: masks of another tree, or of other shapes.
    """
    layers = layers_for(params, masks)

    def mask(name: str, weight: Any) -> Any:
        if weight is None or name not in layers:
            return weight
        return _masked(jnp.asarray(weight), layers[name])

    return map_named(mask, params)


@partial(jax.jit, inline=True)
def _masked(weight: jax.Array, layer: LayerMask | FullMask) -> jax.Array:
    """One program outside of jit, and inside of it nothing that shows."""
    return kept(weight, layer.combined())


@partial(jax.jit, inline=True)
def kept(weight: jax.Array, keep: jax.Array) -> jax.Array:
    """A weight, +0.0 where a bool of its shape is False."""
    return jnp.where(placed_like(keep, weight), weight, jnp.zeros((), weight.dtype))


def check_shape(name: str, weight: Any, mask: Any) -> None:
    """Raise a ValueError when a mask does not have its weight's shape."""
    shape = mask.shape if isinstance(mask, (LayerMask, FullMask)) else np.shape(mask)
    if tuple(jnp.shape(weight)) != tuple(shape):
        raise ValueError(f"masks: belongs to another tree, {name!r} has shape {jnp.shape(weight)}, its mask {shape}")
