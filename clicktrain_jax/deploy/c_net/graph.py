"""From the equations of a folded net to maps of one image.

Every value is a node of the graph and the place of each of its entries in that node's map. Reshapes, transposes, slices
and padding move places alone, so that most of them cost nothing: where a step needs a map in its own order and the
places say otherwise, one copy is made.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clicktrain_jax.deploy.c_net import nodes
from clicktrain_jax.deploy.c_net.nodes import Graph, Node, Op
from clicktrain_jax.deploy.inference import InferenceNet
from clicktrain_jax.deploy.steps import ConvStep
from clicktrain_jax.jaxprs import as_numpy, bind, unknown_parameters

_POOLS = {"reduce_window_max": "max", "reduce_window_min": "min", "reduce_window_sum": "sum"}
_REDUCING = {"reduce_max": "max", "reduce_min": "min", "reduce_sum": "sum"}
_MOVING = frozenset(("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "rev"))
_NOTHING = frozenset(("copy", "copy_p", "stop_gradient"))


class _Value(NamedTuple):
    """Entries of a node's map: ``where`` has the shape that jax gives the value."""

    node: Node
    where: np.ndarray


def read(net: InferenceNet) -> Graph:
    """The graph of a net.

    Args:
        net: of the export.

    Returns:
        A `Graph`, not yet fused.

    Raises:
        ValueError: a step that has no form in C; it is named.
    """
    return _Reader(net).run()


def refuse(what: str, advice: str) -> ValueError:
    """The error for what cannot be written as C."""
    return ValueError(f"net.c: {what}; {advice}")


