"""Paths and leaves of parameter trees, whatever container holds them.

Linen parameters, ``nnx.State`` and plain dictionaries are all trees of arrays to jax. The rest of the
package speaks of a leaf by its *name*: the "/"-joined keys on the way to it, ``"Conv_1/kernel"``.

A tree may hold ``None`` where nothing applies (a mask tree does). Every function here counts ``None``
as a leaf, so that a mask tree and its parameter tree flatten to lists of the same length. Where an outer transformation
(`optax.masked`, `optax.multi_transform`) has put an ``optax.MaskedNode``, there is no leaf at all.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

Tree = Any
KERNEL_AXES = ("kh", "kw", "cin", "cout")


def is_none(leaf: Any) -> bool:
    """For ``is_leaf=``: makes jax count None as a leaf."""
    return leaf is None


def key_name(key: Any) -> str:
    """The text of one key of a jax key path; a key that is a tuple, of a flattened dictionary, is a path itself."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            text = getattr(key, attribute)
            return "/".join(map(str, text)) if isinstance(text, tuple) else str(text)
    return str(key)


def path_keys(key_path: tuple) -> tuple[str, ...]:
    """Key texts of a jax key path, without the "value" key that an nnx variable adds at the end."""
    keys = tuple(key_name(key) for key in key_path)
    if key_path and isinstance(key_path[-1], jax.tree_util.GetAttrKey) and keys[-1] == "value":
        keys = keys[:-1]
    return keys


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """``[(name, leaf)]`` in jax's flattening order; ``None`` counts as a leaf.

    Raises:
        ValueError: two leaves have one name (``{"a": {"b": x}, "a/b": y}``).
    """
    with_paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]
    leaves = [("/".join(path_keys(path)), leaf) for path, leaf in with_paths]
    counts = collections.Counter(name for name, _ in leaves)
    if len(counts) < len(leaves):
        raise ValueError(f"two leaves are both called {counts.most_common(1)[0][0]!r}: names must tell leaves apart")
    return leaves


def map_named(function: Callable[..., Any], tree: Tree, *rest: Tree, what: str = "tree") -> Tree:
    """Map ``function(name, leaf, *leaves_of_rest)`` over ``tree``, keeping its containers.

    Args:
        function: called once a leaf, ``None`` leaves included.
        tree: decides the structure of the result.
        *rest: trees with the same leaf names.
        what: how an error calls the trees of ``rest``.

    Raises:
        ValueError: the leaf names of a tree in ``rest`` differ; the first difference is named.
    """
    leaves = named_leaves(tree)
    structure = jax.tree.structure(tree, is_leaf=is_none)
    others = []
    for other in rest:
        other_leaves = named_leaves(other)
        check_same_names([name for name, _ in leaves], [name for name, _ in other_leaves], what)
        others.append(dict(other_leaves))
    return structure.unflatten([function(name, leaf, *(other[name] for other in others)) for name, leaf in leaves])


def nest(leaves: Mapping[str, Any]) -> Tree:
    """Nested dictionaries of leaves by name; a leaf named "" is the whole tree."""
    if set(leaves) == {""}:
        return leaves[""]
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *outer, last = name.split("/")
        node = nested
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested


def check_same_names(expected: list[str], got: list[str], what: str) -> None:
    """Raise a ValueError that names the first leaf in which two trees differ. Order does not count."""
    missing = sorted(set(expected) - set(got))
    extra = sorted(set(got) - set(expected))
    if not missing and not extra:
        return
    detail = f"missing {missing[0]!r}" if missing else f"unexpected {extra[0]!r}"
    raise ValueError(
        f"{what}: belongs to another tree, {len(got)} leaves against {len(expected)} expected ({detail}). "
        "Use the parameter tree that the plan and the masks were made for."
    )


def replicated(array: Any) -> Any:
    """An array whole on every device, where its type says that it is not: on a mesh of explicit axes.

    What sorts, tiles and reshapes has no sharding of its own there. On other meshes the compiler finds one.
    """
    array = jnp.asarray(array)
    sharding = jax.typeof(array).sharding
    if all(axis is None for axis in sharding.spec):
        return array
    return jax.sharding.reshard(array, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()))


def placed_like(array: Any, other: Any) -> Any:
    """An array, sharded as another one of its shape is on a mesh of explicit axes, where the two must agree."""
    sharding = jax.typeof(other).sharding
    if all(axis is None for axis in sharding.spec):
        return replicated(array)
    if not isinstance(array, jax.core.Tracer) and not isinstance(other, jax.core.Tracer):
        return jax.device_put(array, other.sharding)  # which may come from the host, or from another device
    return jax.sharding.reshard(jnp.asarray(array), sharding)


def spread_like(tree: Tree, like: Tree) -> Tree:
    """The arrays of a tree, whole on every device of the mesh that those of another lie on.

    A state that is made elsewhere, or placed as the compiler likes, would compile an update again.
    """
    for leaf in jax.tree.leaves(like):
        traced = isinstance(leaf, jax.core.Tracer)
        sharding = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None)
        if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.empty:
            continue
        whole, kinds = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()), sharding.mesh.axis_types
        if AxisType.Manual in kinds:
            break
        constrain = jax.sharding.reshard if AxisType.Explicit in kinds else jax.lax.with_sharding_constraint
        return (constrain if traced else jax.device_put)(tree, whole)
    return tree


def check_names_of(tree: Tree, expected: list[str], what: str) -> None:
    """`check_same_names` of a tree, in which parts may stand as ``optax.MaskedNode``."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    with_paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)[0]
    hidden = tuple("/".join((*path_keys(path), "")) for path, leaf in with_paths if is_masked(leaf))
    names = [name for name, _ in named_leaves(tree)]
    check_same_names([name for name in expected if not f"{name}/".startswith(hidden)], names, what)


def is_key(leaf: Any) -> bool:
    """True for an array of typed random keys (`jax.random.key`), which are no numbers: NumPy does not have them."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_kernel_shape(shape: tuple[int, ...]) -> TypeGuard[tuple[int, int, int, int]]:
    """True for a two-dimensional convolution's kernel, axes (kh, kw, cin, cout)."""
    return len(shape) == len(KERNEL_AXES)


def has_non_finite(array: Any) -> bool:
    """True when a concrete array holds NaN or infinite values; a traced one cannot be looked at and gives False."""
    if array is None or isinstance(array, jax.core.Tracer):
        return False
    return not bool(np.isfinite(np.asarray(array, dtype=np.float32)).all())


def has_negative(array: Any) -> bool:
    """True when a concrete array holds values below zero; a traced one cannot be looked at and gives False."""
    if array is None or isinstance(array, jax.core.Tracer):
        return False
    return bool((np.asarray(array, dtype=np.float32) < 0).any())
