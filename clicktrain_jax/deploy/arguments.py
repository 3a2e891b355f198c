"""A call's arguments taken apart: arrays, what stays as it is, and the names of parameters among the arrays."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from clicktrain_jax.trees import path_keys

_MIN_KERNEL_RANK = 3  # a one-dimensional convolution's


def is_module(value: Any) -> bool:
    """Whether it is a module of Flax NNX; where nnx was never imported there is none."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def check_function(function: Any, takes: Sequence[str] = ()) -> None:
    """Raise a ValueError for what is no function of its parameters: a model, a state, a tree with arrays inside; or for
    one that cannot be called with as many arguments as ``takes`` names."""
    kind = type(function).__name__
    linen = sys.modules.get("flax.linen")
    if is_module(function):
        advice = "lambda model, x: model(x), called with the model"
    elif linen is not None and isinstance(function, linen.Module):
        advice = "model.apply, or lambda variables, x: model.apply(variables, x, train=False)"
    elif not callable(function):
        advice = "its apply function, such as lambda variables, x: model.apply(variables, x)"
    elif any(_is_array(leaf) for leaf in jax.tree.leaves(function)):
        advice = "lambda model, x: model(x), called with the model"
    else:
        refused = takes and _refused(function, takes)
        # `jax.jit` tells the arguments of what its function wraps: then ask that function.
        if refused and _refused(getattr(function, "__wrapped__", function), takes):
            raise ValueError(
                f"apply_fn cannot be called with ({', '.join(takes)}): {refused}. Images are its one input: put others "
                "among the variables, or into further channels of the images"
            )
        return
    raise ValueError(
        f"apply_fn is a {kind}, a module or another object with parameters inside, which would not be seen; expected a "
        f"function that takes them: {advice}"
    )


