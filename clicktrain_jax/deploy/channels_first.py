"""A net's maps brought from (batch, height, width, channels) into (batch, channels, height, width).

ONNX knows convolutions and pooling in that order alone, and PyTorch knows theirs so: a converter that goes through a
net of the other order step by step transposes before and after each of them. Here the order is carried along instead:
a map is transposed where the first convolution takes it and where a step cannot do without its own order, in a net of
convolutions that is at its beginning and its end.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from clicktrain_jax.deploy.tracing import flattened
from clicktrain_jax.jaxprs import CONVOLUTION, bind, walk

# Each entry of the result comes from the same entry of the operands, which are alike in shape, or single numbers.
_ENTRYWISE = frozenset(
    "abs add and ceil clamp convert_element_type copy cos div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n sign sin "
    "sqrt square stop_gradient sub tanh xor".split()
)
_POOLING = frozenset(("reduce_window_max", "reduce_window_min", "reduce_window_sum"))
_REDUCING = frozenset(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"))
# Parameters that have one setting for each axis.
_PER_AXIS = {
    **dict.fromkeys(_POOLING, ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")),
    "pad": ("padding_config",),
    "slice": ("start_indices", "limit_indices", "strides"),
}


def channels_first(function: Callable[[Mapping[str, Any], Any], Any], arrays: Mapping[str, Any]) -> Callable:
    """The same net with its maps in the other order.

    Args:
        function: ``(arrays, images) -> logits``, pure and traceable; `Folded.function` for one.
        arrays: its arrays, not traced: what they alone decide, transposed kernels too, is computed while tracing.

    Returns:
        ``images -> logits``, images in the order that ``function`` takes them in; to be traced.
    """

    def call(images: Any) -> Any:
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        closed, _ = flattened(lambda images: function(arrays, images), shape)
        return _run(closed, images)

    return call


class _Map(NamedTuple):
    """An array whose axis i is axis ``order[i]`` of the value that it stands for."""

    array: Any
    order: tuple[int, ...]


def _run(closed: Any, images: Any) -> Any:
    def step(equation: Any, operands: list[Any]) -> list[Any]:
        if any(isinstance(value, (_Map, jax.core.Tracer)) for value in operands):
            return _step(equation, operands)
        # No image has reached it.
        with jax.ensure_compile_time_eval():
            return bind(equation, operands)

    return _plain(walk(closed, [images], step)[0])


def _step(equation: Any, operands: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, dict(equation.params)
    if name == CONVOLUTION and len(equation.outvars[0].aval.shape) == 4:
        return [_convolution(equation, *operands)]
    first = next((value for value in operands if isinstance(value, _Map)), None)
    if first is None:
        return bind(equation, operands)
    order = first.order
    if name in _ENTRYWISE and all(np.ndim(_raw(value)) in (0, len(order)) for value in operands):
        arrays = [_in_order(value, order) if np.ndim(_raw(value)) else value for value in operands]
        return [_Map(result, order) for result in bind(equation, arrays)]
    if name in _PER_AXIS and operands[0] is first:
        for key in _PER_AXIS[name]:
            if params[key] is not None:
                params[key] = tuple(params[key][axis] for axis in order)
        (result,) = bind(equation, [first.array, *operands[1:]], **params)
        return [_Map(result, order)]
    if name == "concatenate":
        arrays = [_in_order(value, order) for value in operands]
        params["dimension"] = order.index(params["dimension"])
        return [_Map(equation.primitive.bind(*arrays, **params), order)]
    if name in _REDUCING:
        left = [axis for axis in order if axis not in params["axes"]]
        params["axes"] = tuple(sorted(order.index(axis) for axis in params["axes"]))
        places = tuple(sorted(left).index(axis) for axis in left)
        return [_plain(_Map(equation.primitive.bind(first.array, **params), places))]
    return bind(equation, [_plain(value) for value in operands])


def _convolution(equation: Any, images: Any, kernel: Any) -> Any:
    params = dict(equation.params)
    numbers = params["dimension_numbers"]
    here = tuple(range(4))
    params["dimension_numbers"] = lax.ConvDimensionNumbers(here, here, here)
    images, kernel = _in_order(images, tuple(numbers.lhs_spec)), _in_order(kernel, tuple(numbers.rhs_spec))
    return _Map(equation.primitive.bind(images, kernel, **params), tuple(numbers.out_spec))


def _raw(value: Any) -> Any:
    return value.array if isinstance(value, _Map) else value


def _plain(value: Any) -> Any:
    return _in_order(value, tuple(range(len(value.order)))) if isinstance(value, _Map) else value


def _in_order(value: Any, order: tuple[int, ...]) -> Any:
    """The array of a value with its axes in this order."""
    value = value if isinstance(value, _Map) else _Map(value, tuple(range(np.ndim(value))))
    moves = tuple(value.order.index(axis) for axis in order)
    if moves == tuple(range(len(moves))):
        return value.array
    if isinstance(value.array, jax.core.Tracer):
        return jnp.transpose(value.array, moves)
    with jax.ensure_compile_time_eval():
        return jnp.transpose(value.array, moves)
