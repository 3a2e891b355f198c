"""A pruned net for inference: BatchNorm folded, weights laid out once as they are read, one compiled program a batch.

How each convolution runs, dense or by its pattern, is an estimate until `InferenceNet.tuned` has measured the whole net
for a batch size on this device; what it finds is kept for other processes.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy import chains, layers, whole_net
from clicktrain_jax.deploy.accelerate import AccelerateReport, ConvolutionReport
from clicktrain_jax.deploy.fold import Folded, plain
from clicktrain_jax.deploy.interception import Convolution, Kernel
from clicktrain_jax.deploy.steps import ConvStep, Steps
from clicktrain_jax.jaxprs import as_numpy, bind


class Net(Protocol):
    """What `load` returns: called with images, it gives logits."""

    manifest: Mapping[str, Any]

    def __call__(self, images: Any) -> jax.Array:
        """uint8 or floating (batch, height, width, channels) -> float32 (batch, classes)."""
        ...


@dataclasses.dataclass(frozen=True)
class Site:
    """One convolution of a net for images of one batch size.

    Attributes:
        step: of the folded net.
        layer: with its mask; None where it can only be dense as it was traced.
        structure: `pallas_kernels.Structure` of the mask; None where nothing is removed.
        plan: how it runs.
    """

    step: ConvStep
    layer: layers.Layer | None
    structure: Any
    plan: layers.Plan

    def run(self, images: Any, prepared: Any, structure: Any = None, bias: Any = None) -> Any:
        """The step's result, from what `InferenceNet.prepared` holds for it and its bias (filters,), if it has one."""
        if self.layer is None:
            return plain(self.step, images, prepared, bias)
        if self.plan.backend != "cpu":
            structure = self.structure if structure is None else structure
            y = self.layer.convolve_prepared(images, prepared, structure, self.plan)
        elif self.step.dtype == images.dtype:
            more = {"bias": bias, "relu": self.step.relu}
            return self.layer.convolve_prepared(images, prepared, self.structure, self.plan, **more)
        else:
            y = self.layer.convolve_prepared(images, prepared, self.structure, self.plan)
        return self.step.finished(y, bias)


