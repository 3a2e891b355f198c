"""How one convolution of a net is to be run: dense, or by its structure; and running it so."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy.interception import Convolution
from clicktrain_jax.jaxprs import unknown_parameters

# By XLA's convolution, by the native kernels with all weights, or by the structure in a layout.
Run = Literal["dense", "dense cpu", "NHWC", "HWNC"]
RUNS: tuple[Run, ...] = ("dense", "dense cpu", "NHWC", "HWNC")
DENSE_RUNS: tuple[Literal["dense"], Literal["dense cpu"]] = ("dense", "dense cpu")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# Backends that do the retained share of the work, the fastest first.
_SPARSE_BACKENDS = ("mosaic_gpu", "cpu", "xla")
_DENSE_BACKENDS = ("dense", "reference")
# With fewer output pixels the native kernels take longer to lay out weights that come anew with each call than XLA
# takes to multiply with them.
_FEW_PIXELS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a layer runs.

    Attributes:
        run: "dense", or the layout in which it runs by its structure.
        backend: of `pallas_kernels.pattern_conv`; for "dense" it is "cpu" for the native kernels, empty for XLA's.
        why: in words.
    """

    run: Literal["dense", "NHWC", "HWNC"]
    backend: str
    why: str


class Layer:
    """A convolution whose kernel has a mask, seen in the axes' order that `pallas_kernels.pattern_conv` takes.

    Attributes:
        mask: bool (kh, kw, cin, cout).
        x_shape: of the images, as the net has them.
        dtype: of images and kernel.
        kernel_order: which of the kernel's axes are the mask's.
        own_layout: the layout that the net runs it in, if it is one of the two; NHWC otherwise.
    """

    def __init__(self, convolution: Convolution, mask: np.ndarray):
        """``mask`` is bool of the kernel's shape, in the order that the net has it in."""
        numbers = convolution.params["dimension_numbers"]
        batch, channels, rows, columns = numbers.lhs_spec
        self._x_order = {"NHWC": (batch, rows, columns, channels), "HWNC": (rows, columns, batch, channels)}
        outputs, inputs, window_rows, window_columns = numbers.rhs_spec
        self.kernel_order = (window_rows, window_columns, inputs, outputs)
        self._out_spec = numbers.out_spec
        self._params = convolution.params
        self.x_shape = convolution.x_shape
        self.dtype = convolution.dtype
        self.mask = mask.transpose(self.kernel_order)
        self.own_layout: Literal["NHWC", "HWNC"] = "HWNC" if self._x_order["HWNC"] == (0, 1, 2, 3) else "NHWC"

    @property
    def settings(self) -> dict[str, Any]:
        """Strides, padding and precision, as `pallas_kernels` takes them; all else is refused by `why_dense`."""
        params = self._params
        return {"strides": params["window_strides"], "padding": params["padding"], "precision": params["precision"]}

    def facts(self, structure: Any) -> tuple:
        """What the speed depends on: layers of equal facts are run alike."""
        retained = round(float(self.mask.mean()), 2)
        x_shape = tuple(self.x_shape[axis] for axis in self._x_order["NHWC"])
        geometry = (tuple(self._params["window_strides"]), tuple(map(tuple, self._params["padding"])))
        if self._params["precision"] is not None:
            geometry = (*geometry, str(self._params["precision"]))
        pattern = () if structure is None else (structure.tile, structure.patterns, retained)
        return (x_shape, self.mask.shape, geometry, str(self.dtype), *pattern)

    def work(self) -> float:
        """Multiply-adds when it is run dense, roughly: the padding is not looked at."""
        batch, rows, columns, _ = (self.x_shape[axis] for axis in self._x_order["NHWC"])
        return batch * rows * columns * self.mask.size / math.prod(self._params["window_strides"])

    def refusal(self, structure: Any, layout: str, backend: str) -> str | None:
        """Why a backend cannot run the layer in a layout; None if it can."""
        from pallas_kernels.pattern_conv import api

        return api.supported(*self._place(structure, layout))[backend]

    def choice(self, structure: Any, layout: str, is_prepared: bool = False) -> str:
        """The backend that `pattern_conv` takes when it is left open, its weights prepared before or in each call."""
        from pallas_kernels.pattern_conv import api

        return api.choose(*self._place(structure, layout), is_packed=is_prepared)

    def is_fast_natively(self, is_prepared: bool = True) -> bool:
        """Whether the native kernels are the way to run it dense, its weights prepared before or in each call."""
        from pallas_kernels.pattern_conv import dense

        _, geometry, dtype, batch = self._place(None, "NHWC")
        if not dense.is_native(geometry, dtype, batch):
            return False
        return is_prepared or batch * math.prod(geometry.output) > _FEW_PIXELS

    def _place(self, structure: Any, layout: str) -> tuple:
        """(structure, geometry, dtype, batch), as the backends are asked."""
        from pallas_kernels.pattern_conv import geometry

        x_shape = tuple(self.x_shape[axis] for axis in self._x_order[layout])
        place = geometry.make_geometry(x_shape, self.mask.shape[:2], layout=layout, **self.settings)
        return structure, place, self.dtype, x_shape[place.batch_axis]

    def prepared(self, kernel: Any, structure: Any, plan: Plan) -> Any:
        """What `convolve_prepared` takes, for weights that change no more; numpy's for a numpy kernel.

        Args:
            kernel: in the order that the net has it in.
            structure: of the layer.
            plan: how it runs.
        """
        import pallas_kernels

        kernel = kernel.transpose(self.kernel_order)
        if plan.backend == "cpu":
            structure = everything(self.mask.shape) if plan.run == "dense" else structure
            _, geometry, _, _ = self._place(structure, "NHWC")
            output = geometry.output if geometry.strides == (1, 1) else None
            return pallas_kernels.pack(kernel, structure, backend="cpu", output=output)
        return pallas_kernels.pack(kernel, structure) if plan.backend == "xla" else kernel

    def convolve_prepared(
        self, x: Any, prepared: Any, structure: Any, plan: Plan, *, bias: Any = None, relu: bool = False
    ) -> Any:
        """`convolve` on what `prepared` made of the kernel; dense where the plan says so.

        Args:
            x: images as the net has them.
            prepared: of `prepared`.
            structure: of the layer.
            plan: that it was prepared for.
            bias: (filters,), and
            relu: whether what is negative becomes 0: for the backend "cpu" alone, which does it on the way.
        """
        import pallas_kernels

        layout = self._layout(plan)
        x = _transposed(x, self._x_order[layout])
        settings = {"layout": layout, **self.settings}
        if plan.backend == "cpu":
            # The lists are in what was packed: of the structure its shapes alone are read.
            structure = everything(self.mask.shape) if plan.run == "dense" else structure
            y = pallas_kernels.packed_conv(x, prepared, structure, bias=bias, relu=relu, **settings)
        elif plan.run == "dense":
            y = pallas_kernels.dense_conv(x, prepared, backend="xla", **settings)
        elif plan.backend == "xla":
            y = pallas_kernels.packed_conv(x, prepared, structure, **settings)
        else:
            y = pallas_kernels.pattern_conv(x, prepared, structure, **{"backend": plan.backend, **settings})
        return self._as_the_net_has_it(y, layout)

    def convolve(self, x: Any, kernel: Any, structure: Any, plan: Plan) -> Any:
        """The convolution as planned; images, kernel and result in the order that the net has them in.

        Dense, which is by the native kernels here, the kernel is masked already.
        """
        import pallas_kernels

        layout = self._layout(plan)
        x, kernel = _transposed(x, self._x_order[layout]), _transposed(kernel, self.kernel_order)
        settings = {"layout": layout, "backend": plan.backend, **self.settings}
        if plan.run == "dense":
            y = pallas_kernels.dense_conv(x, kernel, **settings)
        else:
            y = pallas_kernels.pattern_conv(x, kernel, structure, **settings)
        return self._as_the_net_has_it(y, layout)

    def _layout(self, plan: Plan) -> Literal["NHWC", "HWNC"]:
        if plan.run != "dense":
            return plan.run
        return "NHWC" if plan.backend == "cpu" else self.own_layout

    def _as_the_net_has_it(self, y: Any, layout: str) -> Any:
        here = {letter: axis for axis, letter in enumerate(layout)}
        wanted = dict(zip(self._out_spec, "NCHW"))
        return _transposed(y, tuple(here[wanted[axis]] for axis in range(4)))


