"""From a folder to a net that answers."""

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from clicktrain_jax import compact
from clicktrain_jax.compact.containers import find_prefix
from clicktrain_jax.deploy.fold import Folded, fold
from clicktrain_jax.deploy.inference import InferenceNet
from clicktrain_jax.deploy.portable import STABLEHLO, PortableNet
from clicktrain_jax.masks import Masks, combine
from clicktrain_jax.trees import Tree, named_leaves

ApplyFn = Callable[[Any, Any], Any]
Layout = Literal["NHWC", "HWNC"]


def load(
    path: str | os.PathLike,
    apply_fn: ApplyFn | None = None,
    like: Tree | None = None,
    *,
    layout: Layout = "NHWC",
    backend: str | None = None,
) -> InferenceNet | PortableNet:
    """Read an export, check every byte of it, and make it ready to run.

        net = ct.load("vgg13.export")
        logits = net(images)              # uint8, or floating in [0, 1]: normalisation is inside
        net = net.tuned(batch=1)          # measure this device once; other processes find what was measured

    Args:
        path: the folder.
        apply_fn: ``(variables, images) -> logits`` of a user's own net. Nets of `clicktrain_jax.models` are known by
            name; any other runs without its code from its StableHLO, with nothing to tune.
        like: the containers that ``apply_fn`` wants its variables in, such as an ``nnx.State``; None for nested
            dictionaries.
        layout: of the maps inside of a net that is known by name: "HWNC", the batch beside the channels, is what the
            GPU kernels take; in an "NHWC" net a layer that runs so is transposed before and after. Images are NHWC.
        backend: of `pallas_kernels.pattern_conv`: one that is named runs every pruned layer, or is refused; None takes
            what is best for each.

    Returns:
        An `InferenceNet`; a `PortableNet` for a user's own net without ``apply_fn``.

    Raises:
        ValueError: a file that is missing or was changed, or a manifest that this version cannot follow; ``like`` of
            another net.
    """
    if apply_fn is None:
        manifest = compact.read_manifest(path)
        if _fact(manifest, "net") is None:
            if STABLEHLO not in manifest["files"]:
                raise ValueError(f"{path} is no net known by name and has no {STABLEHLO}: give load its apply_fn")
            return PortableNet(compact.read_file(path, STABLEHLO), manifest)
    stored = compact.read(path, like)
    facts = stored.manifest["facts"]
    if apply_fn is None:
        apply_fn = zoo(facts["net"], layout)
    elif layout != "NHWC":
        raise ValueError(f"layout={layout!r} is for nets known by name; an apply_fn has its own")
    image_shape = _fact(stored.manifest, "image_shape")
    return inference_net(
        apply_fn,
        stored.variables,
        stored.masks,
        image_shape=image_shape,
        normalise=facts.get("normalise"),
        backend=backend,
        manifest=stored.manifest,
    )


def inference_net(
    apply_fn: ApplyFn,
    variables: Tree,
    masks: Masks | Tree | None,
    *,
    image_shape: tuple[int, int, int],
    normalise: Mapping[str, Any] | None,
    backend: str | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> InferenceNet:
    """An `InferenceNet` from masked variables; arguments are those of `export`."""
    folded = fold(normalising(apply_fn, normalise), variables, image_shape)
    by_leaf = masks_by_leaf(masks, variables)
    return InferenceNet(
        folded,
        by_leaf,
        normalises=normalise is not None,
        identity=_identity(folded, by_leaf),
        manifest=manifest,
        backend=backend,
    )


def normalising(apply_fn: ApplyFn, normalise: Mapping[str, Any] | None) -> ApplyFn:
    """The function on pixels in [0, 1]: ``(pixels - mean) / std`` comes first.

    Raises:
        ValueError: ``normalise`` does not hold as many of each as there are channels.
    """
    if normalise is None:
        return apply_fn
    if set(normalise) != {"mean", "std"}:
        raise ValueError(f"normalise={dict(normalise)!r}: expected {{'mean': [...], 'std': [...]}}, or None")
    mean, std = (np.asarray(normalise[key], np.float32) for key in ("mean", "std"))
    if mean.ndim != 1 or mean.shape != std.shape or not (std > 0).all() or not np.isfinite([mean, std]).all():
        raise ValueError(f"normalise={dict(normalise)!r}: expected a finite mean and a std above 0 for each channel")

    def apply(variables: Any, pixels: Any) -> Any:
        if pixels.shape[-1] != len(mean):
            raise ValueError(f"images have {pixels.shape[-1]} channels, normalise has {len(mean)}")
        return apply_fn(variables, (pixels - jnp.asarray(mean)) / jnp.asarray(std))

    return apply


def masks_by_leaf(masks: Masks | Tree | None, variables: Tree) -> dict[str, np.ndarray]:
    """Bool arrays by the name that their leaf has among the variables; dense leaves are left out."""
    if masks is None:
        return {}
    named = named_leaves(combine(masks) if isinstance(masks, Masks) else masks)
    prefix = find_prefix([name for name, _ in named_leaves(variables)], [name for name, _ in named])
    return {prefix + name: np.asarray(mask) for name, mask in named if mask is not None}


def zoo(net: Mapping[str, Any], layout: Layout = "NHWC") -> ApplyFn:
    """The function of a net of `clicktrain_jax.models`.

    Args:
        net: ``{"name", "num_classes", "width", "precision"}``.
        layout: of the maps inside.

    Raises:
        ValueError: there is no such net; when the function is called: variables of another net.
    """
    from flax.errors import FlaxError

    from clicktrain_jax import models

    try:
        model = models.build(
            net["name"],
            num_classes=net["num_classes"],
            width=net["width"],
            dtype=jnp.dtype(net["precision"]),
            conv=models.PatternConv,
            layout=layout,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the manifest's net {dict(net)!r} cannot be built: {error!r}") from error

    def apply(variables: Any, images: Any) -> Any:
        try:
            return model.apply(variables, images, train=False)
        except FlaxError as error:
            raise ValueError(f"the variables are not those of the net {dict(net)!r}: {error}") from error

    return apply


def _fact(manifest: Mapping[str, Any], name: str) -> Any:
    if name not in manifest["facts"]:
        raise ValueError(f"the manifest tells no {name!r}: it was not written by clicktrain_jax.export")
    return manifest["facts"][name]


def _identity(folded: Folded, masks: Mapping[str, np.ndarray]) -> str:
    """What the speed of a net depends on, as text: the shapes of its convolutions, and its masks."""
    digest = hashlib.sha256()
    for step in folded.steps(1).convolutions:
        digest.update(f"{step.name} {step.images.aval} {step.equation.params}\n".encode())
    for name in sorted(masks):
        digest.update(f"{name} {masks[name].shape}\n".encode() + np.packbits(masks[name]).tobytes())
    return digest.hexdigest()[:24]
