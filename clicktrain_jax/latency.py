"""What layers cost in seconds, as plain data: a plan's target may be time, and a plan opens no clock itself.

`clicktrain_jax.layer_times` measures such a table for a net, a device, a batch size and the shapes of a plan.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# A layer that at best gets faster by less than this share of its dense time gains nothing: that is noise.
LEAST_GAIN = 0.02


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """One layer's seconds, by the share of its kernels that stay.

    Attributes:
        name: the leaf's.
        dense_s: seconds of the dense layer.
        shares: of its kernels that stay, each in (0, 1], rising; the kernels that stay have their patterns.
        seconds: at each share, run by pattern.

    Raises:
        ValueError: no share, shares that do not rise within (0, 1], another number of seconds, or seconds that are
            not positive and finite.
    """

    name: str
    dense_s: float
    shares: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip((0.0, *self.shares), self.shares))
        if not self.shares or not rising or self.shares[-1] > 1 or len(self.shares) != len(self.seconds):
            raise ValueError(
                f"{self.name!r}: shares={self.shares}, seconds={self.seconds}: expected as many seconds as shares, and "
                "shares that rise within (0, 1]"
            )
        if not all(0 < value < math.inf for value in (self.dense_s, *self.seconds)):
            raise ValueError(
                f"{self.name!r}: dense_s={self.dense_s}, seconds={self.seconds}: expected positive, finite seconds"
            )

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """``(shares, seconds)`` as the layer is run: dense where that is as fast, never slower for keeping less."""
        shares, seconds = list(self.shares), list(self.seconds)
        if shares[-1] < 1:
            shares, seconds = [*shares, 1.0], [*seconds, self.dense_s]
        least = np.minimum.accumulate(np.minimum(seconds, self.dense_s)[::-1])[::-1]
        return np.asarray(shares, np.float32), least.astype(np.float32)

    def hull(self) -> tuple[np.ndarray, np.ndarray]:
        """The curve's lower convex hull: what removal gains on the way to where a layer gets faster.

        Where the first kernels that go win nothing yet, the mean gain up to the next corner tells their worth.
        """
        corners: list[tuple[float, float]] = []
        for x, y in zip(*self.curve()):
            while len(corners) > 1:
                (x0, y0), (x1, y1) = corners[-2:]
                if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                    break
                corners.pop()
            corners.append((float(x), float(y)))
        shares, seconds = zip(*corners)
        return np.asarray(shares, np.float32), np.asarray(seconds, np.float32)

    def at(self, share: float | jax.Array, *, hull: bool = False) -> jax.Array:
        """float32 seconds at shares of kernels that stay, (...) -> (...); read between those measured."""
        return jnp.interp(share, *map(jnp.asarray, self.hull() if hull else self.curve()))

    def gains(self, least_share: float) -> bool:
        """Whether the layer gets faster at all, down to a share."""
        return float(np.interp(least_share, *self.curve())) <= (1 - LEAST_GAIN) * self.dense_s


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """What a net's layers cost on a device.

    Attributes:
        net_s: seconds of a call of the whole dense net.
        layers: those that were measured.
        device: where.
        batch: images a call.
    """

    net_s: float
    layers: tuple[LayerTime, ...]
    device: str = ""
    batch: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.net_s < math.inf:
            raise ValueError(f"net_s={self.net_s}: expected the positive seconds of the whole dense net")

    def of(self, name: str) -> LayerTime:
        """The times of a layer.

        Raises:
            ValueError: it was not measured.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(
            f"costs hold no times of {name!r}, only of {[layer.name for layer in self.layers]}: measure them with a "
            "plan of the same layers (clicktrain_jax.layer_times), or leave the layer dense"
        )

    def rest(self, names: Sequence[str]) -> float:
        """Seconds of the net apart from these layers."""
        return max(0.0, self.net_s - sum(self.of(name).dense_s for name in names))
