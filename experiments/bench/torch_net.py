"""A net in PyTorch, made from the plan of `experiments.bench.torch_plan`; needs PyTorch and NumPy alone."""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (everybody's name for it)

# The forms that a user can choose from without changing what is computed. torch.compile is left out: it is another
# compiler, and wants one for C++.
FORMS = ("eager", "eager, channels_last", "frozen", "frozen, channels_last", "oneDNN weights")
GPU_FORMS = FORMS[:4]


class Net(torch.nn.Module):
    """Follows a plan.

    Args:
        steps: of the plan.
        arrays: of the plan.
        channels_last: whether maps lie in memory as images do, (batch, height, width, channels).
    """

    def __init__(
        self, steps: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray], channels_last: bool = False
    ) -> None:
        super().__init__()
        self.steps = [dict(step) for step in steps]
        self.names = {name: f"array_{index}" for index, name in enumerate(arrays)}
        # PyTorch multiplies by the transposed matrix, and reads it best so.
        self.transposed = {step["inputs"][1] for step in steps if step["op"] == "matmul"}
        for name, array in arrays.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array.T if name in self.transposed else array))
            self.register_buffer(self.names[name], tensor)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)
        last = {}
        for index, step in enumerate(self.steps, start=1):
            last.update((place, index) for place in step["inputs"] if isinstance(place, int))
        self.spent = [[place for place, at in last.items() if at == index] for index in range(len(steps) + 1)]

    def value(self, place: Any, values: Mapping[int, Any]) -> Any:
        """An input of a step."""
        if isinstance(place, dict):
            return place["number"]
        return values[place] if isinstance(place, int) else getattr(self, self.names[place])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 (batch, height, width, channels) -> logits (batch, classes)."""
        values = {0: images}
        for index, step in enumerate(self.steps, start=1):
            values[index] = self.step(index, step, [self.value(place, values) for place in step["inputs"]])
            for place in self.spent[index]:
                del values[place]
        return values[len(self.steps)]

    def step(self, index: int, step: Mapping[str, Any], inputs: list[Any]) -> Any:
        """One step."""
        result = _OPS[step["op"]](step, *inputs)
        if step["op"] == "transpose" and result.ndim == 4:
            result = result.contiguous(memory_format=self.memory_format)
        return result


class PackedNet(Net):
    """The same, every convolution's weights brought once into the order that oneDNN wants for these images.

    Eager and frozen nets bring them into it at every call, which for one image takes as long as the convolution.
    Maps stay in oneDNN's own tensors as far as they can.

    Args:
        steps: of the plan.
        arrays: of the plan.
        images: for which it is.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray], images: Any) -> None:
        super().__init__(steps, arrays)
        self.packed: dict[int, tuple[Any, Any]] = {}
        self(images)

    def step(self, index: int, step: Mapping[str, Any], inputs: list[Any]) -> Any:
        """One step."""
        op = step["op"]
        if op == "conv" and all(before == after for before, after in step["padding"]):
            padding = [before for before, _ in step["padding"]]
            settings = (padding, step["strides"], step["dilation"], step["groups"])
            x, weights, *bias = inputs
            if index not in self.packed:
                shape = tuple(x.shape)
                packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weights.to_mkldnn(), *settings, shape)
                self.packed[index] = (packed, bias[0].to_mkldnn() if bias else None)
            return torch.mkldnn_convolution(x if x.is_mkldnn else x.to_mkldnn(), *self.packed[index], *settings)
        inside = [value.is_mkldnn for value in inputs if isinstance(value, torch.Tensor)]
        pooling = op == "max_pool" and all(before == after for before, after in step["padding"])
        if all(inside) and (pooling or op in ("add", "relu")):
            return super().step(index, step, inputs)
        dense = [
            value.to_dense() if isinstance(value, torch.Tensor) and value.is_mkldnn else value for value in inputs
        ]
        return super().step(index, step, dense)