class _Reader:
    def __init__(self, net: InferenceNet) -> None:
        self._arrays = {name: as_numpy(array) for name, array in net.folded.arrays.items()}
        self._steps = net.folded.steps(1)
        self._masks = {site.step.name: site.layer.mask for site in net.convolutions(1) if site.layer is not None}
        image = nodes.Input(net.folded.image_shape, [])
        if net.image_dtype == np.uint8:
            pixels = np.arange(256, dtype=np.float32) / np.float32(255)
            image.table = np.repeat(pixels[:, None], image.shape[2], axis=1)
        self._nodes: list[Node] = [image]

    def run(self) -> Graph:
        image = _places(self._nodes[0])
        output = self._steps.run(self._arrays, image, self._convolution, self._step)
        if not isinstance(output, _Value):
            raise refuse("the logits do not depend on the image", "there is nothing to run")
        return Graph(self._nodes, output.node, output.where.reshape(-1))

    def _add(self, node: Node) -> Node:
        self._nodes.append(node)
        return node

    def _step(self, equation: Any, operands: list[Any]) -> list[Any]:
        name = equation.primitive.name
        operands = [value if isinstance(value, _Value) else as_numpy(value) for value in operands]
        if not any(isinstance(value, _Value) for value in operands):
            return [*map(as_numpy, bind(equation, operands))]
        if name in _NOTHING:
            return [operands[0]]
        if name == "convert_element_type":
            kinds = (equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype)
            if all(np.dtype(kind).name.startswith(("float", "bfloat")) for kind in kinds):
                return [operands[0]]  # all is computed in float32
        elif name in _MOVING and isinstance(operands[0], _Value):
            (where,) = bind(equation, [operands[0].where])
            return [_Value(operands[0].node, np.asarray(where))]
        elif name in _RULES or name in nodes.UNARY or name in nodes.BINARY:
            rule = _RULES.get(name, _entrywise)
            result = rule(self, equation, operands)
            if result is not None:
                return [result]
        shapes = " and ".join(str(tuple(atom.aval.shape)) for atom in equation.invars)
        raise refuse(
            f"the step {name!r} of operands {shapes} has no form in C",
            "leave c=True out, or write the net without it (convolutions, BatchNorm, ReLU and other steps on single "
            "entries, pooling, dense layers, sums of maps, means over the image)",
        )

    def map_of(self, value: _Value, axes: Sequence[int]) -> Node:
        """A value as a map whose (height, width, channels) are these of its axes; all others are of size 1."""
        where = _lifted(value.where)
        others = [axis for axis in range(where.ndim) if axis not in axes]
        where = where.transpose(*others, *axes)
        height, width, channels = where.shape[-3:]
        where = where.reshape(height, width, channels)
        if where.shape == value.node.shape and np.array_equal(where.ravel(), np.arange(where.size)):
            return value.node
        return self._add(nodes.Gather((height, width, channels), [value.node], where=where))

    def whole(self, value: _Value) -> _Value:
        """The same value, each entry of which stands somewhere."""
        if (value.where >= 0).all():
            return value
        axes = _axes(value.where, ())
        if axes is None:
            raise refuse(f"zeros around a value of shape {value.where.shape} have no form in C", "leave c=True out")
        return _placed(self.map_of(value, axes), value.where.shape, axes)

    def _convolution(self, step: ConvStep, value: Any, kernel: np.ndarray, bias: np.ndarray | None) -> _Value:
        params = step.equation.params
        numbers = params["dimension_numbers"]
        if len(numbers.lhs_spec) != 4:
            raise refuse(f"the convolution {step.name!r} is over {len(numbers.lhs_spec) - 2} axes", "it must be over 2")
        for key, none in (("lhs_dilation", (1, 1)), ("rhs_dilation", (1, 1))):
            if tuple(params[key]) != none:
                raise refuse(f"the convolution {step.name!r} is dilated ({key}={tuple(params[key])})", _PLAIN)
        if unknown := unknown_parameters(params):
            raise refuse(f"the convolution {step.name!r} has {unknown}, which is not known here", _PLAIN)
        # All is computed in float32, which is the highest precision of float32 numbers and more than others have.
        kinds = {np.dtype(atom.aval.dtype).name for atom in (*step.equation.invars, *step.equation.outvars)}
        if not kinds <= {"float32", "bfloat16", "float16"}:
            raise refuse(f"the convolution {step.name!r} is of {', '.join(sorted(kinds))}", "cast it to float32")
        groups = max(params["feature_group_count"], params["batch_group_count"])
        if groups != 1:
            raise refuse(f"the convolution {step.name!r} has {groups} groups", _PLAIN)
        _, channels, rows, columns = numbers.lhs_spec
        outputs, inputs, window_rows, window_columns = numbers.rhs_spec
        kernel = _float32(kernel).transpose(window_rows, window_columns, inputs, outputs)
        out_shape = step.equation.outvars[0].aval.shape
        batch, filters, *pixels = numbers.out_spec
        node = nodes.Convolution(
            tuple(out_shape[axis] for axis in (*pixels, filters)),
            [self.map_of(value, (rows, columns, channels))],
            name=step.name,
            kernel=kernel,
            mask=self._masks.get(step.name, np.ones(kernel.shape, bool)),
            bias=np.zeros(kernel.shape[3], np.float32) if bias is None else _float32(bias),
            strides=tuple(params["window_strides"]),
            padding=tuple(before for before, _ in params["padding"]),
            ops=[Op("max", np.float32(0))] if step.relu else [],
        )
        return _placed(self._add(node), out_shape, (*pixels, filters))

    def dense(self, equation: Any, operands: list[Any]) -> _Value | None:
        """A matrix product with weights: of a whole map, or at each pixel of one."""
        (lhs, rhs), batch = equation.params["dimension_numbers"]
        if any(batch) or all(isinstance(value, _Value) for value in operands):
            return None
        is_first = isinstance(operands[0], _Value)
        value, weights = operands if is_first else reversed(operands)
        own, of_weights = (lhs, rhs) if is_first else (rhs, lhs)
        value = self.whole(value)
        free = [axis for axis in range(weights.ndim) if axis not in of_weights]
        weights = _float32(weights).transpose(*of_weights, *free)
        sizes = weights.shape[: len(own)]
        weights = weights.reshape(int(np.prod(sizes)), -1)
        shape = equation.outvars[0].aval.shape
        left = [axis for axis in range(value.where.ndim) if axis not in own and value.where.shape[axis] > 1]
        if not left:
            places = value.where.transpose(*own, *(a for a in range(value.where.ndim) if a not in own)).reshape(-1)
            source = value.node
            kernel = np.zeros((int(np.prod(source.shape)), weights.shape[1]), np.float32)
            np.add.at(kernel, places, weights)
            mask = np.zeros(len(kernel), bool)
            mask[places] = True
            mask = np.repeat(mask[:, None], weights.shape[1], axis=1)
            window, out = source.shape, (1, 1, weights.shape[1])
        elif len(own) == 1 and len(left) <= 2 and is_first:
            pixels = [a for a in range(value.where.ndim) if a not in own]
            pixels = ([a for a in pixels if a not in left] + left)[-2:]
            if len(pixels) < 2:
                return None
            lift = max(0, _RANK - value.where.ndim)
            source = self.map_of(value, tuple(a + lift for a in (*sorted(pixels), own[0])))
            kernel, mask, window = weights, np.ones(weights.shape, bool), (1, 1, len(weights))
            out = (*source.shape[:2], weights.shape[1])
        else:
            return None
        node = nodes.Convolution(
            out,
            [source],
            name="dense layer " + " x ".join(map(str, (*sizes, weights.shape[1]))),
            kernel=kernel.reshape(*window, -1),
            mask=mask.reshape(*window, -1),
            bias=np.zeros(weights.shape[1], np.float32),
        )
        places = np.arange(int(np.prod(out)), dtype=np.int32).reshape(shape)
        return _Value(self._add(node), places)

    def pool(self, equation: Any, operands: list[Any]) -> _Value | None:
        """Pooling in windows."""
        params, value = equation.params, self.whole(operands[0])
        if value.where.ndim < _RANK:
            return None
        window, strides, padding = (params[key] for key in ("window_dimensions", "window_strides", "padding"))
        if any(step != 1 for step in (*params["base_dilation"], *params["window_dilation"])):
            return None
        busy = [a for a in range(len(window)) if window[a] != 1 or strides[a] != 1 or any(padding[a])]
        axes = _axes(value.where, busy)
        if axes is None or axes[2] in busy or not set(busy) <= set(axes):
            return None
        rows, columns, _ = axes
        shape = equation.outvars[0].aval.shape
        node = nodes.Pool(
            tuple(shape[axis] for axis in axes),
            [self.map_of(value, axes)],
            kind=_POOLS[equation.primitive.name],
            window=(window[rows], window[columns]),
            strides=(strides[rows], strides[columns]),
            padding=(padding[rows][0], padding[columns][0]),
        )
        return _placed(self._add(node), shape, axes)

    def reduce(self, equation: Any, operands: list[Any]) -> _Value | None:
        """Sums and maxima over all pixels, or over all of a small map."""
        value = self.whole(operands[0])
        over = [axis + max(0, _RANK - value.where.ndim) for axis in equation.params["axes"]]
        value = _Value(value.node, _lifted(value.where))
        shape, kind = equation.outvars[0].aval.shape, _REDUCING[equation.primitive.name]
        left = [a for a in range(value.where.ndim) if a not in over and value.where.shape[a] > 1]
        axes = _axes(value.where, over) if left else _axes(value.where, ())
        if axes is None or len(left) > 1:
            return None
        source = self.map_of(value, axes)
        if not left:
            return _Value(self._add(nodes.Total((1, 1, 1), [source], kind=kind)), np.zeros(shape, np.int32))
        if axes[2] != left[0]:
            return None
        height, width, channels = source.shape
        node = nodes.Pool((1, 1, channels), [source], kind=kind, window=(height, width), strides=(height, width))
        return _Value(self._add(node), np.arange(channels, dtype=np.int32).reshape(shape))


