"""A dense net, BatchNorm folded, as an ONNX model, for the engines that read it.

jax2onnx does the conversion. It is handed the net with its maps in ONNX's order, and with pooling, ReLU and strided
slices as calls that it knows by name: given the net as it is, it transposes before and after every convolution, and
writes pooling over all four axes, which onnxruntime does not run.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy.channels_first import channels_first
from clicktrain_jax.deploy.tracing import flattened
from clicktrain_jax.extras import hint
from clicktrain_jax.jaxprs import CONVOLUTION, bind, unknown_parameters, walk

if TYPE_CHECKING:
    from clicktrain_jax.deploy.fold import Folded

INPUT, OUTPUT = "images", "logits"
_NHWC, _NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def to_onnx(folded: "Folded", image_shape: Sequence[int], opset: int | None = None) -> bytes:
    """Convert a folded net.

    Args:
        folded: `Folded`, or what has its ``function(arrays, images)`` and ``arrays``.
        image_shape: (height, width, channels).
        opset: version of ONNX's operators; None for the converter's own choice.

    Returns:
        An ONNX model. Its input "images" is float32 (batch, height, width, channels), any number of images, as the
        function takes them (pixels in [0, 1] where it normalises); its output "logits" is (batch, classes).

    Raises:
        ValueError: jax2onnx is not installed, or knows no form of what the net computes.
    """
    try:
        with _quiet():
            import flax.linen  # noqa: F401  (it takes pooling from there)
            import jax2onnx  # pyright: ignore[reportMissingImports]  (of the extra "onnx" alone)
    except ImportError as error:
        raise ValueError(f"the converter to ONNX cannot be imported ({error}): {hint('onnx')}") from error
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    # Traced here, not by jax2onnx: it puts other functions in the place of many of jax's while it traces.
    closed, _ = flattened(channels_first(folded.function, folded.arrays), images)
    # What it cannot have is said before the converter wraps errors of its own.
    jax.eval_shape(lambda images: _in_known_calls(closed, images), images)
    options = {"input_names": [INPUT], "output_names": [OUTPUT]} | ({} if opset is None else {"opset": opset})
    try:
        with _quiet():
            model = jax2onnx.to_onnx(lambda images: _in_known_calls(closed, images), [images], **options)
    except Exception as error:  # whatever a converter of another project raises
        raise ValueError(f"jax2onnx cannot convert this net: {type(error).__name__}: {error}") from error
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's warnings of its own plugins for other libraries."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _in_known_calls(closed: Any, images: Any) -> Any:
    def step(equation: Any, operands: list[Any]) -> list[Any]:
        known = _KNOWN.get(equation.primitive.name)
        result = None if known is None else known(equation.params, *operands)
        return bind(equation, operands) if result is None else [result]

    return walk(closed, [images], step)[0]


def _convolution(params: dict[str, Any], x: Any, kernel: Any) -> Any:
    """A convolution of ONNX has one dtype and no precision: it computes in what it is given."""
    if unknown := unknown_parameters(params):
        raise ValueError(f"a convolution has {unknown}, which ONNX does not know: leave onnx=True out")
    if params["batch_group_count"] != 1:
        raise ValueError("a convolution has groups of images, which ONNX does not know: leave onnx=True out")
    wanted = params["preferred_element_type"] or x.dtype
    settings = {**params, "precision": None, "preferred_element_type": None}
    return jax.lax.conv_general_dilated_p.bind(*(each.astype(wanted) for each in (x, kernel)), **settings)


def _relu(params: dict[str, Any], x: Any, least: Any) -> Any:
    return jax.nn.relu(x) if _is_number(least, 0) else None


def _pad(params: dict[str, Any], x: Any, value: Any) -> Any:
    config = params["padding_config"]
    if isinstance(value, jax.core.Tracer) or any(between or min(pads) < 0 for *pads, between in config):
        return None
    return jnp.pad(x, [(before, after) for before, after, _ in config], constant_values=np.asarray(value).item())


def _pool(name: str, empty: float) -> Callable[..., Any]:
    def pool(params: dict[str, Any], x: Any) -> Any:
        import flax.linen

        window, padding = params["window_dimensions"], params["padding"]
        dilations = (*params["base_dilation"], *params["window_dilation"])
        if len(window) != 4 or window[:2] != (1, 1) or any(step != 1 for step in dilations):
            return None
        if any(before or after for before, after in padding):
            x = jnp.pad(x, padding, constant_values=empty)
        # The two transposes vanish: the call is converted with two of its own around it.
        y = getattr(flax.linen, name)(
            jnp.transpose(x, _NHWC), window_shape=window[2:], strides=params["window_strides"][2:], padding="VALID"
        )
        y = jnp.transpose(y, _NCHW)
        return y * float(math.prod(window)) if name == "avg_pool" else y

    return pool


def _slice(params: dict[str, Any], x: Any) -> Any:
    """Every n-th pixel, as the largest of each window of one pixel: converted as a slice it is gathered."""
    strides = params["strides"]
    if strides is None or len(strides) != 4 or strides[:2] != (1, 1) or any(params["start_indices"]):
        return None
    if tuple(params["limit_indices"]) != tuple(x.shape):
        return None
    ones = (1, 1, 1, 1)
    window = {"window_dimensions": ones, "base_dilation": ones, "window_dilation": ones}
    return _KNOWN["reduce_window_max"]({**window, "window_strides": strides, "padding": ((0, 0),) * 4}, x)


def _is_number(value: Any, number: float) -> bool:
    return not isinstance(value, jax.core.Tracer) and np.ndim(value) == 0 and float(value) == number


# How a primitive is said with a function that jax2onnx has a clean form for; None where it must stand as it is.
_KNOWN: dict[str, Callable[..., Any]] = {
    CONVOLUTION: _convolution,
    "max": _relu,
    "pad": _pad,
    "reduce_window_max": _pool("max_pool", -math.inf),
    "reduce_window_sum": _pool("avg_pool", 0.0),
    "slice": _slice,
}
