"""Dense convolutions of onnxruntime and PyTorch, in processes of an interpreter that has them, without jax.

They stand beside this project's ways in `experiments.bench.layers`, timed in the same rounds on the same cores.
"""

import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.bench.engines import cores
from experiments.bench.worker import Process, Sampled, serve

Direction = Literal["forward", "input gradient", "weight gradient"]
ENGINES = ("onnxruntime", "torch")
# After its last call an engine's threads may wait for more work without a pause, onnxruntime's for 45 ms: that core is
# not to be missed by what is next.
_REST_S = 0.06
_NCHW, _NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
_OIHW, _HWIO = (3, 2, 0, 1), (2, 3, 1, 0)


class ConvEngine(Process):
    """The process of one library, to be used as a context.

    Args:
        engine: of `ENGINES`.
        python: an interpreter that has it.

    Raises:
        Failed: the library is not installed, or does not work.
    """

    def __init__(self, engine: str, python: str) -> None:
        super().__init__([python, "-m", "experiments.bench.conv_engines", engine])
        self.engine = engine

    def prepare(
        self,
        arrays: Path,
        direction: Direction,
        strides: Sequence[int],
        padding: Sequence[Sequence[int]],
        chain: int = 1,
    ) -> tuple[dict[str, "Remote"], dict[str, np.ndarray]]:
        """What it can do about a direction: its forms by name, and their results, NHWC or (kh, kw, cin, cout).

        Args:
            arrays: a file of float32 x, w, dy in NHWC and (kh, kw, cin, cout), of numpy.
            direction: which of the three.
            strides: (rows, columns).
            padding: ((top, bottom), (left, right)).
            chain: calls one after the other.

        Raises:
            Failed: it could not.
        """
        geometry = {"strides": list(strides), "padding": [*map(list, padding)]}
        answer = self.ask("prepare", arrays=str(arrays), direction=direction, **geometry, chain=chain)
        with np.load(answer["results"]) as results:
            found = dict(results)
        os.unlink(answer["results"])
        return {form: Remote(self, form) for form in found}, found


@dataclasses.dataclass(frozen=True)
class Remote:
    """A form of an engine, as `pallas_kernels.tuning.time_together` takes it."""

    engine: ConvEngine
    form: str

    def __call__(self) -> None:
        """Run it once."""
        self.sample(1)

    def sample(self, calls: int) -> float:
        """Seconds of so many calls, after others that are not counted."""
        answer = self.engine.ask("sample", form=self.form, calls=calls)
        time.sleep(_REST_S)
        return calls * answer["seconds"]


class _Served(Sampled):
    """The engine's side."""

    def __init__(self, engine: str) -> None:
        super().__init__()
        self.forms = {"onnxruntime": _onnxruntime, "torch": _torch}[engine]()

    def prepare(
        self, arrays: str, direction: Direction, strides: list[int], padding: list[list[int]], chain: int
    ) -> dict[str, str]:
        """Make the forms in the place of earlier ones; their results are written beside the arrays."""
        with np.load(arrays) as stored:
            self.calls = self.forms(dict(stored), direction, strides, padding, chain)
        axes = _HWIO if direction == "weight gradient" else _NHWC
        results = {form: np.asarray(call()).transpose(axes) for form, call in self.calls.items()}
        path = str(Path(arrays).with_name(f"results-{os.getpid()}.npz"))
        np.savez(path, **results)
        return {"results": path}


_Forms = Callable[[Mapping[str, np.ndarray], Direction, list[int], list[list[int]], int], dict[str, Callable[[], Any]]]


def _onnxruntime() -> _Forms:
    import onnx
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # it warns of what it cannot find out about the machine
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.inter_op_num_threads = 1

    def forms(
        arrays: Mapping[str, np.ndarray], direction: Direction, strides: list[int], padding: list[list[int]], chain: int
    ) -> dict[str, Callable[[], Any]]:
        if direction != "forward":
            return {}
        x = np.ascontiguousarray(arrays["x"].transpose(_NCHW))
        w = np.ascontiguousarray(arrays["w"].transpose(_OIHW))
        kind = onnx.TensorProto.FLOAT
        (top, bottom), (left, right) = padding
        names = ["x", *(f"y{call}" for call in range(chain))]
        attributes = {"strides": strides, "pads": [top, left, bottom, right]}
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Conv", [x, "w"], [y], **attributes) for x, y in itertools.pairwise(names)],
            "conv",
            [onnx.helper.make_tensor_value_info("x", kind, x.shape)],
            [onnx.helper.make_tensor_value_info(names[-1], kind, None)],
            [onnx.numpy_helper.from_array(w, "w")],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return {"onnxruntime": lambda: session.run(None, {"x": x})[0]}

    return forms


def _torch() -> _Forms:
    import torch

    torch.set_num_threads(cores())
    torch.set_grad_enabled(False)
    last = torch.channels_last

    def forms(
        arrays: Mapping[str, np.ndarray], direction: Direction, strides: list[int], padding: list[list[int]], chain: int
    ) -> dict[str, Callable[[], Any]]:
        if any(before != after for before, after in padding):
            return {}
        pads = [before for before, _ in padding]
        x, dy = (torch.from_numpy(arrays[name]).permute(_NCHW).contiguous(memory_format=last) for name in ("x", "dy"))
        w = torch.from_numpy(arrays["w"]).permute(_OIHW).contiguous(memory_format=last)
        settings = (pads, strides, [1, 1], 1)

        def gradient(which: int) -> Any:
            wanted = [index == which for index in range(3)]
            return torch.ops.aten.convolution_backward(dy, x, w, None, strides, pads, [1, 1], False, [0, 0], 1, wanted)[
                which
            ]

        if direction != "forward":
            # What autograd calls for conv2d, one gradient at a time.
            return {"PyTorch": lambda: gradient(0 if direction == "input gradient" else 1)}
        # The weights brought into oneDNN's order beforehand, as torch.compile does; eager calls do it each time.
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(w.to_mkldnn(), *settings, tuple(x.shape))
        pointwise = torch.ops.mkldnn._convolution_pointwise
        once = {
            "PyTorch": lambda x: torch.nn.functional.conv2d(x, w, None, strides, pads),
            "PyTorch packed": lambda x: pointwise(x, packed, None, *settings, "none", [], ""),
        }
        return {
            name: lambda call=call: functools.reduce(lambda y, _: call(y), range(chain), x)
            for name, call in once.items()
        }

    return forms


if __name__ == "__main__":
    serve(sys.argv[1], lambda: _Served(sys.argv[1]))
