"""A call's arguments taken apart: arrays, what stays as it is, and the names of parameters among the arrays."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from clicktrain_jax.trees import path_keys

_MIN_KERNEL_RANK = 3  # a one-dimensional convolution's


def is_module(value: Any) -> bool:
    """Whether it is a module of Flax NNX; where nnx was never imported there is none."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A call without its arrays. Hashable where the static arguments are.

    Attributes:
        treedef: of ``(args, kwargs)``.
        static: ``((position among the leaves, value), ...)`` of what is no array: flags, names, functions.
        module_positions: positions of NNX modules among the leaves.
        graphdef: of the modules together; None for none.
        state_treedef: of their state.
        counts: how many leaves stand outside of modules, and how many arrays in their state.
        owners: for each array the argument that it stands in, and its name there.
    """

    treedef: Any
    static: tuple[tuple[int, Any], ...]
    module_positions: tuple[int, ...]
    graphdef: Any
    state_treedef: Any
    counts: tuple[int, int]
    owners: tuple[tuple[str, str], ...]

    def join(self, arrays: Sequence[Any]) -> tuple[tuple, dict[str, Any], list[Any]]:
        """``(args, kwargs, modules)`` with other arrays in the places of those taken out; modules are new ones."""
        total, in_state = self.counts
        static, own = dict(self.static), iter(arrays[: len(arrays) - in_state])
        modules = []
        if self.graphdef is not None:
            from flax import nnx

            state = jax.tree.unflatten(self.state_treedef, arrays[len(arrays) - in_state :])
            modules = list(nnx.merge(self.graphdef, state))
        placed = dict(zip(self.module_positions, modules))
        leaves = [
            static[index] if index in static else placed[index] if index in placed else next(own)
            for index in range(total)
        ]
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        return args, kwargs, modules


def take_apart(args: tuple, kwargs: dict[str, Any]) -> tuple[Frame, list[Any], list[Any]]:
    """``(frame, arrays, modules)`` of a call: arrays in a fixed order, those in the state of NNX modules last."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_module)
    arrays, owners, static, positions, modules = [], [], [], [], []
    for index, (path, leaf) in enumerate(leaves):
        if is_module(leaf):
            positions.append(index)
            modules.append(leaf)
        elif _is_array(leaf):
            arrays.append(leaf)
            keys = path_keys(path)
            owners.append((keys[1], "/".join(keys[2:])))
        else:
            static.append((index, leaf))
    graphdef = state_treedef = None
    in_state = 0
    if modules:
        from flax import nnx

        graphdef, state = nnx.split(modules)
        found, state_treedef = jax.tree_util.tree_flatten_with_path(state)
        in_state = len(found)
        arrays += [leaf for _, leaf in found]
        # Modules are split together, so that what they share stays shared: the first key counts them.
        owners += [(f"module {keys[0]}", "/".join(keys[1:])) for keys in (path_keys(path) for path, _ in found)]
    frame = Frame(
        treedef,
        tuple(static),
        tuple(positions),
        graphdef,
        state_treedef,
        (len(leaves), in_state),
        tuple(owners),
    )
    return frame, arrays, modules


def state_of(modules: Sequence[Any]) -> dict[tuple[str, ...], Any]:
    """``{path: array}`` of the modules' state, as `take_apart` found it."""
    if not modules:
        return {}
    from flax import nnx

    state = nnx.split(list(modules))[1]
    return {path_keys(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def write_back(modules: Sequence[Any], changed: Mapping[tuple[str, ...], Any]) -> None:
    """Give the modules' variables new values, as the function that ran on copies of the modules did."""
    if not changed:
        return
    from flax import nnx

    state = nnx.split(list(modules))[1]
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    known = {path_keys(path) for path, _ in leaves}
    new = [".".join(path) for path in changed if path not in known]
    if new:
        raise ValueError(
            f"the function added the variable {new[0]!r} to an nnx.Module: an accelerated function changes the values "
            "of variables only. Create them before, or split the module and return its state"
        )
    for index, module in enumerate(modules):
        own = nnx.state(module)
        paths, own_treedef = jax.tree_util.tree_flatten_with_path(own)
        if any((str(index), *path_keys(path)) in changed for path, _ in paths):
            values = [changed.get((str(index), *path_keys(path)), leaf) for path, leaf in paths]
            nnx.update(module, jax.tree.unflatten(own_treedef, values))


def parameter_names(frame: Frame, shapes: Sequence[tuple[int, ...]], masks: Mapping[str, Any]) -> list[str]:
    """What the masks call each array of a call; empty for what is no kernel.

    The masks' names are looked for in every argument, below any prefix ("params/" in linen's variables); the prefix
    under which most of them are found is taken, the shortest of several, in every argument that has it.

    Args:
        frame: of the call.
        shapes: of the arrays.
        masks: ``{name: bool array, or None where all is retained}``.

    Returns:
        For each array of rank 3 or more below the prefix its name there.
    """
    known = {name: None if mask is None else np.shape(mask) for name, mask in masks.items()}
    found: dict[tuple[str, str], int] = {}
    for (owner, name), shape in zip(frame.owners, shapes):
        keys = name.split("/")
        for start in range(len(keys)):
            below = "/".join(keys[start:])
            if below in known and known[below] in (None, tuple(shape)):
                prefix = "".join(f"{key}/" for key in keys[:start])
                found[owner, prefix] = found.get((owner, prefix), 0) + 1
    best = max(found.values(), default=0)
    candidates = [key for key, count in found.items() if count == best]
    depth = min((prefix.count("/") for _, prefix in candidates), default=0)
    prefixes = dict(key for key in candidates if key[1].count("/") == depth)
    names = []
    for (owner, name), shape in zip(frame.owners, shapes):
        prefix = prefixes.get(owner)
        known_tree = prefix is not None and name.startswith(prefix) and len(shape) >= _MIN_KERNEL_RANK
        names.append(name.removeprefix(prefix) if known_tree else "")
    return names
