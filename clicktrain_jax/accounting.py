"""How many weights and multiply-adds a pruned net keeps: plain data, no arrays.

"Conv" counts every leaf that is pruned or looks like a convolution's kernel (`clicktrain_jax.plan.convolutions`), first
convolution and shortcuts included; "model" counts all leaves (BatchNorm scale and bias are parameters, its statistics
are not). Retained is what the masks keep and, between the selection and the prune, what they mark and is not yet zero;
a weight that the masks keep counts, whatever its value. Of parameters without values the masks alone are counted.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.masks import Masks, layers_for
from clicktrain_jax.plan.convolutions import Axes, check_axes, convolutions, in_hwio
from clicktrain_jax.trees import Tree, named_leaves


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One leaf: sizes in weights, work in multiply-adds for one image (None when its output size is unknown).

    Attributes:
        name: the leaf's name.
        shape: its shape, in its own layout.
        pruned: whether it has a mask.
        weights: how many there are.
        retained: of those, the ones that the masks keep, and the marked ones.
        kernels_removed: by the masks.
        multiply_adds: for one image.
        retained_multiply_adds: of those, the ones with retained weights.
        marked: weights that the masks remove and that are not zero.
        kernels: (input channel, filter) pairs of a convolution; 0 for other leaves.
    """

    name: str
    shape: tuple[int, ...]
    pruned: bool
    weights: int
    retained: int
    kernels_removed: int
    multiply_adds: int | None = None
    retained_multiply_adds: int | None = None
    marked: int = 0
    kernels: int = 0

    @property
    def is_conv(self) -> bool:
        """True for what is pruned, or looks like a convolution's kernel."""
        return self.kernels > 0

    @property
    def compression(self) -> float:
        """Weights / retained ones."""
        return _ratio(self.weights, self.retained)


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """All leaves, and totals over them.

    Attributes:
        layers: one a leaf, in the order of the tree.
        pending: whether the masks are of a run that has selected and not pruned.
    """

    layers: tuple[LayerReport, ...]
    pending: bool = False

    def _total(self, field: str, layers: list[LayerReport]) -> int:
        return sum(getattr(layer, field) or 0 for layer in layers)

    @property
    def convs(self) -> list[LayerReport]:
        """The convolutions, first one and shortcuts included."""
        return [layer for layer in self.layers if layer.is_conv]

    @property
    def conv_weights(self) -> int:
        """Weights of all convolutions."""
        return self._total("weights", self.convs)

    @property
    def conv_retained(self) -> int:
        """Of those, the retained ones."""
        return self._total("retained", self.convs)

    @property
    def conv_compression(self) -> float:
        """All convolution weights / retained ones."""
        return _ratio(self.conv_weights, self.conv_retained)

    @property
    def pruned_layers_compression(self) -> float:
        """The same over the pruned layers alone."""
        pruned = [layer for layer in self.layers if layer.pruned]
        return _ratio(self._total("weights", pruned), self._total("retained", pruned))

    @property
    def model_weights(self) -> int:
        """All trained parameters."""
        return self._total("weights", list(self.layers))

    @property
    def model_retained(self) -> int:
        """Of those, the retained ones."""
        return self._total("retained", list(self.layers))

    @property
    def model_compression(self) -> float:
        """All trained parameters / retained ones."""
        return _ratio(self.model_weights, self.model_retained)

    @property
    def marked(self) -> int:
        """Weights that the masks remove and that are not zero: none of them is left once they are pruned."""
        return self._total("marked", list(self.layers))

    @property
    def promised_conv_compression(self) -> float:
        """`conv_compression` once what is marked is zero."""
        return _ratio(self.conv_weights, self.conv_retained - self.pending * self._total("marked", self.convs))

    @property
    def promised_model_compression(self) -> float:
        """`model_compression` once what is marked is zero."""
        return _ratio(self.model_weights, self.model_retained - self.pending * self.marked)

    @property
    def multiply_adds(self) -> int:
        """Of the leaves whose output size is known, for one image."""
        return self._total("multiply_adds", list(self.layers))

    @property
    def retained_multiply_adds(self) -> int:
        """Of those, the ones with retained weights."""
        return self._total("retained_multiply_adds", list(self.layers))

    def compression_without(self, excluded: str) -> float:
        """Conv compression without layers whose name contains ``excluded``: the authors leave shortcuts out."""
        layers = [layer for layer in self.convs if excluded not in layer.name]
        return _ratio(self._total("weights", layers), self._total("retained", layers))

    def to_text(self) -> str:
        """A table for people: the convolutions, what was removed of each, then the totals."""
        rows = [f"{'layer':<36}{'shape':<20}{'kernels gone':>14}{'weights':>12}{'retained':>12}{'ratio':>8}"]
        for layer in self.convs:
            gone = f"{100 * layer.kernels_removed / layer.kernels:.1f}%" if layer.pruned else "dense"
            rows.append(
                f"{layer.name:<36}{'x'.join(map(str, layer.shape)):<20}{gone:>14}{layer.weights:>12,}"
                f"{layer.retained:>12,}{layer.compression:>7.2f}x"
            )
        for what, weights, retained, ratio in (
            ("all convolutions", self.conv_weights, self.conv_retained, self.conv_compression),
            ("whole model", self.model_weights, self.model_retained, self.model_compression),
        ):
            rows.append(f"{what:<70}{weights:>12,}{retained:>12,}{ratio:>7.2f}x")
        if self.marked:
            counted = "; they count as removed"
            if self.pending:
                counted = (
                    f"; without them {self.promised_conv_compression:.2f}x over all convolutions, "
                    f"{self.promised_model_compression:.2f}x over the whole model"
                )
            rows.append(f"marked, not yet zero: {self.marked:,} weights{counted}")
        return "\n".join(rows)

    __str__ = to_text

    def __repr__(self) -> str:
        marked = f", {self.marked} weights marked, not yet zero" * bool(self.marked)
        return (
            f"Report({len(self.convs)} convolutions {self.conv_compression:.2f}x, "
            f"{len(self.layers)} leaves {self.model_compression:.2f}x{marked})"
        )


