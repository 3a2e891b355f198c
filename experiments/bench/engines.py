"""The engines that a net is timed in, each one to be made in a process of its own; nothing of jax is needed to import.

An engine is made (its library is imported), loads (weights, programs), and then offers the forms in which it can run
a batch. All of them take the same float32 images and give the same logits; every core that the process may use is
theirs, and the arithmetic is float32 where the net's is.
"""

import collections
import ctypes
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.c_library import LIBRARY

# Files of a job's folder: what is handed to the engines.
ONNX = "net.onnx"

Call = Callable[[], Any]


class Unavailable(Exception):
    """An engine cannot take part here, in words."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What an engine is to run.

    Attributes:
        export: the export's folder.
        folder: with `ONNX` and `LIBRARY`, as far as they could be made.
        platform: of jax: "cpu", "gpu".
        is_tuned: whether this net is measured in its ways too.
    """

    export: Path
    folder: Path
    platform: str
    is_tuned: bool = False


class Engine:
    """One way to run the net; `ENGINES` makes them, each of which imports its library when it is made.

    Attributes:
        version: of what it is, where pip knows nothing of it.
    """

    version: str | None = None

    def __init__(self, job: Job) -> None:
        self.job = job

    def load(self) -> None:
        """Read what is needed for any batch."""
        raise NotImplementedError

    def forms(self, images: np.ndarray) -> dict[str, Callable[[], Call]]:
        """Functions that prepare a form for these images: each returns one that runs it, and waits for the result."""
        raise NotImplementedError

    def first(self, images: np.ndarray, form: str) -> Any:
        """The first answer after `load`."""
        return self.forms(images)[form]()()

    def device_bytes(self) -> int | None:
        """The most memory of an accelerator that was in use; None without one."""
        return None


class _Xla(Engine):
    """What the ways through XLA have in common."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        import jax

        self.jax = jax
        self.net: Any = None

    def load(self) -> None:
        import clicktrain_jax as ct

        self.net = ct.load(self.job.export)

    def device_bytes(self) -> int | None:
        stats = self.jax.devices()[0].memory_stats()
        return None if not stats else stats.get("peak_bytes_in_use")

    def bound(self, function: Callable[..., Any], arrays: Any, images: np.ndarray) -> Call:
        """A jitted function of arrays and images, on the device."""
        arrays, images = self.jax.device_put((arrays, images))
        program = self.jax.jit(function)
        return lambda: self.jax.block_until_ready(program(arrays, images))


class Pruned(_Xla):
    """The exported net as `clicktrain_jax.load` gives it, and with its choice measured where the job says so."""

    def forms(self, images: np.ndarray) -> dict[str, Callable[[], Call]]:
        """As loaded, and tuned (measured once: it is kept) for the batch size; each says how the layers run."""

        nets = {"as loaded": self.net}
        if self.job.is_tuned:
            nets["tuned"] = self.net.tuned(len(images))

        def called(net: Any) -> Call:
            array = self.jax.device_put(images)
            # The door that a user takes, with its checks.
            return lambda: self.jax.block_until_ready(net(array))

        return {
            f"{name}: {ways_of(net.convolutions(len(images)))}": lambda net=net: called(net)
            for name, net in nets.items()
        }

    def first(self, images: np.ndarray, form: str) -> Any:
        """The first answer, without measuring."""

        return self.jax.block_until_ready(self.net(images))


class _Dense(_Xla):
    """All weights, BatchNorm folded, each convolution by one backend."""

    def direct(self, images: np.ndarray, backend: str) -> Call:
        """The net by a backend."""
        try:
            net = self.net.dense(len(images), backend)
        except ValueError as reason:
            raise Unavailable(str(reason)) from reason
        return self.bound(*net.program(len(images)), images)


class DenseNative(_Dense):
    """The dense net by the native kernels."""

    def forms(self, images: np.ndarray) -> dict[str, Callable[[], Call]]:
        """All convolutions that they can run."""
        return {"native kernels": lambda: self.direct(images, "cpu")}


class DenseFolded(_Dense):
    """The dense net through XLA in its best form."""

    def forms(self, images: np.ndarray) -> dict[str, Callable[[], Call]]:
        """By XLA's convolutions, and by patches."""

        from clicktrain_jax.models.conv import patch_convolution

        def by_patches(step: Any, x: Any, kernel: Any, bias: Any) -> Any:
            params = step.equation.params
            numbers = params["dimension_numbers"]
            order = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
            dilation = (*params["lhs_dilation"], *params["rhs_dilation"])
            groups = (params["feature_group_count"], params["batch_group_count"])
            if order != ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)) or any(each != 1 for each in (*dilation, *groups)):
                raise Unavailable("a convolution that patches are not written for")
            y = patch_convolution(x, kernel, strides=params["window_strides"], padding=params["padding"], layout="NHWC")
            return step.finished(y, bias)

        def patches() -> Call:
            folded = self.net.folded
            return self.bound(lambda arrays, x: folded.function(arrays, x, by_patches), folded.arrays, images)

        return {"XLA's convolutions": lambda: self.direct(images, "xla"), "patches": patches}


