"""How many weights and multiply-adds a pruned net keeps: plain data, no arrays.

"Conv" counts every 4-D leaf, first convolution and shortcuts included; "model" counts all leaves (BatchNorm
scale and bias are parameters, its statistics are not). Retained counts come from the masks, not from zeros.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from clicktrain_jax.masks import Masks, layers_for
from clicktrain_jax.trees import Tree, is_kernel_shape, named_leaves


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One leaf: sizes in weights, work in multiply-adds for one image (None when its output size is unknown)."""

    name: str
    shape: tuple[int, ...]
    pruned: bool
    weights: int
    retained: int
    kernels_removed: int
    multiply_adds: int | None = None
    retained_multiply_adds: int | None = None

    @property
    def is_conv(self) -> bool:
        """True for a 4-D kernel."""
        return is_kernel_shape(self.shape)

    @property
    def compression(self) -> float:
        """Weights / retained ones."""
        return _ratio(self.weights, self.retained)


@dataclasses.dataclass(frozen=True)
class Report:
    """All leaves, and totals over them."""

    layers: tuple[LayerReport, ...]

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
            kernels = math.prod(layer.shape[2:])
            gone = f"{100 * layer.kernels_removed / kernels:.1f}%" if layer.pruned else "dense"
            rows.append(
                f"{layer.name:<36}{'x'.join(map(str, layer.shape)):<20}{gone:>14}{layer.weights:>12,}"
                f"{layer.retained:>12,}{layer.compression:>7.2f}x"
            )
        for what, weights, retained, ratio in (
            ("all convolutions", self.conv_weights, self.conv_retained, self.conv_compression),
            ("whole model", self.model_weights, self.model_retained, self.model_compression),
        ):
            rows.append(f"{what:<70}{weights:>12,}{retained:>12,}{ratio:>7.2f}x")
        return "\n".join(rows)


def report(
    params: Tree, masks: Masks | None, *, output_sizes: Mapping[str, tuple[int, int]] | None = None
) -> Report:
    """Count weights, retained weights and multiply-adds.

    Args:
        params: the parameter tree (arrays or ``jax.ShapeDtypeStruct``).
        masks: concrete `Masks` of that tree, or of a part of it; None for a dense net.
        output_sizes: ``{leaf name: (height, width)}`` of what each kernel computes; the models of this package
            supply them (`clicktrain_jax.models.output_sizes`). Other leaves get no multiply-adds.

    Returns:
        A `Report`.

    Raises:
        ValueError: masks of another tree; output sizes for names that are no leaves.
    """
    sizes = dict(output_sizes or {})
    masked = layers_for(params, masks)
    layers: list[LayerReport] = []
    for name, leaf in named_leaves(params):
        if leaf is None:
            continue
        shape = tuple(int(size) for size in jnp.shape(leaf))
        weights = math.prod(shape)
        retained, removed = weights, 0
        if name in masked:
            mask = masked[name].full()
            retained = int(np.asarray(mask.combined()).sum())
            removed = 0 if mask.kernel is None else int((~np.asarray(mask.kernel)[0, 0]).sum())
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
            )
        )
    if sizes:
        raise ValueError(f"output_sizes names {next(iter(sizes))!r}, which is no leaf of params")
    return Report(tuple(layers))


def _ratio(total: int, retained: int) -> float:
    return total / retained if retained else math.inf
