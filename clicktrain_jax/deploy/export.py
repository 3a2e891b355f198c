"""From masked variables to a folder: small, checked, and ready to run."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clicktrain_jax.deploy import storage
from clicktrain_jax.deploy.arguments import check_function
from clicktrain_jax.deploy.fold import sizes_of
from clicktrain_jax.deploy.load import inference_net, located, masks_by_leaf, normalising, zoo
from clicktrain_jax.deploy.portable import STABLEHLO, to_stablehlo
from clicktrain_jax.deploy.pruned import by_name, check_is_inference, check_zeros, zeroed
from clicktrain_jax.masks import Masks
from clicktrain_jax.trees import Tree

ONNX = "net.onnx"


def export(
    path: str | os.PathLike,
    apply_fn: Callable[[Any, Any], Any],
    variables: Tree,
    masks: Masks | Tree,
    *,
    image_shape: Sequence[int],
    normalise: Mapping[str, Sequence[float] | float] | None = None,
    dtype: str = "float32",
    net: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    stablehlo: bool = True,
    onnx: bool = False,
    c: bool = False,
    opset: int | None = None,
    prune: bool = False,
    at: str | None = None,
) -> dict[str, Any]:
    """Write a pruned net into a folder that `load` reads.

        variables = {"params": params, "batch_stats": batch_stats}
        ct.export("net.export", lambda v, x: model.apply(v, x, train=False), variables, ct.masks_of(opt_state),
                  image_shape=(32, 32, 3), normalise={"mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]})

    Args:
        path: a new folder, or that of an earlier export, which is replaced.
        apply_fn: ``(variables, images) -> logits``, as in evaluation: BatchNorm by its running statistics, no dropout.
        variables: all that it takes: linen's variables, an ``nnx.State`` (merge it inside of ``apply_fn``), any tree.
        masks: of the parameters among them; what they remove must be zero, as it is after the prune.
        image_shape: (height, width, channels).
        normalise: ``{"mean": ..., "std": ...}`` of pixels in [0, 1], for each channel or one for all, where
            ``apply_fn`` wants normalised images: the exported net then takes pixels, uint8 or in [0, 1]. None: it takes
            floating images as ``apply_fn`` does.
        dtype: of the stored weights: "float32" (as they are), "bfloat16", "float16" or "int8".
        net: ``{"name", "num_classes", "width", "precision"}`` of a net of `clicktrain_jax.models`, which then needs no
            code to be loaded; None for any other.
        facts: further plain data for ``manifest["facts"]``.
        stablehlo: add ``net.stablehlo``, which runs in a process with jax alone.
        onnx: add ``net.onnx`` (dense, BatchNorm folded), for which jax2onnx must be installed.
        c: add ``net.c`` and ``net.h`` (and ``net.weights``, where the weights are too many for a compiler): the net in
            C11 for one image a call, its patterns compiled in; uint8 pixels where the net normalises, else float32.
        opset: of ONNX's operators; None for the converter's own choice.
        prune: set what the masks remove to zero first, where the run ended between selection and prune: masks of such
            a run (``masks.pending``) are refused otherwise, others are applied.
        at: where the variables hold the parameters that the masks are of, "params"; None takes those that convolutions
            read.

    Returns:
        The manifest.

    Raises:
        ValueError: ``net`` does not have these variables; masks of other parameters, a function that jax cannot fold, a
            folder that holds something else, a step that cannot be written as C; weights that are marked and not zero;
            a function in training mode; convolutions that read a parameter from several places.
    """
    check_function(apply_fn, ("variables", "images"))
    if opset is not None and not (onnx and isinstance(opset, int) and opset > 0):
        said = f"opset={opset!r}, onnx={onnx!r}"
        raise ValueError(f"{said}: expected a version of ONNX's operators, such as 17, and onnx=True")
    normalising(apply_fn, normalise)  # which refuses what is no such thing
    facts = {
        **(facts or {}),
        "net": None if net is None else dict(net),
        "image_shape": list(sizes_of(image_shape)),
        "normalise": None
        if normalise is None
        else {key: np.ravel(np.asarray(normalise[key], float)).tolist() for key in normalise},
    }
    pending = getattr(masks, "pending", False)
    masks = located(masks, apply_fn, variables, image_shape, at)
    if masks is not None:
        keep = masks_by_leaf(masks, variables)
        if prune or not pending:
            variables = zeroed(variables, keep)
        check_zeros(by_name(variables), keep, "export with prune=True")
    packed = storage.pack(variables, masks, dtype)
    # What else is made holds the weights as they are stored, rounded if they are.
    stored_variables, stored_masks = storage.unpack(packed, like=variables)
    # A net that will be loaded by name must be the one of that name.
    ready = inference_net(
        apply_fn if net is None else zoo(net),
        stored_variables,
        stored_masks,
        image_shape=image_shape,
        normalise=facts["normalise"],
    )
    facts["probe"] = check_is_inference(ready.folded)
    files = {}
    if stablehlo:
        files[STABLEHLO] = to_stablehlo(ready)
    if onnx:
        from clicktrain_jax.deploy.onnx import to_onnx

        files[ONNX] = to_onnx(ready.folded, tuple(image_shape), opset)
    if c:
        from clicktrain_jax.deploy.c_net import to_c

        files.update(to_c(ready))
    return storage.write_packed(path, packed, facts=facts, files=files)