class Site(NamedTuple):
    """One convolution of a net and how it runs.

    Attributes:
        layer: None where it can only be dense as it stands.
        structure: `pallas_kernels.Structure` of what is retained; None where nothing is removed.
        plan: how it runs.
    """

    layer: Layer | None
    structure: Any
    plan: Plan


class Planner:
    """Plans the convolutions of one net; keeps their structures."""

    def __init__(self, backend: str | None) -> None:
        """``backend`` of `pallas_kernels.pattern_conv` for all pruned layers; None leaves it open."""
        self._backend = backend
        self._structures: dict[tuple, Any] = {}

    def __call__(
        self,
        convolution: Convolution,
        wanted: Run | None = None,
        *,
        is_prepared: bool = False,
        is_portable: bool = False,
    ) -> Site:
        """How a convolution runs.

        Args:
            convolution: with its kernel, whose mask counts.
            wanted: what was measured to be best, None where nothing was.
            is_prepared: whether the weights are laid out before, once for all calls.
            is_portable: whether it must run on any device, for any number of images.

        Raises:
            ValueError: the named backend cannot run it, or not as wanted.
        """
        kernel = convolution.kernel
        mask = None if kernel is None else kernel.mask
        why = why_dense(convolution)
        if why is not None:
            is_whole = kernel is not None and (mask is None or mask.all())
            return Site(None, None, Plan("dense", "", "nothing of it is removed" if is_whole else why))
        layer = Layer(convolution, np.ones(convolution.kernel_shape, bool) if mask is None else mask)
        structure = None
        if not layer.mask.all():
            # One leaf may stand in several orders of its axes.
            key = (convolution.name, () if kernel is None else kernel.moves, layer.kernel_order)
            if key not in self._structures:
                self._structures[key] = _structure(layer.mask)
            structure = self._structures[key]
        if is_portable:
            return Site(layer, structure, portable_plan(structure))
        try:
            return Site(layer, structure, plan_layer(layer, structure, self._backend, wanted, is_prepared))
        except ValueError as error:
            raise ValueError(f"{convolution.name!r}: {error}") from error