def make(
    form: str, steps: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray], images: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A net on these images, ready to be called.

    Args:
        form: one of `FORMS`.
        steps, arrays: of the plan.
        images: float32 (batch, height, width, channels), on the device to run on.
    """
    with torch.no_grad():
        if form == "oneDNN weights":
            net: Any = PackedNet(steps, arrays, images).eval()
        else:
            net = Net(steps, arrays, form.endswith("channels_last")).eval().to(images.device)
            if form.startswith("frozen"):
                net = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(net, images)))

    def call() -> torch.Tensor:
        with torch.no_grad():
            return net(images)

    return call


def to_onnx(
    steps: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray], image_shape: Sequence[int]
) -> bytes:
    """A plan as an ONNX model of "images" (batch, height, width, channels) and "logits", the batch left open.

    Args:
        steps, arrays: of the plan.
        image_shape: (height, width, channels).
    """
    stream = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter that it has become needs another package.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Net(steps, arrays).eval(),
            (torch.zeros(2, *image_shape),),
            stream,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            dynamo=False,
        )
    return stream.getvalue()


def _conv(step: Mapping[str, Any], x: torch.Tensor, weights: torch.Tensor, bias: Any = None) -> torch.Tensor:
    x, padding = _padded(x, step["padding"], 0.0)
    return F.conv2d(x, weights, bias, step["strides"], padding, step["dilation"], step["groups"])


def _max_pool(step: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    x, padding = _padded(x, step["padding"], -torch.inf, most=[size // 2 for size in step["window"]])
    return F.max_pool2d(x, step["window"], step["strides"], padding)


def _sum_pool(step: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    x, padding = _padded(x, step["padding"], 0.0, most=[size // 2 for size in step["window"]])
    # With divisor_override=1 it would not run in oneDNN's tensors.
    return F.avg_pool2d(x, step["window"], step["strides"], padding) * math.prod(step["window"])


def _padded(x: torch.Tensor, padding: Any, value: float, most: Any = None) -> tuple[torch.Tensor, list[int]]:
    """``(x, padding that is left to be said)``: one that is not the same on both sides is done at once."""
    most = [before for before, _ in padding] if most is None else most
    if all(before == after <= limit for (before, after), limit in zip(padding, most)):
        return x, [before for before, _ in padding]
    (top, bottom), (left, right) = padding
    return F.pad(x, (left, right, top, bottom), value=value), [0, 0]


def _pad(step: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, [width for pair in reversed(step["widths"]) for width in pair], value=step["value"])


def _slice(step: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    return x[tuple(slice(*each) for each in zip(step["begins"], step["ends"], step["strides"]))]


def _broadcast(step: Mapping[str, Any], x: Any) -> torch.Tensor:
    return torch.as_tensor(x).reshape(step["through"]).expand(step["shape"])


def _tensor(x: Any, *like: torch.Tensor) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=like[0].dtype, device=like[0].device)


_OPS: dict[str, Callable[..., torch.Tensor]] = {
    "broadcast": _broadcast,
    "cast": lambda step, x: x.to(getattr(torch, step["dtype"])),
    "concatenate": lambda step, *xs: torch.cat(xs, step["dimension"]),
    "conv": _conv,
    "integer_pow": lambda step, x: x ** step["y"],
    "matmul": lambda step, x, weights, bias=None: F.linear(x, weights, bias),
    "max_pool": _max_pool,
    "maximum": lambda step, x, y: torch.maximum(_tensor(x, y), _tensor(y, x)),
    "minimum": lambda step, x, y: torch.minimum(_tensor(x, y), _tensor(y, x)),
    "pad": _pad,
    "relu": lambda step, x: F.relu(x),
    "reshape": lambda step, x: x.reshape(step["shape"]),
    "slice": _slice,
    "sum_pool": _sum_pool,
    "transpose": lambda step, x: x.permute(step["permutation"]),
}
_OPS |= {name: lambda step, x, name=name: getattr(x, name)(step["axes"]) for name in ("sum", "amax", "amin")}
_OPS |= {
    name: lambda step, x, *ys, name=name: getattr(torch, name)(_tensor(x, *ys), *ys)
    for name in "abs add clone div erf exp log mul neg pow rsqrt sigmoid sign sqrt square sub tanh".split()
}