class InferenceNet:
    """A net with fixed weights, called with images; made by `clicktrain_jax.load`.

    Attributes:
        folded: the dense net, BatchNorm folded: `Folded.function` takes its arrays and images in [0, 1].
        manifest: of the export; empty without one.
    """

    def __init__(
        self,
        folded: Folded,
        masks: Mapping[str, np.ndarray],
        *,
        normalises: bool,
        identity: str,
        manifest: Mapping[str, Any] | None = None,
        backend: str | None = None,
        choices: Mapping[int, tuple[whole_net.Choice, dict[str, float], str]] | None = None,
    ) -> None:
        """Made by `clicktrain_jax.load`.

        Args:
            folded: the net.
            masks: bool arrays by the name of the leaf.
            normalises: whether images are pixels, uint8 or in [0, 1].
            identity: tells this net from others in the cache of measurements.
            manifest: of the export.
            backend: of `pallas_kernels.pattern_conv` for all pruned layers; None leaves it open.
            choices: ``(choice, seconds, device)`` by batch size, as measured.
        """
        self.folded, self.manifest = folded, manifest or {}
        self._masks, self._normalises, self._identity, self._backend = masks, normalises, identity, backend
        self._choices = dict(choices or {})
        self._kernels = {name: as_numpy(array) for name, array in folded.arrays.items()}
        self._planner = layers.Planner(backend)
        self._prepared: dict[Any, Any] = {}
        self._programs: dict[Any, Any] = {}

    @property
    def image_dtype(self) -> Any:
        """Of images that need no conversion before: uint8 where the net normalises, else float32."""
        return np.dtype(np.uint8 if self._normalises else np.float32)

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.folded.image_shape))
        return (
            f"InferenceNet({len(self.folded.steps(1).convolutions)} convolutions, {len(self._masks)} with masks, "
            f"{self.image_dtype} images {sizes}; .report(batch) tells what runs how)"
        )

    def __call__(self, images: Any) -> jax.Array:
        """Classify images.

        Args:
            images: (batch, height, width, channels): uint8, or floating in [0, 1]; what the net's own function takes
                where the export has no normalisation. The program is compiled at the first call of each batch size.

        Returns:
            float32 logits (batch, classes).

        Raises:
            ValueError: images of another shape or dtype, or values outside [0, 1].
        """
        images = self._checked(images)
        key = (images.shape[0], images.dtype)
        if key not in self._programs:
            self._programs[key] = self.program(images.shape[0])
        function, prepared = self._programs[key]
        return function(prepared, images)

    def program(self, batch: int, choice: whole_net.Choice | None = None) -> tuple[Any, Any]:
        """``(function, prepared)``: the jitted ``function(prepared, images)`` for a batch size.

        Args:
            batch: number of images.
            choice: how layers run, by name; None for what was measured, or else estimated.
        """
        import pallas_kernels

        sites = self._sites(batch, self._choice(batch) if choice is None else choice)
        dtypes = (np.dtype(site.step.dtype) for site in sites.values())
        shortest = min(dtypes, key=lambda dtype: dtype.itemsize, default=np.float32)
        options = pallas_kernels.compiler_options(shortest)
        steps, more = chains.chained(self.folded.steps(batch), sites)
        function = jax.jit(self._function(steps, sites), compiler_options=options)
        prepared, read = self.prepared(sites, more), steps.arrays
        # A linear layer's weights are packed in a chain: their own form stays behind.
        prepared["arrays"] = {name: array for name, array in prepared["arrays"].items() if name in read}
        return function, jax.device_put(prepared)

    def portable(self, batch: Any) -> tuple[Any, Any]:
        """As `program`, not compiled, of operations that run anywhere.

        Args:
            batch: may be symbolic (`jax.export.symbolic_shape`).
        """
        sites = self._sites(batch, None)
        return self._function(self.folded.steps(batch), sites), self.prepared(sites)

    def prepared(self, sites: Mapping[str, Site], more: Mapping[str, tuple[str, Any]] | None = None) -> dict[str, Any]:
        """The arrays of the net, each kernel as its convolution reads it, and the structures.

        Args:
            sites: the convolutions.
            more: arrays of `chains.chained`.
        """
        import pallas_kernels

        arrays = dict(self._kernels)
        structures = {}
        for name, site in sites.items():
            if site.layer is None:
                continue
            key = (name, site.plan.run, site.plan.backend)
            if key not in self._prepared:
                self._prepared[key] = site.layer.prepared(self._kernels[name], site.structure, site.plan)
            arrays[name] = self._prepared[key]
            # The native kernels find the lists in what was packed, and a GPU's work is dealt by lists that are known.
            if site.plan.run != "dense" and site.plan.backend not in ("cpu", "mosaic_gpu"):
                structures[name] = site.structure
        for name, (own, structure) in (more or {}).items():
            if name not in self._prepared:
                kernel = self._kernels[own].reshape(structure.shape)
                self._prepared[name] = pallas_kernels.pack(kernel, structure, backend="cpu")
            arrays[name] = self._prepared[name]
        return {"arrays": arrays, "structures": structures}

    def convolutions(self, batch: int) -> tuple[Site, ...]:
        """The convolutions for a batch size, in order, as they run."""
        return tuple(self._sites(batch, self._choice(batch)).values())

    def ways(self, batch: int) -> dict[str, dict[str, Site]]:
        """The convolutions that have a choice, by kernel name, in each way in which they can run."""
        steps = {step.name: step for step in self.folded.steps(batch).convolutions}
        return {
            name: {run: self._site(steps[name], run) for run in layers.can_run(layer, structure, self._backend)}
            for name, layer, structure in self._tunable(batch)
        }

    def tuned(self, batch: Any, images: Any = None) -> "InferenceNet":
        """Measure the whole net on this device, dense and by patterns, and keep what is fastest.

        Args:
            batch: number of images a call, or the images; or, as for `Accelerated.tuned`, the variables, which are not
                looked at: the net has its own.
            images: where ``batch`` is the variables.

        Returns:
            The same net; the choice for other batch sizes stays. What was measured before is taken from the cache.

        Raises:
            ValueError: no number above 0, and no images of the net's.
        """
        batch = self._count(batch, images)
        rng = np.random.default_rng(0)
        images = jax.device_put(rng.random((batch, *self.folded.image_shape), np.float32))

        def compiled(choice: whole_net.Choice) -> Any:
            function, prepared = self.program(batch, choice)
            return lambda: function(prepared, images)

        found = whole_net.tune(self._tunable(batch), compiled, self._facts(batch), self._backend)
        return self._with_choices({**self._choices, batch: found})

    def with_choice(self, batch: int, choice: whole_net.Choice) -> "InferenceNet":
        """The same net with layers run as told for a batch size: ``{kernel name: one of layers.RUNS}``.

        Raises:
            ValueError: a name that is no convolution with a choice, or a way in which that cannot run.
        """
        known = {name: structure for name, _, structure in self._tunable(batch)}
        for name, run in choice.items():
            runs = layers.DENSE_RUNS if known.get(name) is None else layers.RUNS
            if name not in known or run not in runs:
                raise ValueError(
                    f"choice {name!r}: {run!r}; expected one of {sorted(known)}, and one of {', '.join(runs)}"
                )
        return self._with_choices({**self._choices, batch: (dict(choice), {}, "")})

    def dense(self, batch: int, backend: str | None = None) -> "InferenceNet":
        """The same net with every convolution dense for a batch size: what patterns must beat.

        Args:
            batch: number of images.
            backend: "xla" for XLA's convolutions, "cpu" for the native kernels, None for the native ones where they are
                fast here.

        Raises:
            ValueError: another backend; the native kernels cannot do it.
        """
        runs: dict[str, layers.Run] = {"xla": "dense", "cpu": "dense cpu"}
        if backend not in (None, *runs):
            raise ValueError(f"dense by backend 'xla', 'cpu' or None for the faster, got {backend!r}")
        choice: whole_net.Choice = {
            name: runs[backend or ("cpu" if layer.is_fast_natively() else "xla")]
            for name, layer, _ in self._tunable(batch)
        }
        net = self.with_choice(batch, choice)
        net.convolutions(batch)  # refuses what cannot be
        return net

    def report(self, batch: Any, images: Any = None) -> AccelerateReport:
        """How each convolution runs for a batch size, or for these images, and what was measured; as `tuned`."""
        batch = self._count(batch, images)
        rows = []
        for site in self.convolutions(batch):
            step, mask = site.step, self._masks.get(site.step.leaf)
            kernel_shape = step.equation.invars[1].aval.shape
            rows.append(ConvolutionReport.of(step.name, kernel_shape, step.images.aval.shape, mask, site.plan))
        _, seconds, device = self._choices.get(batch, ({}, {}, ""))
        return AccelerateReport(tuple(rows), seconds or None, device)

    def _with_choices(self, choices: Mapping[int, Any]) -> "InferenceNet":
        net = InferenceNet(
            self.folded,
            self._masks,
            normalises=self._normalises,
            identity=self._identity,
            manifest=self.manifest,
            backend=self._backend,
            choices=choices,
        )
        net._kernels, net._planner, net._prepared = self._kernels, self._planner, self._prepared
        return net

    def _count(self, batch: Any, images: Any) -> int:
        """A number of images, given itself, as images, or as images behind variables."""
        given = batch if images is None else images
        if isinstance(given, numbers.Integral) and not isinstance(given, bool) and int(given) > 0:
            return int(given)
        shape = tuple(getattr(given, "shape", ()))
        if len(shape) != 4 or shape[1:] != self.folded.image_shape or shape[0] < 1:
            sizes = ", ".join(map(str, self.folded.image_shape))
            what = f"an array {shape}" if shape else type(given).__name__
            raise ValueError(
                f"expected a number of images, or images (batch, {sizes}), alone or behind the variables; got {what}"
            )
        return shape[0]

    def _choice(self, batch: int) -> whole_net.Choice:
        if batch not in self._choices:
            found = whole_net.cached(self._tunable(batch), self._facts(batch), self._backend)
            self._choices[batch] = found or ({}, {}, "")
        return self._choices[batch][0]

    def _facts(self, batch: int) -> dict[str, Any]:
        return {"inference net": self._identity, "batch": batch, "chains": 2}

    def _tunable(self, batch: int) -> list[whole_net.Site]:
        sites = self._sites(batch, {})
        return [(name, s.layer, s.structure) for name, s in sites.items() if s.layer is not None]

    def _sites(self, batch: Any, choice: Mapping[str, Any] | None) -> dict[str, Site]:
        """The convolutions by kernel name; portable ones for a choice of None."""
        steps = self.folded.steps(batch).convolutions
        return {step.name: self._site(step, choice if choice is None else choice.get(step.name, "")) for step in steps}

    def _site(self, step: ConvStep, wanted: Any) -> Site:
        mask = self._masks.get(step.leaf)
        convolution = Convolution(step.equation, (step.name,), kernel=Kernel(step.name, None, mask, step.moves))
        settings = {"is_portable": True} if wanted is None else {"is_prepared": True}
        return Site(step, *self._planner(convolution, wanted or None, **settings))

    def _function(self, steps: Steps, sites: Mapping[str, Site]) -> Any:
        def compute(equation: Any, operands: list[Any]) -> Any:
            return equation(operands) if isinstance(equation, chains.Chained) else bind(equation, operands)

        def logits(prepared: Mapping[str, Any], images: Any) -> Any:
            if images.dtype == jnp.uint8:
                images = images.astype(jnp.float32) / 255.0
            structures = prepared["structures"]

            def convolve(step: ConvStep, x: Any, kernel: Any, bias: Any) -> Any:
                return sites[step.name].run(x, kernel, structures.get(step.name), bias)

            return steps.run(prepared["arrays"], images, convolve, compute).astype(jnp.float32)

        return logits

    def _checked(self, images: Any) -> Any:
        shape, dtype = np.shape(images), getattr(images, "dtype", None)
        if len(shape) != 4 or shape[1:] != self.folded.image_shape or shape[0] < 1:
            expected = ", ".join(map(str, self.folded.image_shape))
            raise ValueError(f"images have shape {shape}; expected (batch, {expected}), batch 1 or more")
        if dtype == np.uint8 and self._normalises:
            return images
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            wanted = "uint8, or floating in [0, 1]" if self._normalises else "floating, as the net's function takes it"
            raise ValueError(f"images are {dtype}; expected {wanted}")
        if self._normalises and _is_on_host(images):
            host = np.asarray(images)
            low, high = float(host.min()), float(host.max())
            if not -0.01 <= low <= high <= 1.01:
                raise ValueError(
                    f"floating images range from {low:.3g} to {high:.3g}; expected pixels in [0, 1]: divide 0..255 by "
                    "255, and do not normalise, the net does"
                )
        return images if dtype == np.float32 else images.astype(np.float32)


def _is_on_host(images: Any) -> bool:
    """Whether looking at the values costs no transfer."""
    if isinstance(images, jax.core.Tracer):
        return False
    return not isinstance(images, jax.Array) or all(device.platform == "cpu" for device in images.devices())