def _structure(mask: np.ndarray) -> Any:
    import pallas_kernels

    return pallas_kernels.make_structure(mask)


def why_dense(convolution: Convolution) -> str | None:
    """Why a convolution cannot run by a structure, whatever backend there is; None if it can."""
    params = convolution.params
    if convolution.kernel is None and not convolution.inside:
        if not convolution.sources:
            return "its kernel is no parameter of the masks' tree"
        leaves = ", ".join(map(repr, sorted(convolution.sources)))
        return f"its kernel is computed from {leaves}, whose zeros it need not have"
    if convolution.inside:
        return f"it stands inside of {convolution.inside!r}, which is left as it is"
    if unknown := unknown_parameters(params):
        return f"{unknown} is not passed on to the kernels"
    rank = len(convolution.x_shape) - 2
    if rank != 2:
        return f"it is {rank}-dimensional"
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return f"it has {max(params['feature_group_count'], params['batch_group_count'])} groups"
    if any(step != 1 for step in params["lhs_dilation"]):
        return "it is transposed (its input is dilated)"
    if any(step != 1 for step in params["rhs_dilation"]):
        return f"it is dilated by {tuple(params['rhs_dilation'])}"
    if any(place < 0 for pair in params["padding"] for place in pair):
        return f"its padding {tuple(params['padding'])} cuts the image"
    dtypes = [str(convolution.dtype), str(convolution.kernel_dtype)]
    wanted = params["preferred_element_type"]
    if wanted is not None:
        dtypes.append(str(jnp.dtype(wanted)))
    if len(set(dtypes)) > 1 or dtypes[0] not in _DTYPES:
        return f"images, kernel and result are {', '.join(dtypes)}, not of one floating dtype"
    return None


