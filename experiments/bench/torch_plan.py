"""A net as plain data that PyTorch can be made to follow: a few kinds of steps, and arrays by name.

It is read off the net's jaxpr with its maps as (batch, channels, height, width), so that PyTorch computes what the
other engines compute; `experiments.bench.torch_net` follows it in a process that needs no jax.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy.channels_first import channels_first
from clicktrain_jax.deploy.fold import Folded
from clicktrain_jax.deploy.jaxprs import CONVOLUTION, flattened, is_literal

# By the name that both have for them.
_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "max": "maximum", "min": "minimum", "pow": "pow"}
_UNARY = {
    **{name: name for name in ("abs", "erf", "exp", "log", "neg", "rsqrt", "sign", "sqrt", "square", "tanh")},
    "logistic": "sigmoid",
    "copy": "clone",
    "stop_gradient": "clone",
}
_REDUCTIONS = {"reduce_sum": "sum", "reduce_max": "amax", "reduce_min": "amin"}


class Plan(NamedTuple):
    """What `experiments.bench.torch_net.Net` takes.

    Attributes:
        steps: plain data, in order; the last one gives the logits. An input is the number of the step that computes it
            (0: the images), the name of an array, or ``{"number": value}``.
        arrays: by name.
    """

    steps: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]


def make_plan(folded: Folded) -> Plan:
    """The plan of a folded net for any number of images, float32 (batch, height, width, channels).

    Raises:
        ValueError: the net has a step that is not written for PyTorch here.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *folded.image_shape), jnp.float32)
    closed, _ = flattened(channels_first(folded.function, folded.arrays), images)
    return _Reader(closed).plan()


