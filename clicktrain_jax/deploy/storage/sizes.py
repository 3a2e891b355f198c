"""What an export's bytes are spent on, read from its manifest."""

import math
from typing import Any, NamedTuple

from clicktrain_jax.deploy.storage.manifest import (
    MASK_SUFFIX,
    SCALE_SUFFIX,
    WEIGHTS,
    Leaf,
    parse,
    tensor_bytes,
    to_text,
)
from clicktrain_jax.trees import is_kernel_shape

_FLOAT32_BYTES = 4


class Bytes(NamedTuple):
    """Sizes in bytes.

    Attributes:
        weights: how many weights there are, kept or not (a count).
        kept: how many of them stay (a count).
        values: bytes of the stored values.
        indices: bytes that tell which weights stay: patterns, kernels.
        scales: bytes of the scales of int8 values.
    """

    weights: int
    kept: int
    values: int
    indices: int
    scales: int

    @property
    def stored(self) -> int:
        """All bytes of the leaf in the file, its name and shape in the headers left out."""
        return self.values + self.indices + self.scales

    @property
    def dense_float32(self) -> int:
        """Bytes of the whole leaf in dense float32."""
        return _FLOAT32_BYTES * self.weights


class Sizes(NamedTuple):
    """Sizes of an export.

    Attributes:
        leaves: by name.
        convolutions: sum over all leaves of 4 axes, pruned or not.
        headers: bytes of the manifest and of the header of the weights' file.
        files: bytes by file name, the manifest included.
    """

    leaves: dict[str, Bytes]
    convolutions: Bytes
    headers: int
    files: dict[str, int]

    @property
    def convolution_ratio(self) -> float:
        """Dense float32 convolutions over the stored ones with all of the headers."""
        stored = self.convolutions.stored + self.headers
        return self.convolutions.dense_float32 / stored


def sizes(manifest: dict[str, Any]) -> Sizes:
    """Bytes of every leaf of an export, of all convolutions, and of the headers.

    Args:
        manifest: from `write` or `read`.

    Raises:
        ValueError: no manifest of an export, or a changed one.
    """
    text = to_text(manifest)
    leaves = parse(text)[1]
    by_name = {leaf.name: _of_leaf(leaf) for leaf in leaves if leaf.shape is not None}
    kernels = [by_name[leaf.name] for leaf in leaves if leaf.shape is not None and is_kernel_shape(leaf.shape)]
    convolutions = Bytes(*(sum(column) for column in zip(*kernels))) if kernels else Bytes(0, 0, 0, 0, 0)
    files = {name: entry["bytes"] for name, entry in manifest["files"].items()} | {"manifest.json": len(text)}
    headers = len(text) + files[WEIGHTS] - sum(leaf.stored for leaf in by_name.values())
    return Sizes(by_name, convolutions, headers, files)


def _of_leaf(leaf: Leaf) -> Bytes:
    found = {name.removeprefix(leaf.name): tensor_bytes(*tensor) for name, tensor in leaf.tensors().items()}
    return Bytes(
        math.prod(leaf.shape or ()),
        leaf.weights if leaf.mask is None else leaf.mask.kept,
        found[""],
        found.get(MASK_SUFFIX, 0),
        found.get(SCALE_SUFFIX, 0),
    )
