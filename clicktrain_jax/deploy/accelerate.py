"""A user's own net, its pruned convolutions run by their patterns; the net's code stays as it is.

    fast = ct.accelerate(lambda variables, x: model.apply(variables, x, train=False), ct.masks_of(opt_state))
    logits = jax.jit(fast)(variables, images)
    fast = fast.tuned(variables, images)      # measures this net on this device: dense, by patterns, or layer by layer
    print(fast.report(variables, images).to_text())

What cannot be run by its pattern runs dense, and the report says why.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from clicktrain_jax.deploy import interception, layers, whole_net
from clicktrain_jax.deploy.arguments import Frame, check_function, parameter_names, state_of, take_apart, write_back
from clicktrain_jax.deploy.pruned import check_zeros
from clicktrain_jax.deploy.reverse_only import reverse_only
from clicktrain_jax.deploy.tracing import traced
from clicktrain_jax.masks import Masks, combine
from clicktrain_jax.trees import Tree, named_leaves


@dataclasses.dataclass(frozen=True)
class ConvolutionReport:
    """One convolution of the net.

    Attributes:
        name: its kernel's leaf, ``"Conv_1/kernel"``, or the one that it is computed from; empty when that is no
            parameter of the masks' tree, or several.
        kernel_shape: in the order in which the net has it.
        image_shape: of its input, likewise.
        retained: share of its weights that the mask keeps; None without mask, or where the kernel is computed.
        runs: "dense" or "sparse".
        layout: in which it runs by its structure; empty when dense.
        backend: of `pallas_kernels.pattern_conv`; for a dense one "cpu" for the native kernels, empty for XLA's.
        why: what decided.
    """

    name: str
    kernel_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    retained: float | None
    runs: str
    layout: str
    backend: str
    why: str

    @classmethod
    def of(cls, name: str, kernel_shape: Any, image_shape: Any, mask: Any, plan: layers.Plan) -> "ConvolutionReport":
        """A row from the mask, bool or None, and the plan of a convolution."""
        retained = None if mask is None else float(mask.mean())
        runs, layout = ("dense", "") if plan.run == "dense" else ("sparse", plan.run)
        return cls(name, tuple(kernel_shape), tuple(image_shape), retained, runs, layout, plan.backend, plan.why)


@dataclasses.dataclass(frozen=True, repr=False)
class AccelerateReport:
    """What runs how.

    Attributes:
        convolutions: in the order in which the net calls them; one that is called twice stands here twice.
        seconds: ``{what was measured: median seconds of a call}`` of `Accelerated.tuned`; None where nothing was.
        device: the kind of device that it was measured on; empty where nothing was.
    """

    convolutions: tuple[ConvolutionReport, ...]
    seconds: Mapping[str, float] | None = None
    device: str = ""

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        sparse = sum(conv.runs == "sparse" for conv in self.convolutions)
        times = "" if self.seconds is None else f", measured on {self.device}"
        return f"AccelerateReport({len(self.convolutions)} convolutions, {sparse} by patterns{times}; print it)"

    def to_text(self) -> str:
        """A table, one line a convolution."""
        rows = [("convolution", "kernel", "input", "kept", "runs", "why")]
        for conv in self.convolutions:
            runs = " ".join(word for word in (conv.runs, conv.backend, conv.layout) if word)
            kept = "" if conv.retained is None else f"{conv.retained:.1%}"
            kernel, image = ("x".join(map(str, shape)) for shape in (conv.kernel_shape, conv.image_shape))
            rows.append((conv.name or "(another kernel)", kernel, image, kept, runs, conv.why))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[5]]).rstrip() for row in rows]
        if self.seconds is not None:
            times = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in self.seconds.items())
            lines.append(f"measured on {self.device}: {times}")
        return "\n".join(lines)


class Accelerated:
    """A function like the one it was made of; made by `accelerate`."""

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        masks: Mapping[str, np.ndarray | None],
        *,
        backend: str | None = None,
        pruned: bool = False,
        at: tuple[str, ...] | None = None,
        wanted: Mapping[str, layers.Run] | None = None,
        seconds: Mapping[str, float] | None = None,
        device: str = "",
    ):
        functools.update_wrapper(self, apply_fn, updated=())
        self._apply_fn = apply_fn
        self._masks = masks
        self._backend = backend
        self._pruned = pruned
        self._at = at
        self._wanted = wanted or {}
        self._seconds, self._device = seconds, device
        self._planner = layers.Planner(backend)
        # A jitted function is one to be compiled as a whole; op by op, as it would be run here, it would crawl.
        is_jitted = hasattr(apply_fn, "lower") and hasattr(apply_fn, "trace")
        self._run = jax.jit(self._evaluate, static_argnums=0) if is_jitted else self._evaluate

    def __repr__(self) -> str:
        name = getattr(self._apply_fn, "__qualname__", repr(self._apply_fn))
        pruned = sum(mask is not None for mask in self._masks.values())
        backend = "" if self._backend is None else f", backend={self._backend!r}"
        return f"accelerate({name}, masks of {pruned} leaves{backend}; .report(*args) tells what runs how)"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; arguments and result are its own.

        Raises:
            ValueError: a mask meets no convolution, convolutions read a parameter from several places, the named
                backend cannot run a layer, or ``pruned`` was promised and concrete weights are not zero.
        """
        frame, arrays, modules = take_apart(args, kwargs)
        self._check_promise(frame, arrays)
        results, changed = self._run(frame, arrays)
        write_back(modules, changed)
        return results

    def report(self, *args: Any, **kwargs: Any) -> AccelerateReport:
        """How each convolution would run in a call; nothing is computed.

        Args:
            *args: of the function; arrays may be `jax.ShapeDtypeStruct`.
            **kwargs: of the function.

        Raises:
            ValueError: as the call.
        """
        rows = []
        for conv, site in self.met(*args, **kwargs):
            # What is computed from a leaf need not have its zeros.
            mask = None if conv.sources else self._masks.get(conv.name)
            rows.append(ConvolutionReport.of(conv.name, conv.kernel_shape, conv.x_shape, mask, site.plan))
        return AccelerateReport(tuple(rows), self._seconds, self._device)

    def tuned(
        self, *args: Any, within: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None, **kwargs: Any
    ) -> "Accelerated":
        """Measure the whole net on this device, dense and by patterns, and keep what is fastest.

        The answer is kept in the cache of `pallas_kernels.tuning`, per kind of device.

        Args:
            *args: of the function, concrete and of the shapes that matter.
            within: makes of the function what is to be timed, ``lambda f: jax.grad(lambda p, x: loss(f(p, x)))``
                for a training step; None times the function itself.
            **kwargs: of the function.

        Returns:
            The same function with another choice; all dense if nothing was faster.

        Raises:
            ValueError: as the call.
        """
        open_ended = self.with_choice({})
        sites = [
            (conv.name, site.layer, site.structure)
            for conv, site in open_ended.met(*args, **kwargs)
            if site.layer is not None
        ]

        def timed(choice: whole_net.Choice) -> tuple[Callable[[list[Any]], Any], list[Any]]:
            function = open_ended.with_choice(choice)
            return _of_arrays(function if within is None else within(function), args, kwargs)

        def compiled(choice: whole_net.Choice) -> Callable[[], Any]:
            function, arrays = timed(choice)
            program = jax.jit(function)
            return lambda: program(arrays)

        # What is timed, as text: it tells the net, the shapes and what it stands within.
        facts = {"whole net": whole_net.digest(*timed(dict.fromkeys((name for name, _, _ in sites), "dense")))}
        return self.with_choice(*whole_net.tune(sites, compiled, facts, self._backend))

    def with_choice(
        self, wanted: Mapping[str, layers.Run], seconds: Mapping[str, float] | None = None, device: str = ""
    ) -> "Accelerated":
        """The same function with layers run as told, ``{name: one of layers.RUNS}``; others choose themselves.

        Raises:
            ValueError: a name that the masks' tree has not, or an unknown way to run.
        """
        for name, run in wanted.items():
            if name not in self._masks or run not in layers.RUNS:
                raise ValueError(
                    f"choice {name!r}: {run!r}; expected a name of the masks' tree, and one of {', '.join(layers.RUNS)}"
                )
        return Accelerated(
            self._apply_fn,
            self._masks,
            backend=self._backend,
            pruned=self._pruned,
            at=self._at,
            wanted=wanted,
            seconds=seconds,
            device=device,
        )

    def met(self, *args: Any, **kwargs: Any) -> list[tuple[interception.Convolution, layers.Site]]:
        """The convolutions of a call, in order, and how each runs."""
        frame, arrays, _ = take_apart(args, kwargs)
        self._check_promise(frame, arrays)
        seen: list = []
        jax.eval_shape(lambda arrays: self._evaluate(frame, arrays, seen), arrays)
        return seen

    def _evaluate(self, frame: Frame, arrays: list[Any], seen: list | None = None) -> tuple[Any, dict]:
        """The results, and ``{path: value}`` of the variables of NNX modules that changed."""
        closed, shapes, changed_paths = self._traced(frame, arrays)
        names = self._names(frame, arrays, closed)
        arguments = [
            interception.Kernel(name, array, self._masks.get(name), is_pruned=self._pruned) if name else array
            for name, array in zip(names, arrays)
        ]
        seen = [] if seen is None else seen
        leaves, met = interception.run(closed, arguments, functools.partial(self._replace, seen))
        self._check_met(met, seen, frame.paths)
        results, changed = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        return results, dict(zip(changed_paths, changed))

    def _traced(self, frame: Frame, arrays: list[Any]) -> tuple[Any, Any, list]:
        """``(closed jaxpr, shapes of the results, paths of the variables of NNX modules that changed)``."""
        changed_paths: list = []

        def call(arrays: list[Any]) -> tuple[Any, list[Any]]:
            args, kwargs, modules = frame.join(arrays)
            before = state_of(modules)
            results = self._apply_fn(*args, **kwargs)
            changed = {path: leaf for path, leaf in state_of(modules).items() if leaf is not before.get(path)}
            changed_paths.extend(changed)
            return results, list(changed.values())

        return *traced(call, arrays), changed_paths

    def _names(self, frame: Frame, arrays: list[Any], closed: Any = None) -> list[str]:
        def read(places: Mapping[int, str]) -> set[str]:
            jaxpr = self._traced(frame, arrays)[0] if closed is None else closed
            return interception.read_by_convolutions(jaxpr, arrays, places)

        return parameter_names(frame.paths, [np.shape(array) for array in arrays], self._masks, read, self._at)

    def _check_promise(self, frame: Frame, arrays: list[Any]) -> None:
        if not self._pruned:
            return
        for name, array in zip(self._names(frame, arrays), arrays):
            check_zeros({name: array}, self._masks, "leave pruned=True out: accelerate then masks them in each call")

    def _replace(self, seen: list, conv: interception.Convolution, x: Any) -> Any:
        site = self._planner(conv, self._wanted.get(conv.name))
        kernel = conv.take_kernel()  # what is seen outlives the trace
        seen.append((conv, site))
        if site.plan.run == "dense" and not site.plan.backend:
            return None
        assert kernel is not None and site.layer is not None  # without either it is dense as it was traced
        weights = kernel.masked() if site.plan.run == "dense" else kernel.value
        layer = site.layer

        def by_layer(x: Any, kernel: Any) -> Any:
            return layer.convolve(reverse_only(x), reverse_only(kernel), site.structure, site.plan)

        convolve: Callable[..., Any] = by_layer
        mesh = getattr(conv.sharding, "mesh", None)
        types = {} if mesh is None else dict(zip(mesh.axis_names, mesh.axis_types))
        explicit = tuple(name for name, kind in types.items() if kind == jax.sharding.AxisType.Explicit)
        if explicit:
            # Shardings are part of types there, and not every operation of the kernels' says that of its result.
            convolve = jax.sharding.auto_axes(convolve, axes=explicit, out_sharding=conv.sharding)
        return convolve(x, weights)

    def _check_met(self, met: Mapping[str, bool], seen: list, paths: Sequence[str]) -> None:
        masked = [name for name, mask in self._masks.items() if mask is not None and not mask.all()]
        computed = [name for name in masked if met.get(name) is False]
        if computed:
            more = f" (and {len(computed) - 1} more)" if len(computed) > 1 else ""
            warnings.warn(
                f"masks: {computed[0]!r}{more} is pruned, but a convolution's kernel is computed from it: the zeros of "
                "the leaf need not be zeros of that kernel, which runs dense. Prune what the convolution takes, or "
                "leave the layer out",
                stacklevel=2,
            )
        missed = [name for name in masked if name not in met]
        if not missed:
            return
        name, shape = missed[0], getattr(self._masks[missed[0]], "shape", ())
        where, advice = "no argument has it", "Parameters must be passed in a call, not closed over"
        if any(f"/{path}".endswith(f"/{name}") for path in paths):
            where = "it is among the arguments, but no convolution takes it"
            advice = "Kernels of convolutions alone are run by patterns: give None for others"
        found = [f"{conv.name or 'another kernel'} {conv.kernel_shape}" for conv, _ in seen]
        raise ValueError(
            f"masks: {name!r} {shape} meets no convolution ({where}); so do {len(missed) - 1} more. "
            f"Convolutions found: {', '.join(found) or 'none'}. {advice}"
        )