class _Reader:
    def __init__(self, closed: Any) -> None:
        self.jaxpr = closed.jaxpr
        self.steps: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.places: dict[Any, Any] = dict(zip(closed.jaxpr.invars, [0]))
        self.constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        atoms = [atom for equation in self.jaxpr.eqns for atom in equation.invars] + list(self.jaxpr.outvars)
        self.uses = Counter(atom for atom in atoms if not is_literal(atom))

    def plan(self) -> Plan:
        for equation in self.jaxpr.eqns:
            if not self._takes_bias(equation):
                name = equation.primitive.name
                inputs = [self.place(atom) for atom in equation.invars]
                self._add(equation, self._written(name)(name, equation, inputs), inputs)
        (result,) = self.jaxpr.outvars
        if is_literal(result) or self.places.get(result) != len(self.steps):
            raise ValueError("the net's result is not computed from its images last: no plan for PyTorch")
        return Plan(self.steps, self.arrays)

    def place(self, atom: Any) -> Any:
        """Where an operand comes from."""
        value = atom.val if is_literal(atom) else self.constants.get(atom)
        if value is None:
            return self.places[atom]
        if np.ndim(value) == 0:
            return {"number": np.asarray(value).item()}
        if atom not in self.places:
            self.places[atom] = f"array {len(self.arrays)}"
            self.arrays[self.places[atom]] = _host(value)
        return self.places[atom]

    def _add(self, equation: Any, settings: Mapping[str, Any], inputs: list[Any]) -> None:
        self.steps.append({"inputs": inputs, **settings})
        self.places[equation.outvars[0]] = len(self.steps)

    def _takes_bias(self, equation: Any) -> bool:
        """Put a sum with one number a filter into the convolution, or the matrix product, that it follows."""
        if equation.primitive.name != "add" or any(is_literal(atom) for atom in equation.invars):
            return False
        for before, bias in (equation.invars, equation.invars[::-1]):
            value, place = self.constants.get(bias), self.places.get(before)
            if value is None or not isinstance(place, int) or not place or self.uses[before] != 1:
                continue
            step = self.steps[place - 1]
            axis = {"conv": 1, "matmul": -1}.get(step["op"])
            if axis is None or np.size(value) != before.aval.shape[axis] or np.shape(value)[axis] != np.size(value):
                continue
            if len(step["inputs"]) > 2:
                continue
            name = f"array {len(self.arrays)}"
            self.arrays[name] = _host(value).reshape(-1)
            step["inputs"].append(name)
            self.places[equation.outvars[0]] = place
            return True
        return False

    def _written(self, name: str) -> Callable[[str, Any, list[Any]], dict[str, Any]]:
        if name in _BINARY or name in _UNARY:
            return self._entrywise
        try:
            return _WRITTEN[name]
        except KeyError:
            raise ValueError(f"{name!r} is not written for PyTorch in {__name__}") from None

    @staticmethod
    def _entrywise(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
        if name == "max" and inputs[1] == {"number": 0.0}:
            del inputs[1]
            return {"op": "relu"}
        return {"op": _BINARY.get(name) or _UNARY[name]}


def _convolution(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
    params = equation.params
    if any(step != 1 for step in params["lhs_dilation"]) or params["batch_group_count"] != 1:
        raise ValueError("a transposed convolution, or one with groups of images, is not written for PyTorch here")
    if tuple(params["dimension_numbers"].lhs_spec) != (0, 1, 2, 3):
        raise ValueError(f"a convolution of {len(params['dimension_numbers'].lhs_spec) - 2} dimensions, not of 2")
    return {
        "op": "conv",
        "strides": _ints(params["window_strides"]),
        "padding": [_ints(pair) for pair in params["padding"]],
        "dilation": _ints(params["rhs_dilation"]),
        "groups": int(params["feature_group_count"]),
    }


def _pool(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
    params = equation.params
    window, strides, padding = (params[key] for key in ("window_dimensions", "window_strides", "padding"))
    others = (*params["base_dilation"], *params["window_dilation"], *window[:2], *strides[:2])
    if len(window) != 4 or any(size != 1 for size in others) or any(any(pair) for pair in padding[:2]):
        raise ValueError(f"{name} over {window}, dilated or not over the image, is not written for PyTorch here")
    settings = {"window": _ints(window[2:]), "strides": _ints(strides[2:])}
    op = "max_pool" if name == "reduce_window_max" else "sum_pool"
    return {"op": op, **settings, "padding": [_ints(pair) for pair in padding[2:]]}


def _product(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
    contracted, batched = equation.params["dimension_numbers"]
    plain = tuple(map(tuple, contracted)) == ((1,), (0,)) and not any(batched) and equation.outvars[0].aval.ndim == 2
    if not plain or not isinstance(inputs[1], str):
        raise ValueError("a product other than (batch, n) times a fixed (n, m) is not written for PyTorch here")
    return {"op": "matmul"}


def _reshape(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
    return {"op": "reshape", "shape": _shape(equation.outvars[0].aval.shape)}


def _broadcast(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
    aval = equation.invars[0].aval
    axes = equation.params["broadcast_dimensions"]
    shape = _shape(equation.outvars[0].aval.shape)
    sizes = dict(zip(axes, _shape(aval.shape)))
    return {"op": "broadcast", "through": [sizes.get(axis, 1) for axis in range(len(shape))], "shape": shape}


def _pad(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
    config = [_ints(entry) for entry in equation.params["padding_config"]]
    value = inputs.pop()
    if not isinstance(value, dict) or any(between for _, _, between in config):
        raise ValueError("padding between the pixels, or by what is computed, is not written for PyTorch here")
    return {"op": "pad", "widths": [entry[:2] for entry in config], "value": value["number"]}


def _slice(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
    params, shape = equation.params, equation.invars[0].aval.shape
    strides = params["strides"] or (1,) * len(shape)
    # All of an axis is told by no end: the batch has none.
    ends = [None if end == size else int(end) for end, size in zip(params["limit_indices"], shape)]
    return {"op": "slice", "begins": _ints(params["start_indices"]), "ends": ends, "strides": _ints(strides)}


def _settings_of(*names: str) -> Callable[[str, Any, list[Any]], dict[str, Any]]:
    def written(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
        found = {key: equation.params[key] for key in names}
        op = _REDUCTIONS.get(name, name)
        return {"op": op, **{key: _ints(value) if np.ndim(value) else int(value) for key, value in found.items()}}

    return written


def _cast(name: str, equation: Any, inputs: list[Any]) -> dict[str, Any]:
    return {"op": "cast", "dtype": str(np.dtype(equation.params["new_dtype"]))}


def _shape(shape: Any) -> list[int]:
    """Sizes, -1 for the batch's, which is not known."""
    sizes = [int(size) if isinstance(size, int | np.integer) else -1 for size in shape]
    if sizes.count(-1) > 1:
        raise ValueError(f"a shape {tuple(shape)} that has the batch twice is not written for PyTorch here")
    return sizes


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _host(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"arrays of {array.dtype} cannot be handed to PyTorch by NumPy")
    return array


_WRITTEN: dict[str, Callable[[str, Any, list[Any]], dict[str, Any]]] = {
    CONVOLUTION: _convolution,
    "broadcast_in_dim": _broadcast,
    "concatenate": _settings_of("dimension"),
    "convert_element_type": _cast,
    "dot_general": _product,
    "integer_pow": _settings_of("y"),
    "pad": _pad,
    "reduce_max": _settings_of("axes"),
    "reduce_min": _settings_of("axes"),
    "reduce_sum": _settings_of("axes"),
    "reduce_window_max": _pool,
    "reduce_window_sum": _pool,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _reshape,
    "transpose": _settings_of("permutation"),
}