def _refused(function: Callable[..., Any], takes: Sequence[str]) -> str:
    """Why a function cannot be called with such arguments; empty if it can, or where nothing tells."""
    try:
        inspect.signature(function, follow_wrapped=False).bind(*takes)
    except TypeError as error:
        return str(error)
    except ValueError:
        pass
    return ""


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
        paths: of the arrays: position or name of the argument, and the name there, "0/params/Conv_1/kernel".
    """

    treedef: Any
    static: tuple[tuple[int, Any], ...]
    module_positions: tuple[int, ...]
    graphdef: Any
    state_treedef: Any
    counts: tuple[int, int]
    paths: tuple[str, ...]

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
    arrays, paths, static, positions, modules = [], [], [], [], []
    for index, (path, leaf) in enumerate(leaves):
        if is_module(leaf):
            positions.append(index)
            modules.append(leaf)
        elif _is_array(leaf):
            arrays.append(leaf)
            paths.append("/".join(path_keys(path)[1:]))
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
        paths += [f"module {'/'.join(path_keys(path))}" for path, _ in found]
    frame = Frame(
        treedef, tuple(static), tuple(positions), graphdef, state_treedef, (len(leaves), in_state), tuple(paths)
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


def parameter_names(
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    masks: Mapping[str, Any],
    read: Callable[[Mapping[int, str]], set[str]],
    at: Sequence[str] | None = None,
) -> list[str]:
    """What the masks call each array of a call in a place of the masks; empty for what is no kernel. As `places_of`."""
    prefixes = places_of(paths, shapes, masks, read, at)
    names = []
    for path, shape in zip(paths, shapes):
        prefix = max((each for each in prefixes if path.startswith(each)), key=len, default=None)
        is_kernel = len(shape) >= _MIN_KERNEL_RANK
        names.append("" if prefix is None or not is_kernel else path.removeprefix(prefix))
    return names


def places_of(
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    masks: Mapping[str, Any],
    read: Callable[[Mapping[int, str]], set[str]],
    at: Sequence[str] | None = None,
) -> list[str]:
    """What stands before the masks' names, in each place that is the masks': "0/params/".

    The masks' names are looked for in all arguments, below any prefix ("0/params/" in linen's variables). Where a
    parameter is found in several places (averaged copies, a teacher), it is the one that a convolution reads.

    Args:
        paths: of the arrays, from the argument on: "0/params/Conv_1/kernel".
        shapes: of the arrays.
        masks: ``{name: bool array, or None where all is retained}``.
        read: which of some arrays a convolution reads, ``{index: path} -> paths``; asked where several fit.
        at: the places that the masks are of, "0/params"; None to find them.

    Raises:
        ValueError: convolutions read a parameter from several places; ``at`` names a place without parameters.
    """
    fits: dict[str, dict[str, int]] = {}
    for index, (path, shape) in enumerate(zip(paths, shapes)):
        keys = path.split("/")
        for start in range(len(keys)):
            name = "/".join(keys[start:])
            if name in masks and (masks[name] is None or np.shape(masks[name]) == tuple(shape)):
                fits.setdefault("".join(f"{key}/" for key in keys[:start]), {})[name] = index
    if at is None:
        return _decided(_likely(fits, masks), paths, masks, read)
    prefixes = ["".join(f"{key}/" for key in place.split("/") if key) for place in at]
    _check_places(prefixes, fits, masks)
    return prefixes


_Fits = dict[str, dict[str, int]]


def _likely(fits: _Fits, masks: Mapping[str, Any]) -> _Fits:
    """The places that may be the masks': those that hold all that has a mask, or each its share of it."""
    pruned = {name for name, mask in masks.items() if mask is not None}
    whole = {prefix: found for prefix, found in fits.items() if pruned <= found.keys()}
    if whole:
        # A block inside of a net may have layers of the same names: the net has more of them.
        def is_inside(prefix: str, other: str) -> bool:
            return prefix.startswith(other) and len(whole[prefix]) < len(whole[other])

        return {prefix: found for prefix, found in whole.items() if not any(is_inside(prefix, each) for each in whole)}
    # Parts in several arguments: what has the longer name is not taken for a shorter one.
    longest: dict[int, str] = {}
    for prefix in sorted(fits, key=len, reverse=True):
        longest.update(dict.fromkeys(fits[prefix].values(), prefix))
    shares = {
        prefix: {name: index for name, index in found.items() if longest[index] == prefix}
        for prefix, found in fits.items()
    }
    return {prefix: found for prefix, found in shares.items() if pruned & found.keys()}


def _decided(
    fits: _Fits, paths: Sequence[str], masks: Mapping[str, Any], read: Callable[[Mapping[int, str]], set[str]]
) -> list[str]:
    """The prefixes of the places that are the masks'."""
    pruned = [name for name, mask in masks.items() if mask is not None]
    places = {name: [prefix for prefix, found in fits.items() if name in found] for name in pruned}
    if all(len(each) < 2 for each in places.values()):
        return list(fits)
    used = read({found[name]: paths[found[name]] for found in fits.values() for name in pruned if name in found})
    several = {}
    for name, prefixes in places.items():
        places[name] = sorted(prefix for prefix in prefixes if prefix + name in used)
        if len(places[name]) > 1:
            several[name] = places[name]
    if several:
        name, prefixes = next(iter(several.items()))
        texts = [repr(prefix.rstrip("/")) for prefix in prefixes]
        more = f" (and {len(several) - 1} more)" if len(several) > 1 else ""
        raise ValueError(
            f"masks: convolutions read {name!r}{more} from several places, {', '.join(texts)}: name the one that the "
            f"masks are of, at={texts[0]}, or all that are pruned, at=({', '.join(texts)})"
        )
    return [prefix for prefix in fits if any(prefix in each for each in places.values())]


def _check_places(prefixes: Sequence[str], fits: _Fits, masks: Mapping[str, Any]) -> None:
    known = {prefix for prefix, found in fits.items() if any(masks[name] is not None for name in found)}
    for prefix in prefixes:
        if prefix not in known:
            places = ", ".join(repr(place.rstrip("/")) for place in sorted(known))
            raise ValueError(
                f"at={prefix.rstrip('/')!r}: no parameter of the masks is found there; found at {places or 'no place'}"
            )