def accelerate(
    apply_fn: Callable[..., Any],
    masks: Masks | Tree,
    *,
    backend: str | None = None,
    pruned: bool = False,
    at: str | Sequence[str] | None = None,
) -> Accelerated:
    """Run the pruned convolutions of a net by their patterns, without a change to its code.

    The function is traced when it is called. Convolutions whose kernels are parameters with a mask (cast, transposed,
    reshaped, flipped, scaled, or made by steps that keep zeros, as fake quantisation does) are run by
    `pallas_kernels.pattern_conv`; all else stays. Grouped, dilated, transposed and one- or three-dimensional
    convolutions, and those whose kernel is computed from a leaf otherwise (with a warning), stay dense; those inside of
    loops and branches too. The result is that of the function on ``apply_masks(params, masks)``. Call it under
    `jax.jit`; it may be vmapped and differentiated, in reverse mode, as often as wanted (differentiate the accelerated
    function, do not accelerate a gradient): `jax.jvp` and `jax.hessian` want the net itself, on masked parameters.

    Args:
        apply_fn: any function that jax can trace, such as linen's ``model.apply``, one that takes an ``nnx.Module`` or
            merges a state: ``lambda model, x: model(x)``. The parameters must be among its arguments. Arguments that
            are no arrays (``train=True``) are static.
        masks: `Masks` of the parameters, or one tree of bool arrays and None; concrete.
        backend: of `pallas_kernels.pattern_conv`: one that is named runs every pruned layer, or is refused; None
            takes what is best for each.
        pruned: promise that the parameters passed have exact zeros where the masks remove, as they have after the
            prune (concrete ones are looked at). Layers that run dense then cost nothing extra; their gradients are not
            masked.
        at: where the arguments hold the parameters that the masks are of, ``"0/params"`` for ``params`` in the first
            argument, a keyword's name, "module 0" for an NNX module; several where several copies are pruned. None
            takes what convolutions read, and refuses where they read a parameter from several places.

    Returns:
        An `Accelerated`, called as ``apply_fn`` is. ``.report(*args)`` tells what runs how, ``.tuned(*args)`` gives
        one whose choices are measured.

    Raises:
        ValueError: a mask that is traced or not bool; no mask at all; a module in place of a function.
    """
    check_function(apply_fn)
    places = None if at is None else (at,) if isinstance(at, str) else tuple(at)
    return Accelerated(apply_fn, concrete_masks(masks), backend=backend, pruned=pruned, at=places)