def report(
    params: Tree,
    masks: Masks | None,
    *,
    output_sizes: Mapping[str, tuple[int, int]] | None = None,
    axes: Axes | None = None,
) -> Report:
    """Count weights, retained weights and multiply-adds.

    Args:
        params: the parameter tree: arrays, or ``jax.ShapeDtypeStruct`` for what the masks promise.
        masks: concrete `Masks` of that tree, or of a part of it; None for a dense net.
        output_sizes: ``{leaf name: (height, width)}`` of what each kernel computes; the models of this package
            supply them (`clicktrain_jax.models.output_sizes`). Other leaves get no multiply-adds.
        axes: the layout of the kernels, "HWIO" or "OIHW"; None goes by their shapes.

    Returns:
        A `Report`. Weights that are marked and not yet zero stand in ``marked``. Where a run has marked them and not
        pruned (``masks.pending``, of `masks_of`) its compressions are those of the weights and they count as retained;
        masks that are handed in count as applied.

    Raises:
        ValueError: masks of another tree; output sizes for names that are no leaves.
    """
    check_axes(axes)
    sizes = dict(output_sizes or {})
    masked, pending = layers_for(params, masks), getattr(masks, "pending", False)
    shapes = {name: tuple(jnp.shape(leaf)) for name, leaf in named_leaves(params) if leaf is not None}
    hwio = in_hwio(shapes, axes)
    looks = {name for name, doubt in convolutions(hwio).items() if doubt is None}
    layers: list[LayerReport] = []
    for name, leaf in named_leaves(params):
        if leaf is None:
            continue
        shape = tuple(int(size) for size in jnp.shape(leaf))
        weights = math.prod(shape)
        kernels = math.prod(hwio[name][2:]) if name in looks or name in masked else 0
        retained, removed, marked = weights, 0, 0
        if name in masked:
            mask = jax.device_get(masked[name]).full()
            keep = np.asarray(mask.combined())
            if not isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.Tracer)):
                marked = int(np.count_nonzero(np.asarray(jax.device_get(leaf))[~keep]))
            retained = int(keep.sum()) + pending * marked
            # All taps of a kernel go together.
            removed = 0 if mask.kernel is None else int((~np.asarray(mask.kernel)).sum()) * kernels // weights
        positions = math.prod(sizes.pop(name)) if name in sizes else None
        layers.append(
            LayerReport(
                name=name,
                shape=shape,
                pruned=name in masked,
                weights=weights,
                retained=retained,
                kernels_removed=removed,
                multiply_adds=None if positions is None else positions * weights,
                retained_multiply_adds=None if positions is None else positions * retained,
                marked=marked,
                kernels=kernels,
            )
        )
    if sizes:
        raise ValueError(f"output_sizes names {next(iter(sizes))!r}, which is no leaf of params")
    return Report(tuple(layers), pending)


def _ratio(total: int, retained: int) -> float:
    return total / retained if retained else math.inf
