"""From a folder to a net that answers."""

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy import storage
from clicktrain_jax.deploy.arguments import check_function, places_of
from clicktrain_jax.deploy.fold import Folded, fold
from clicktrain_jax.deploy.inference import InferenceNet
from clicktrain_jax.deploy.interception import read_by_convolutions
from clicktrain_jax.deploy.portable import STABLEHLO, PortableNet
from clicktrain_jax.deploy.pruned import check_is_inference, check_probe
from clicktrain_jax.deploy.storage.containers import find_prefix, nest
from clicktrain_jax.deploy.tracing import traced
from clicktrain_jax.masks import Masks, check_shape, combine
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
        An `InferenceNet`; a `PortableNet` for a user's own net without ``apply_fn``. A warning says so where
        ``apply_fn`` does not answer as the exported function did.

    Raises:
        ValueError: a file that is missing or was changed, or a manifest that this version cannot follow; ``like`` of
            another net; an ``apply_fn`` in training mode, or one that cannot take the variables as they are.
    """
    if apply_fn is None:
        manifest = storage.read_manifest(path)
        if _fact(manifest, "net") is None:
            if STABLEHLO not in manifest["files"]:
                raise ValueError(f"{path} is no net known by name and has no {STABLEHLO}: give load its apply_fn")
            return PortableNet(storage.read_file(path, STABLEHLO), manifest)
    stored = storage.read(path, like)
    facts, is_own = stored.manifest["facts"], apply_fn is not None
    if apply_fn is None:
        apply_fn = zoo(facts["net"], layout)
    elif layout != "NHWC":
        raise ValueError(f"layout={layout!r} is for nets known by name; an apply_fn has its own")
    settings = {"image_shape": _fact(stored.manifest, "image_shape"), "normalise": facts.get("normalise")}
    settings |= {"backend": backend, "manifest": stored.manifest}
    try:
        net = inference_net(apply_fn, stored.variables, stored.masks, **settings)
    except Exception as error:  # whatever a user's function raises for containers that it does not know
        if like is not None or facts["net"] is not None:
            raise
        raise ValueError(
            "apply_fn cannot take the variables as nested dictionaries of their names "
            f"({type(error).__name__}: {error}): give like=, a tree with the containers that it wants"
        ) from error
    if is_own:
        check_probe(check_is_inference(net.folded), facts.get("probe", []))
    return net


def inference_net(
    apply_fn: ApplyFn,
    variables: Tree,
    masks: Masks | Tree | None,
    *,
    image_shape: Sequence[int],
    normalise: Mapping[str, Any] | None,
    backend: str | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> InferenceNet:
    """An `InferenceNet` from masked variables; arguments are those of `export`."""
    check_function(apply_fn, ("variables", "images"))
    folded = fold(normalising(apply_fn, normalise), variables, image_shape)
    by_leaf = masks_by_leaf(masks, variables)
    taken = {step.leaf for step in folded.steps(1).convolutions}
    lost = [name for name, mask in by_leaf.items() if name not in taken and not mask.all()]
    if lost:
        warnings.warn(
            f"masks: {', '.join(map(repr, lost[:3]))} are pruned ({len(lost)} in all), but no convolution takes them "
            "as they are, and they run dense: what is computed from a leaf need not have its zeros, and loops and "
            "branches are left as they are",
            stacklevel=2,
        )
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
    try:
        if set(normalise) != {"mean", "std"}:
            raise TypeError
        mean, std = (np.atleast_1d(np.asarray(normalise[key], np.float32)) for key in ("mean", "std"))
    except (TypeError, ValueError, IndexError):
        raise ValueError(f"normalise={normalise!r}: expected {{'mean': [...], 'std': [...]}}, or None") from None
    channels = max(mean.size, std.size)
    is_finite = np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()
    if max(mean.ndim, std.ndim) > 1 or not {mean.size, std.size} <= {1, channels} or not is_finite:
        raise ValueError(
            f"normalise={dict(normalise)!r}: expected a finite mean and a std above 0, one for all or for each channel"
        )

    def apply(variables: Any, pixels: Any) -> Any:
        if channels not in (1, pixels.shape[-1]):
            raise ValueError(f"images have {pixels.shape[-1]} channels, normalise has {channels}")
        return apply_fn(variables, (pixels - _over(pixels, mean)) / _over(pixels, std))

    return apply


def _over(pixels: Any, vector: np.ndarray) -> Any:
    """(channels,) or (1,) with the axes of images: ranks are not promoted where a user forbids it."""
    return jnp.asarray(vector).reshape((1,) * (pixels.ndim - 1) + (-1,))


def located(
    masks: Masks | Tree | None, apply_fn: ApplyFn, variables: Tree, image_shape: Sequence[int], at: str | None
) -> Masks | Tree | None:
    """The masks, with the whole names of their leaves where the variables hold several copies of these.

    Raises:
        ValueError: convolutions read a parameter from several places; ``at`` names a place without parameters.
    """
    if masks is None:
        return None
    named = dict(named_leaves(combine(masks)))
    leaves = [(name, leaf) for name, leaf in named_leaves(variables) if leaf is not None]
    if at is None:
        try:
            find_prefix([name for name, _ in named_leaves(variables)], list(named))
            return masks
        except ValueError:
            pass

    def read(places: Mapping[int, str]) -> set[str]:
        images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
        closed, _ = traced(apply_fn, variables, images)
        return read_by_convolutions(closed, [*(leaf for _, leaf in leaves), images], places)

    paths, shapes = [name for name, _ in leaves], [np.shape(leaf) for _, leaf in leaves]
    found = places_of(paths, shapes, named, read, None if at is None else (at,))
    # Masks of another tree are told by the storage.
    if len(found) != 1:
        return masks
    layers = {name: masks.layers.get(name) for name in named} if isinstance(masks, Masks) else named
    whole = nest({found[0] + name: layer for name, layer in layers.items()})
    return Masks.of(whole) if isinstance(masks, Masks) else whole


def masks_by_leaf(masks: Masks | Tree | None, variables: Tree) -> dict[str, np.ndarray]:
    """Bool arrays by the name that their leaf has among the variables; dense leaves are left out."""
    if masks is None:
        return {}
    named, leaves = named_leaves(combine(masks)), dict(named_leaves(variables))
    prefix = find_prefix(list(leaves), [name for name, _ in named])
    found = {prefix + name: np.asarray(mask) for name, mask in named if mask is not None}
    for name, mask in found.items():
        check_shape(name, mask if leaves[name] is None else leaves[name], mask)
    return found


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