def plan_layer(
    layer: Layer, structure: Any, backend: str | None, wanted: Run | None, is_prepared: bool = False
) -> Plan:
    """How a layer that can run by its structure is run.

    Args:
        layer: the layer.
        structure: of `pallas_kernels.make_structure`; None where nothing is removed.
        backend: one that is named must be able to run it; None leaves it open.
        wanted: what was measured to be best, None where nothing was.
        is_prepared: whether the weights are laid out before, once for all calls.

    Raises:
        ValueError: the named backend can run it in neither layout.
    """
    if structure is None or wanted in DENSE_RUNS:
        why = "nothing of it is removed" if structure is None else "measured on the whole net: dense is as fast"
        return _dense_plan(layer, why, wanted, is_prepared)
    own = layer.own_layout
    other = "HWNC" if own == "NHWC" else "NHWC"
    layouts = (own, other) if wanted is None else (wanted,)
    if wanted is None and backend is None:
        # The native kernels are worth a transpose; else a net keeps its layout.
        chosen = {layout: layer.choice(structure, layout, is_prepared) for layout in layouts}
        layout = other if chosen[own] != "cpu" and chosen[other] == "cpu" else own
        if chosen[layout] not in _DENSE_BACKENDS:
            return Plan(layout, chosen[layout], "pattern_conv's own choice, not measured")
        return _dense_plan(layer, "pattern_conv takes the dense form for this shape", None, is_prepared)
    backends = _SPARSE_BACKENDS if backend is None else (backend,)
    reasons = []
    for layout in layouts:
        for name in backends:
            reason = layer.refusal(structure, layout, name)
            if reason is None:
                why = "named" if backend is not None else "measured on the whole net"
                return Plan(layout, name, why)
            reasons.append(f"{name} in {layout}: {reason}")
    raise ValueError(f"cannot run a kernel {structure.shape} on images {layer.x_shape}: {'; '.join(reasons)}")


def _dense_plan(layer: Layer, why: str, wanted: Run | None, is_prepared: bool) -> Plan:
    """Dense, by the native kernels where they are wanted, or nothing is said and they are the faster."""
    is_native = layer.is_fast_natively(is_prepared) if wanted is None else wanted == "dense cpu"
    reason = layer.refusal(None, "NHWC", "cpu") if is_native else None
    if reason is not None:
        raise ValueError(f"cannot run a dense kernel {layer.mask.shape} on images {layer.x_shape} by 'cpu': {reason}")
    return Plan("dense", "cpu" if is_native else "", why)


def gains(structure: Any, direction: Any = "forward", backend: Literal["xla", "cpu"] = "xla") -> bool:
    """Whether a layer should be faster by its structure than dense, by an estimate; as `pallas_kernels.estimated_gain`.

    Where nothing is measured, a portable net and a training loop decide by it.
    """
    import pallas_kernels

    return pallas_kernels.estimated_gain(structure, direction, backend=backend) > pallas_kernels.LEAST_GAIN


def own_backend() -> Literal["xla", "cpu"]:
    """The backend that runs by structures in plain programs on this device."""
    from pallas_kernels import native

    return "cpu" if jax.default_backend() == "cpu" and native.is_fast() else "xla"


def portable_plan(structure: Any) -> Plan:
    """How a layer runs where nothing is known of the device and of the number of images; structure as `plan_layer`."""
    if structure is None:
        return Plan("dense", "", "nothing of it is removed")
    if gains(structure):
        return Plan("NHWC", "xla", "estimated, for any device")
    return Plan("dense", "", "its pattern promises no gain on any device")


def can_run(layer: Layer, structure: Any, backend: str | None) -> tuple[Run, ...]:
    """The ways to run a layer that are worth a measurement, dense first; structure as `plan_layer`."""
    names = _SPARSE_BACKENDS if backend is None else (backend,)
    is_native = layer.is_fast_natively()
    dense: tuple[Run, ...] = DENSE_RUNS if is_native else ("dense",)
    # Where the native kernels serve, the portable form is not faster, and each way is a program to be compiled.
    layouts = () if structure is None else ("NHWC",) if is_native and "cpu" in names else ("NHWC", "HWNC")
    return (
        *dense,
        *(layout for layout in layouts if any(layer.refusal(structure, layout, name) is None for name in names)),
    )


@functools.cache
def everything(shape: tuple[int, ...]) -> Any:
    """The structure of a kernel (kh, kw, cin, cout) of which nothing is removed."""
    import pallas_kernels

    return pallas_kernels.make_structure(np.ones(shape, bool), tile=(None, None))


def _transposed(array: Any, order: tuple[int, ...]) -> Any:
    return array if order == (0, 1, 2, 3) else jnp.transpose(array, order)
