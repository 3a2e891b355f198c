"""From masks to the variables that `clicktrain_jax.models.PatternConv` reads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy import layers
from clicktrain_jax.deploy.accelerate import concrete_masks
from clicktrain_jax.masks import Masks, combine
from clicktrain_jax.plan import Plan
from clicktrain_jax.trees import Tree, map_named


def structures(masks: Masks | Tree, *, tile: tuple[int | None, int | None] | None = None) -> dict[str, Any]:
    """The collection "structures" of a linen net whose convolutions are `PatternConv`.

    Args:
        masks: `Masks` of the parameters, or one tree of bool arrays (kh, kw, cin, cout) and None; concrete.
        tile: (filters, channels) that share all their taps, for `pallas_kernels.make_structure`; None infers it for
            each layer. Given, masks of another selection fit the same compiled program where their lists need the same
            room.

    Returns:
        Nested dictionaries with a `pallas_kernels.Structure` for each masked kernel, ``{"Conv_1": {"kernel": ...}}``:
        a pytree, to be passed as an argument. Kernels of which nothing is removed are left out.

    Raises:
        ValueError: as `accelerate` for the masks; a mask that is not 4-D, or not shared by ``tile``.
    """
    import pallas_kernels

    collection: dict[str, Any] = {}
    for name, mask in concrete_masks(masks).items():
        if mask is None or mask.all():
            continue
        *modules, leaf = name.split("/")
        place = collection
        for module in modules:
            place = place.setdefault(module, {})
        try:
            place[leaf] = pallas_kernels.make_structure(mask, tile=tile)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    return collection


def gaining_structures(masks: Masks, plan: Plan) -> dict[str, Any]:
    """The structures of all layers that should gain by them in training on this device, as `structures` gives them.

    A layer whose kernels choose their own patterns among a tile's superset is run by the superset: what it computes
    beyond the masks is multiplied by weights that are zero.

    Args:
        masks: of the plan, concrete.
        plan: from `clicktrain_jax.make_plan`.
    """
    import pallas_kernels

    planned = plan.by_name()

    def widened(name: str, mask: Any) -> np.ndarray | None:
        # A structure is long to build: not where the portable form would gather for each kernel alone.
        if mask is None or name not in planned or planned[name].tile[0] == 1 and layers.own_backend() != "cpu":
            return None
        return _shared(np.asarray(mask), planned[name].tile if planned[name].superset is not None else (1, 1))

    def gaining(found: dict[str, Any]) -> dict[str, Any]:
        kept = {}
        for key, value in found.items():
            if isinstance(value, pallas_kernels.Structure):
                if layers.gains(value, "training", layers.own_backend()):
                    kept[key] = jax.tree.map(jnp.asarray, value)
            elif inner := gaining(value):
                kept[key] = inner
        return kept

    candidates = map_named(widened, combine(masks))
    return gaining(structures(candidates)) if jax.tree.leaves(candidates) else {}


def _shared(mask: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """bool (kh, kw, cin, cout) made alike in tiles of (filters, channels): what any kernel of a tile retains."""
    filters, channels = tile
    for axis, size in ((3, filters), (2, channels)):
        starts = np.arange(0, mask.shape[axis], size)
        blocks = np.logical_or.reduceat(mask, starts, axis=axis)
        mask = np.repeat(blocks, size, axis=axis).take(np.arange(mask.shape[axis]), axis=axis)
    return mask