def _of_arrays(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Callable, list[Any]]:
    """``(function of arrays, arrays)``: a call without its static arguments and modules."""
    frame, arrays, _ = take_apart(args, kwargs)

    def call(arrays: list[Any]) -> list[Any]:
        args, kwargs, _ = frame.join(arrays)
        # What is no array (a gradient in the form of a module's state is one of arrays) cannot leave a jit.
        return [leaf for leaf in jax.tree.leaves(function(*args, **kwargs)) if hasattr(leaf, "dtype")]

    return call, arrays


def concrete_masks(masks: Masks | Tree) -> dict[str, np.ndarray | None]:
    """``{leaf name: bool array, or None}`` of `Masks` or of one tree.

    Raises:
        ValueError: a mask that is traced or not bool; no mask at all.
    """
    named = {name: None if leaf is None else _concrete(name, leaf) for name, leaf in named_leaves(combine(masks))}
    if not any(mask is not None for mask in named.values()):
        raise ValueError("masks: no leaf has a mask; expected Masks such as masks_of(opt_state)")
    return named


def _concrete(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"masks: {name!r} is traced; the structure is made from values: call accelerate outside jit")
    mask = np.asarray(leaf)
    if mask.dtype != bool:
        raise ValueError(f"masks: {name!r} is {mask.dtype} {mask.shape}, expected bool, as of masks_of(opt_state)")
    return mask
