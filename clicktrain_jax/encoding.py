"""Masks as they are kept in an optimizer state: a byte and a bit a kernel, in plain arrays.

Nothing but arrays in dicts and NamedTuples, so that any checkpoint format carries them, and the shape of
the masks can be read from the arrays alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clicktrain_jax.layer_plan import LayerPlan
from clicktrain_jax.masks import LayerChoice, Masks, expand
from clicktrain_jax.plan import Plan
from clicktrain_jax.trees import Tree, is_none, map_named, path_keys, replicated


class EncodedLayer(NamedTuple):
    """One layer's masks.

    Attributes:
        pattern_ids: uint8 (cin, cout), the pattern of each kernel; None for 1x1 layers.
        kernel_bits: where each kernel stays: uint8 (cin / 8, cout), eight input channels to a byte; bool
            (cin, cout) when cin is no multiple of 8 (the dtype tells which).
        patterns: bool (P, kh, kw), the set the ids index; None for 1x1 layers. Before the selection every
            pattern keeps all taps.
    """

    pattern_ids: jax.Array | None
    kernel_bits: jax.Array
    patterns: jax.Array | None


def keep_all(layer: LayerPlan, num_patterns: int) -> EncodedLayer:
    """The encoding that keeps every weight, with the shapes that a selection will fill."""
    kh, kw, cin, cout = layer.shape
    ids, patterns = None, None
    if layer.has_patterns:
        ids, patterns = jnp.zeros((cin, cout), jnp.uint8), jnp.ones((num_patterns, kh, kw), bool)
    kernel = jnp.ones((cin, cout) if layer.axes == "HWIO" else (cout, cin, 1, 1), bool)
    return encode(LayerChoice(ids, kernel, patterns))


def encode(choice: LayerChoice) -> EncodedLayer:
    """A layer's choice in its compact form; `decode` is the inverse."""
    bits = choice.kernel
    if bits.shape[0] % 8 == 0:
        bits = jnp.packbits(bits, axis=0)
    if choice.pattern_ids is None:
        return EncodedLayer(None, bits, None)
    return EncodedLayer(choice.pattern_ids, bits, jnp.asarray(choice.patterns, bool))


def decode(encoded: EncodedLayer) -> tuple[jax.Array | None, jax.Array]:
    """Full boolean masks ``(pattern or None, kernel)`` of shape (kh, kw, cin, cout)."""
    bits = replicated(encoded.kernel_bits)
    kernel = bits.astype(bool) if bits.dtype == bool else jnp.unpackbits(bits, axis=0).astype(bool)
    if encoded.patterns is None:
        return expand(LayerChoice(None, kernel, None))
    return expand(LayerChoice(jnp.asarray(encoded.pattern_ids), kernel, jnp.asarray(encoded.patterns)))


def empty_masks(params: Tree, plan: Plan, num_patterns: int) -> Tree:
    """A tree like ``params`` with an all-keeping `EncodedLayer` at each planned leaf and None elsewhere.

    ``nnx.State`` wraps its leaves in variables, which hold arrays only; for it the containers become plain
    nested dictionaries of the same names.
    """
    layers = plan.by_name()

    def fill(name: str, _: Any) -> EncodedLayer | None:
        return keep_all(layers[name], num_patterns) if name in layers else None

    with_paths = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]
    if all(len(path) == len(path_keys(path)) for path, _ in with_paths):
        return map_named(fill, params)
    nested: dict[str, Any] = {}
    for path, _ in with_paths:
        *outer, last = path_keys(path)
        node = nested
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = fill("/".join((*outer, last)), None)
    return nested


def is_encoded(node: Any) -> bool:
    """True for an `EncodedLayer`, or the dictionary that a checkpoint read without a template makes of it."""
    return isinstance(node, EncodedLayer) or (isinstance(node, dict) and set(node) == set(EncodedLayer._fields))


def _is_leaf(node: Any) -> bool:
    return node is None or is_encoded(node)


def fill_masks(template: Tree, layers: dict[str, EncodedLayer]) -> Tree:
    """The containers of ``template`` (a tree of encoded layers), with new layers by name."""
    with_paths, structure = jax.tree_util.tree_flatten_with_path(template, is_leaf=_is_leaf)
    return structure.unflatten([layers.get("/".join(path_keys(path))) for path, _ in with_paths])


def decode_masks(encoded: Tree) -> Masks:
    """The boolean trees of a tree of encoded layers, with its containers."""
    leaves, structure = jax.tree.flatten(encoded, is_leaf=_is_leaf)
    pairs = [(None, None) if leaf is None else decode(_plain(leaf)) for leaf in leaves]
    return Masks(
        pattern=structure.unflatten([pattern for pattern, _ in pairs]),
        kernel=structure.unflatten([kernel for _, kernel in pairs]),
    )


def _plain(node: Any) -> EncodedLayer:
    """An `EncodedLayer` of arrays, whatever wraps them (an nnx optimizer wraps arrays in variables)."""
    fields = node if isinstance(node, dict) else node._asdict()
    arrays = {name: jax.tree.leaves(value) for name, value in fields.items()}
    return EncodedLayer(**{name: values[0] if values else None for name, values in arrays.items()})
