"""The plan of one layer: what goes of it, and in what shapes."""

import dataclasses
import math
import warnings
from typing import Any

from clicktrain_jax.latency import LayerTime
from clicktrain_jax.plan.convolutions import FROM_HWIO, TO_HWIO, Axes, permuted


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What happens to one convolution.

    Attributes:
        name: the leaf's name, ``"Conv_1/kernel"``.
        shape: its (kh, kw, cin, cout), whatever the layout of the leaf.
        fraction: share of its units of removal to remove, in [0, 1); None when the plan's target decides.
        tile: (filters, channels) that share one pattern (with ``superset``: that share a superset).
        removal_tile: (filters, channels) that are removed together: the unit of removal.
        entries: taps that a generated pattern keeps.
        superset: taps that a whole tile may use, each kernel having its own pattern among them; None for off.
        quads: patterns of 4 neighbouring input channels are chosen jointly, at most two of them using any tap.
        removal_score: units compete by their "whole" score, or by what is "retained" under their pattern.
        removal_scope: where the same share goes: the "layer", each "filter" (tile of filters), each pattern "tile".
        floor: no filter and no input channel is emptied.
        cost: what one weight counts for the plan's target: 1, or the number of places it is applied at.
        whole_kernels: whole kernels are removed and no patterns chosen, as in 1x1 layers: each keeps all its taps.
        axes: the leaf's own layout. Masks have it, and scores are taken in it.
        times: its seconds by what it retains, where the plan's target is time.
    """

    name: str
    shape: tuple[int, int, int, int]
    fraction: float | None
    tile: tuple[int, int] = (1, 1)
    removal_tile: tuple[int, int] = (1, 1)
    entries: int = 4
    superset: int | None = None
    quads: bool = False
    removal_score: str = "whole"
    removal_scope: str = "layer"
    floor: bool = False
    cost: int = 1
    whole_kernels: bool = False
    axes: Axes = "HWIO"
    times: LayerTime | None = None

    @property
    def has_patterns(self) -> bool:
        """1x1 kernels have one tap: only whole kernels can be removed there."""
        return self.shape[0] * self.shape[1] > 1

    @property
    def chooses_patterns(self) -> bool:
        """Whether its kernels choose between patterns; where not, there is one pattern, of all taps."""
        return self.has_patterns and not self.whole_kernels

    @property
    def kept_taps(self) -> int:
        """Taps of a kernel that stays."""
        return self.entries if self.chooses_patterns else self.shape[0] * self.shape[1]

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The shape of the leaf, in its own layout."""
        return permuted(self.shape, FROM_HWIO[self.axes])

    def to_hwio(self, leaf: Any) -> Any:
        """An array in the leaf's layout -> (kh, kw, cin, cout)."""
        return leaf if self.axes == "HWIO" else leaf.transpose(TO_HWIO[self.axes])

    @property
    def unit_grid(self) -> tuple[int, int]:
        """Number of units of removal along (cin, cout); the last ones may be short."""
        return self._grid(self.removal_tile)

    def in_words(self) -> str:
        """Its patterns and shapes of choice, as `print` of a plan shows them."""
        words = [f"{self.entries} taps" if self.chooses_patterns else "whole kernels"]
        if self.superset is not None:
            words.append(f"of {self.superset} in a tile")
        if self.quads:
            words.append("in quads")
        if self.tile != (1, 1):
            words.append("in tiles of {}x{}".format(*self.tile))
        if self.removal_tile != (1, 1):
            words.append("removed in tiles of {}x{}".format(*self.removal_tile))
        if self.removal_score != "whole":
            words.append(f"by what is {self.removal_score}")
        if self.removal_scope != "layer":
            words.append(f"alike in every {self.removal_scope}")
        if self.floor:
            words.append("with a floor")
        return ", ".join(words) + (f" ({self.axes})" if self.axes != "HWIO" else "")

    def _grid(self, tile: tuple[int, int]) -> tuple[int, int]:
        filters, channels = tile
        return math.ceil(self.shape[2] / channels), math.ceil(self.shape[3] / filters)

    @property
    def scope_block(self) -> tuple[int, int]:
        """Units along (cin, cout) of one block of the removal's scope."""
        rows, columns = self.unit_grid
        if self.removal_scope == "layer":
            return rows, columns
        if self.removal_scope == "filter":
            return rows, 1
        filters, channels = (tile // unit for tile, unit in zip(self.tile, self.removal_tile))
        return min(channels, rows), min(filters, columns)

    @property
    def num_removed(self) -> int:
        """Units removed in each block of the scope: the reference's count, ceil(round(f * n, 6)).

        The rounding keeps a product such as 0.55 * 1600 = 880.0000000000001 from giving 881.
        """
        assert self.fraction is not None  # else the target decides
        return math.ceil(round(self.fraction * math.prod(self.scope_block), 6))

    @property
    def num_protected(self) -> int:
        """At most so many units are held back by the floor: the best of every row and of every column."""
        return sum(self.unit_grid) - 1 if self.floor else 0


def check_layer(layer: LayerPlan) -> None:
    """Raise a ValueError for numbers that do not fit a layer; warn of one that vanishes."""
    taps = layer.shape[0] * layer.shape[1]
    if layer.chooses_patterns:
        # Given patterns may have any number of taps; the number only counts where it is used.
        used = layer.fraction is None or layer.superset is not None or layer.quads
        if layer.entries < 1 or (used and layer.entries >= taps):
            raise ValueError(f"{layer.name!r}: entries={layer.entries}, expected 1 to {taps - 1} of its {taps} taps")
        if layer.superset is not None and not layer.entries <= layer.superset < taps <= 9:
            raise ValueError(
                f"{layer.name!r}: superset={layer.superset}, expected {layer.entries} (entries) to {taps - 1} taps, on "
                "kernels of at most 9"
            )
        if layer.quads and 4 * layer.entries > 2 * taps:
            raise ValueError(
                f"{layer.name!r}: quads cannot hold 4 patterns of {layer.entries} taps, each of {taps} taps used at "
                f"most twice; use at most {taps // 2} entries"
            )
    if layer.removal_scope == "tile" and any(
        tile % unit and tile != size
        for tile, unit, size in zip(layer.tile, layer.removal_tile, (layer.shape[3], layer.shape[2]))
    ):
        raise ValueError(
            f"{layer.name!r}: removal_scope='tile' needs pattern tiles {layer.tile} that are multiples of the "
            f"removal tiles {layer.removal_tile}"
        )
    if layer.floor and layer.removal_scope != "layer":
        raise ValueError(
            f"floor=True with removal_scope={layer.removal_scope!r}: equal counts leave something of every filter, but "
            "cannot promise it for input channels; use removal_scope='layer', or floor=False"
        )
    if not layer.fraction:
        return
    units = math.prod(layer.scope_block)
    # The authors' own form keeps their count, whatever it leaves of a tiny layer.
    reference = layer.removal_tile == (1, 1) and layer.removal_scope == "layer"
    if layer.num_removed >= units and not reference:
        raise ValueError(
            f"{layer.name!r}: a fraction of {layer.fraction} removes all of the {units} unit(s) of "
            f"{layer.removal_tile} (filters, channels) that compete with each other; use a smaller removal_tile, a "
            "wider removal_scope or a smaller fraction"
        )
    if layer.num_removed >= units:
        warnings.warn(
            f"{layer.name!r} vanishes: a fraction of {layer.fraction} removes all of its {units} kernels; use at most "
            f"{(units - 1) / units:.4f}, or None to leave it dense",
            stacklevel=3,
        )
    if units - layer.num_removed < layer.num_protected:
        raise ValueError(
            f"{layer.name!r}: a fraction of {layer.fraction} leaves {units - layer.num_removed} of {units} units that "
            f"compete, and the floor may hold {layer.num_protected}; use a fraction up to "
            f"{1 - layer.num_protected / units:.4f}, or floor=False"
        )