_RANK = 4


def _lifted(where: np.ndarray) -> np.ndarray:
    """With as many axes as a batch of maps has at least."""
    return where.reshape((1,) * (_RANK - where.ndim) + where.shape)


_PLAIN = "only plain convolutions have a form in C: leave c=True out, or replace the layer"


def _entrywise(reader: _Reader, equation: Any, operands: list[Any]) -> _Value | None:
    name, shape = equation.primitive.name, equation.outvars[0].aval.shape
    if not np.issubdtype(equation.outvars[0].aval.dtype, np.floating) and "float" not in str(
        equation.outvars[0].aval.dtype
    ):
        return None
    if len(operands) == 1:
        value = reader.whole(operands[0])
        return _Value(reader._add(nodes.Entrywise(value.node.shape, [value.node], [Op(name)])), value.where)
    values = [reader.whole(value) if isinstance(value, _Value) else value for value in operands]
    if all(isinstance(value, _Value) for value in values):
        return _of_two(reader, name, shape, *values)
    is_first = isinstance(values[0], _Value)
    value, constant = values if is_first else reversed(values)
    if value.where.shape != shape:
        return None
    operand = _operand(_float32(constant), value)
    node = nodes.Entrywise(value.node.shape, [value.node], [Op(name, operand, is_first)])
    return _Value(reader._add(node), value.where)


