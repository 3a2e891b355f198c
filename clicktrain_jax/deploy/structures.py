"""From masks to the variables that `clicktrain_jax.models.PatternConv` reads."""

from typing import Any

from clicktrain_jax.deploy.accelerate import concrete_masks
from clicktrain_jax.masks import Masks
from clicktrain_jax.trees import Tree


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