class DensePlain(_Xla):
    """The dense net as a user has it: the Flax model applied under jit."""

    def load(self) -> None:
        """The variables as they were trained."""

        from clicktrain_jax.deploy import storage
        from clicktrain_jax.deploy.load import normalising, zoo

        stored = storage.read(self.job.export)
        facts = stored.manifest["facts"]
        self.variables = stored.variables
        self.apply = normalising(zoo(facts["net"]), facts.get("normalise"))

    def forms(self, images: np.ndarray) -> dict[str, Callable[[], Call]]:
        """As it is."""

        return {"flax.linen": lambda: self.bound(self.apply, self.variables, images)}


class NetInC(Engine):
    """The export's ``net.c``, compiled for this machine beforehand and called through ctypes; pixels are uint8."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        _cpu_alone(job)
        _read(job, LIBRARY)
        self.version = (job.folder / f"{LIBRARY}.txt").read_text()

    def load(self) -> None:
        """The library, and its weights where they are apart."""

        self.library = ctypes.CDLL(os.fspath(self.job.folder / LIBRARY))
        self.library.bench_load.restype = ctypes.c_int
        if self.library.bench_load(os.fsencode(self.job.folder / "net.weights")):
            raise Unavailable("net.weights is not that of net.c")

    def forms(self, images: np.ndarray) -> dict[str, Callable[[], Call]]:
        """In one thread, and one image in all threads or several side by side."""

        pixels = np.round(255 * images).astype(np.uint8)
        logits = np.empty((len(images), self.library.bench_classes()), np.float32)

        def called(threads: int) -> Call:
            def call() -> np.ndarray:
                self.library.bench_run(
                    ctypes.c_void_p(pixels.ctypes.data), len(pixels), ctypes.c_void_p(logits.ctypes.data), threads
                )
                return logits

            return call

        named = "one thread", f"{cores()} threads" if len(images) == 1 else f"an image a thread, {cores()} threads"
        return {name: lambda n=n: called(n) for name, n in zip(named, dict.fromkeys((1, cores())))}


class OnnxRuntime(Engine):
    """onnxruntime on the CPU."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        _cpu_alone(job)
        import onnxruntime

        self.library = onnxruntime
        # It warns of what it cannot find out about the machine.
        onnxruntime.set_default_logger_severity(3)

    def load(self) -> None:
        """The model."""
        self.model = _read(self.job, ONNX)

    def forms(self, images: np.ndarray) -> dict[str, Callable[[], Call]]:
        """A session for the batch size."""

        def session() -> Call:
            options = self.library.SessionOptions()
            options.intra_op_num_threads = cores()
            options.inter_op_num_threads = 1
            options.add_free_dimension_override_by_name("batch", len(images))
            made = self.library.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
            return lambda: made.run(None, {"images": images})[0]

        return {"all graph optimisations": session}


class OpenVino(Engine):
    """OpenVINO on the CPU."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        _cpu_alone(job)
        import openvino

        self.library = openvino

    def load(self) -> None:
        """The model."""

        self.core = self.library.Core()
        self.model = _read(self.job, ONNX)

    def forms(self, images: np.ndarray) -> dict[str, Callable[[], Call]]:
        """Compiled for the batch size, and for the precision."""

        def compiled(**precision: str) -> Call:
            model = self.core.read_model(self.model)
            model.reshape([len(images), *images.shape[1:]])
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": cores(), **precision}
            request = self.core.compile_model(model, "CPU", settings).create_infer_request()
            request.set_input_tensor(self.library.Tensor(images))

            def call() -> np.ndarray:
                request.infer()
                return request.get_output_tensor(0).data

            return call

        return {
            "float32": lambda: compiled(INFERENCE_PRECISION_HINT="f32"),
            # Where the CPU has bfloat16, that is what it takes unasked.
            "its default precision": compiled,
        }


# By the names that stand in tables; the first is what all others are compared with.
THIS_NET, IN_C = "this net", "this net in C"
NATIVE, DENSE, PLAIN = "dense (native)", "dense (XLA)", "dense (XLA), as trained"
ORT, OPENVINO = "dense (onnxruntime)", "dense (OpenVINO)"
ENGINES: Mapping[str, Callable[[Job], Engine]] = {
    THIS_NET: Pruned,
    IN_C: NetInC,
    NATIVE: DenseNative,
    DENSE: DenseFolded,
    PLAIN: DensePlain,
    ORT: OnnxRuntime,
    OPENVINO: OpenVino,
}
# What pip calls the library of an engine.
PACKAGES = dict.fromkeys((THIS_NET, IN_C, NATIVE, DENSE, PLAIN), "jax") | {ORT: "onnxruntime", OPENVINO: "openvino"}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def ways_of(sites: Any) -> str:
    """How so many convolutions run, in words."""
    ways = collections.Counter(
        f"{'dense' if site.plan.run == 'dense' else 'by pattern'}, "
        f"{'native' if site.plan.backend == 'cpu' else (site.plan.backend or 'xla').replace('xla', 'XLA')}"
        for site in sites
    )
    return "; ".join(f"{count} {way}" for way, count in ways.most_common())


def _cpu_alone(job: Job) -> None:
    if job.platform != "cpu":
        raise Unavailable("it runs on the CPU here, and is not compared with a GPU")


def _read(job: Job, name: str) -> bytes:
    """A file of the job; where it could not be made, the reason lies beside it."""
    path = job.folder / name
    if not path.exists():
        raise Unavailable((job.folder / f"{name}.txt").read_text())
    return path.read_bytes()