def _of_two(reader: _Reader, name: str, shape: tuple[int, ...], a: _Value, b: _Value) -> _Value | None:
    is_first = a.where.shape == shape and (a.node.shape != (1, 1, 1) or b.node.shape == (1, 1, 1))
    main, other = (a, b) if is_first else (b, a)
    if main.where.shape != shape:
        return None
    if other.node.shape != (1, 1, 1) and (
        main.node.shape != other.node.shape or not np.array_equal(main.where, other.where)
    ):
        if other.where.shape != shape:
            return None
        axes = _axes(main.where, ())
        if axes is None:
            return None
        main, other = (_placed(reader.map_of(value, axes), shape, axes) for value in (main, other))
    node = nodes.Entrywise(main.node.shape, [main.node, other.node], [Op(name, "map", is_first)])
    return _Value(reader._add(node), main.where)


def _power(reader: _Reader, equation: Any, operands: list[Any]) -> _Value | None:
    value, power = reader.whole(operands[0]), equation.params["y"]
    op = {2: Op("square"), 3: Op("cube")}.get(power, Op("pow", np.float32(power)))
    return _Value(reader._add(nodes.Entrywise(value.node.shape, [value.node], [op])), value.where)


def _clamp(reader: _Reader, equation: Any, operands: list[Any]) -> _Value | None:
    least, value, most = operands
    if isinstance(least, _Value) or isinstance(most, _Value) or np.ndim(least) or np.ndim(most):
        return None
    value = reader.whole(value)
    ops = [Op("max", np.float32(least)), Op("min", np.float32(most))]
    for op in ops:
        value = _Value(reader._add(nodes.Entrywise(value.node.shape, [value.node], [op])), value.where)
    return value


def _pad(reader: _Reader, equation: Any, operands: list[Any]) -> _Value | None:
    value, padding = operands
    if isinstance(padding, _Value) or not isinstance(value, _Value) or float(padding) != 0:
        return None
    (where,) = bind(equation, [value.where, np.int32(-1)])
    return _Value(value.node, np.asarray(where))


_RULES: dict[str, Callable[[_Reader, Any, list[Any]], _Value | None]] = {
    **dict.fromkeys(_POOLS, _Reader.pool),
    **dict.fromkeys(_REDUCING, _Reader.reduce),
    "dot_general": _Reader.dense,
    "integer_pow": _power,
    "clamp": _clamp,
    "pad": _pad,
}


def _float32(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


def _places(node: Node) -> _Value:
    return _placed(node, (1, *node.shape), (1, 2, 3))


def _placed(node: Node, shape: tuple[int, ...], axes: Sequence[int]) -> _Value:
    """A whole map as a value of this shape, whose axes are its height, width and channels."""
    places = np.arange(int(np.prod(node.shape)), dtype=np.int32).reshape(node.shape)
    order = np.argsort(axes)
    return _Value(node, places.transpose(order).reshape(shape))


def _axes(where: np.ndarray, busy: Sequence[int]) -> tuple[int, int, int] | None:
    """Which axes of a value are height, width and channels: channels are where neighbours stand side by side.

    Args:
        where: the places of its entries.
        busy: axes that cannot be the channels.

    Returns:
        Counted as if the value had `_RANK` axes at least; None where it is no map.
    """

    where = _lifted(where)

    def step(axis: int) -> int:
        line = np.moveaxis(where, axis, 0).reshape(where.shape[axis], -1)
        return abs(int(line[1, 0]) - int(line[0, 0])) if len(line) > 1 else 0

    wide = [axis for axis in range(where.ndim) if where.shape[axis] > 1 or axis in busy]
    single = [axis for axis in range(where.ndim) if axis not in wide]
    free = [axis for axis in wide if axis not in busy]
    channels = min(free, key=step) if free else (single.pop() if single else None)
    if channels is None:
        return None
    pixels = sorted((axis for axis in wide if axis != channels), key=lambda axis: (-step(axis), axis))
    if len(pixels) > 2:
        return None
    while len(pixels) < 2:
        if not single:
            return None
        pixels.insert(0, single.pop())
    return pixels[0], pixels[1], channels


def _operand(constant: np.ndarray, value: _Value) -> np.ndarray:
    """A constant in the order of the node's map; one number for each channel, or one alone, where that is enough."""
    if constant.size == 1:
        return constant.reshape(())
    whole = np.broadcast_to(constant, value.where.shape)
    channels = value.node.shape[2]
    by_channel = np.zeros(channels, np.float32)
    by_channel[value.where % channels] = whole
    if np.array_equal(by_channel[value.where % channels], whole):
        return by_channel
    result = np.zeros(int(np.prod(value.node.shape)), np.float32)
    result[value.where] = whole
    return result.reshape(value.node.shape)
