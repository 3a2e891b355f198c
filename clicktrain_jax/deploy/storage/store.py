"""Exports written and read: a tree and its masks, to and from a manifest and the tensors of one file."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax import extras
from clicktrain_jax.deploy.storage import containers
from clicktrain_jax.deploy.storage.folder import naming, place, read_checked, read_checked_manifest, sha256
from clicktrain_jax.deploy.storage.layers import decode, encode
from clicktrain_jax.deploy.storage.manifest import (
    FORMAT,
    MANIFEST,
    MASK_SUFFIX,
    REPORT,
    SCALE_SUFFIX,
    VERSION,
    WEIGHTS,
    Leaf,
    check_file_name,
    masks_digest,
    parse,
    plain_data,
    seal,
    tensor_bytes,
    to_text,
)
from clicktrain_jax.deploy.storage.values import DTYPES, STORABLE, narrow, stored_dtype, to_numpy, widen
from clicktrain_jax.masks import FullMask, Masks
from clicktrain_jax.plan.convolutions import FROM_HWIO, TO_HWIO, layouts
from clicktrain_jax.trees import KERNEL_AXES, Tree, named_leaves

# As safetensors names dtypes, and as this room does.
_SAFETENSORS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


class Stored(NamedTuple):
    """What an export holds.

    Attributes:
        variables: tree of numpy arrays, dtypes as they were; typed random keys are jax arrays. Masked entries are +0.
        masks: `Masks` of numpy bool arrays (some are read-only views), or None.
        manifest: plain data.
    """

    variables: Tree
    masks: Masks | None
    manifest: dict[str, Any]


class Packed(NamedTuple):
    """A tree and its masks as they are stored, in memory.

    Attributes:
        leaves: of the manifest.
        tensors: of the weights' file.
        masks: of the manifest: the prefix of the masks' names, and their digest; None for no masks.
        dtype: that the weights are stored in.
    """

    leaves: list[Leaf]
    tensors: dict[str, np.ndarray]
    masks: dict[str, str] | None
    dtype: str


def pack(variables: Tree, masks: Masks | Tree | None, dtype: str = "float32") -> Packed:
    """A tree and its masks made small; arguments and errors as those of `write`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {DTYPES}")
    leaves, tensors, stored_masks, prefix = _encode(variables, masks, dtype)
    known = None if masks is None else {"prefix": prefix, "sha256": masks_digest(stored_masks.items())}
    return Packed(leaves, tensors, known, dtype)


def unpack(packed: Packed, like: Tree | None = None) -> tuple[Tree, Masks | None]:
    """``(variables, masks)`` as `read` gives them.

    Raises:
        ValueError: the tensors hold other masks than were packed; ``like`` of another net.
    """
    arrays, masks = _decode(packed.tensors, packed.leaves)
    if packed.masks is not None and masks_digest(masks.items()) != packed.masks["sha256"]:
        raise ValueError("holds masks that are not those of its manifest: export again")
    variables = containers.nest(arrays) if like is None else containers.fill(like, arrays)
    if packed.masks is None:
        return variables, None
    covered = {leaf.name: masks.get(leaf.name) for leaf in packed.leaves if leaf.in_masks}
    for leaf in packed.leaves:
        if leaf.axes != "HWIO" and leaf.name in masks:
            covered[leaf.name] = masks[leaf.name].transposed(FROM_HWIO[leaf.axes])
    return variables, containers.fill_masks(like, packed.masks["prefix"], covered)


def write(
    folder: str | os.PathLike,
    variables: Tree,
    masks: Masks | Tree | None,
    *,
    facts: Mapping[str, Any],
    dtype: str = "float32",
    files: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Store a masked net in a folder, small.

    Args:
        folder: a new folder, an empty one, or an earlier export, which is replaced.
        variables: any tree of arrays: linen's ``{"params": ..., "batch_stats": ...}``, ``nnx.State``. What the masks
            remove is stored as zero, whatever it holds.
        masks: `Masks`, or one boolean tree (True where a weight stays). Leaf names are those of ``variables``, or of
            what is below one key of it ("params"); leaves may be missing. None: nothing is masked.
        facts: plain JSON data for ``manifest["facts"]``.
        dtype: "float32": every leaf as it is, bit for bit. "bfloat16", "float16", "int8": masked leaves and all of
            rank 2 and more are narrowed to it, if they are floating and wider; int8 is symmetric with a float32 scale
            a filter. They come back in their own dtype.
        files: further files of the export, by name.

    Returns:
        The manifest, as `read` gives it.

    Raises:
        ValueError: a folder that is no export or holds more than one; masks of another tree; leaves that cannot be
            stored, such as infinite values in int8; facts that are no JSON; bad file names.

    Of the masks are kept: which weights stay, which kernels stay, and the patterns of the kernels that stay (elsewhere
    patterns come back all True).
    """
    return write_packed(folder, pack(variables, masks, dtype), facts=facts, files=files)


def write_packed(
    folder: str | os.PathLike, packed: Packed, *, facts: Mapping[str, Any], files: Mapping[str, bytes] | None = None
) -> dict[str, Any]:
    """`write` of what `pack` made: each file is written once, and nothing is read."""
    with extras.brings("deploy"):
        from safetensors.numpy import save

    if not isinstance(facts, Mapping):
        raise ValueError(f"facts={facts!r}: expected a dictionary")
    contents = dict(files or {})
    for name, data in contents.items():
        check_file_name(name)
        if not isinstance(data, (bytes, bytearray)):
            raise ValueError(f"files: {name!r} is a {type(data).__name__}, expected its bytes")
        if name in (MANIFEST, WEIGHTS, REPORT):
            raise ValueError(f"files: {name!r} is a name that an export keeps for itself")
    contents[WEIGHTS] = save(packed.tensors)
    manifest = seal(
        {
            "format": FORMAT,
            "version": VERSION,
            "dtype": packed.dtype,
            "kernel_axes": list(KERNEL_AXES),
            "facts": plain_data(dict(facts), "facts"),
            "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in contents.items()},
            "leaves": {leaf.name: plain_data(leaf.to_json(), leaf.name) for leaf in packed.leaves},
            "masks": packed.masks,
            "software": _software(),
        }
    )
    parse(to_text(manifest))
    place(Path(folder), contents | {MANIFEST: to_text(manifest)})
    return manifest


def read(folder: str | os.PathLike, like: Tree | None = None) -> Stored:
    """Read and check an export.

    Args:
        folder: of an export.
        like: a tree with the containers to return, such as freshly made variables; leaves may be
            ``jax.ShapeDtypeStruct``. None: nested dictionaries by name.

    Returns:
        `Stored`.

    Raises:
        ValueError: a file that is missing, cut, changed, or not of this export, named with what is wrong; ``like`` of
            another net.
    """
    folder = Path(folder)
    manifest, leaves = read_checked_manifest(folder)
    for name in sorted(set(manifest["files"]) - {WEIGHTS}):
        read_checked(folder, manifest, name)
    data = read_checked(folder, manifest, WEIGHTS)
    with naming(folder / WEIGHTS):
        packed = Packed(leaves, _tensors(data, leaves), manifest["masks"], manifest["dtype"])
        return Stored(*unpack(packed, like), manifest)


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked manifest of an export; other files are not looked at.

    Raises:
        ValueError: it is missing, cut or changed.
    """
    return read_checked_manifest(Path(folder))[0]


def read_file(folder: str | os.PathLike, name: str) -> bytes:
    """The checked bytes of one file of an export.

    Raises:
        ValueError: the export lists no such file, or it is missing, cut or changed.
    """
    manifest = read_manifest(folder)
    if name not in manifest["files"]:
        raise ValueError(f"{Path(folder) / MANIFEST} lists no {name!r}: the export has {sorted(manifest['files'])}")
    return read_checked(Path(folder), manifest, name)


def _software() -> dict[str, str]:
    import safetensors

    import clicktrain_jax

    versions = {"clicktrain_jax": clicktrain_jax.__version__, "jax": jax.__version__, "numpy": np.__version__}
    return versions | {"python": platform.python_version(), "safetensors": safetensors.__version__}


def _encode(
    variables: Tree, masks: Any, dtype: str
) -> tuple[list[Leaf], dict[str, np.ndarray], dict[str, FullMask], str]:
    """Leaves of the manifest, tensors of the file, the masks as they will be read, and their prefix."""
    named = named_leaves(variables)
    containers.check_names(name for name, _ in named)
    arrays = {name: (None, None) if leaf is None else to_numpy(name, leaf) for name, leaf in named}
    shapes = {name: None if array is None else array.shape for name, (array, _) in arrays.items()}
    axes = layouts({name: shape for name, shape in shapes.items() if shape is not None})
    prefix, by_name = ("", {}) if masks is None else containers.masks_by_name(masks, shapes, axes)
    leaves, tensors, kept_masks = [], {}, {}
    for name, (array, key) in arrays.items():
        mask = by_name.get(name)
        if array is None:
            leaves.append(Leaf(name, None, in_masks=name in by_name))
            continue
        coding, keep, found = None, None, {}
        order = "OIHW" if axes.get(name) == "OIHW" else "HWIO"
        if order == "OIHW":
            array = array.transpose(TO_HWIO[order])
            mask = mask if mask is None else mask.transposed(TO_HWIO[order])
        if mask is not None:
            keep = mask.combined()
            coding, data = encode(mask)
            found[name + MASK_SUFFIX] = np.frombuffer(data, np.uint8)
            kept_masks[name] = mask
        stored = stored_dtype(array, mask is not None, dtype)
        found[name], scale = narrow(name, array, keep, stored)
        if scale is not None:
            found[name + SCALE_SUFFIX] = scale
        leaf = Leaf(name, array.shape, array.dtype.name, stored, key, name in by_name, coding, order)
        for tensor, value in found.items():
            if tensor in tensors:
                raise ValueError(f"two leaves would both be stored as {tensor!r}: rename one of them")
            tensors[tensor] = np.ascontiguousarray(value).reshape(value.shape)
        leaves.append(leaf)
    return leaves, tensors, kept_masks, prefix


def _tensors(data: bytes, leaves: list[Leaf]) -> dict[str, np.ndarray]:
    """The arrays of the weights' file, which must be just those that the manifest tells of."""
    with extras.brings("deploy"):
        from safetensors import SafetensorError, deserialize
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for leaf in leaves:
        own = leaf.tensors()
        if expected.keys() & own.keys():
            raise ValueError(f"has the tensors of {leaf.name!r} twice")
        expected |= own
    try:
        found = deserialize(data)
    except SafetensorError as error:
        raise ValueError(f"is no safetensors file ({error})") from error
    if {name for name, _ in found} != set(expected):
        differing = min({name for name, _ in found} ^ set(expected))
        raise ValueError(f"holds other tensors than its manifest tells of, such as {differing!r}")
    arrays = {}
    for name, entry in found:
        dtype, shape = expected[name]
        if _SAFETENSORS.get(entry["dtype"]) != dtype or tuple(entry["shape"]) != shape:
            raise ValueError(
                f"holds {name!r} as {entry['dtype']} {entry['shape']}, its manifest tells of {dtype} {list(shape)}"
            )
        if len(entry["data"]) != tensor_bytes(dtype, shape):
            raise ValueError(f"holds {len(entry['data'])} bytes of {name!r}, expected {tensor_bytes(dtype, shape)}")
        arrays[name] = np.frombuffer(entry["data"], STORABLE[dtype]).reshape(shape)
    return arrays


def _decode(tensors: Mapping[str, np.ndarray], leaves: list[Leaf]) -> tuple[dict[str, Any], dict[str, FullMask]]:
    """Leaves and masks by name."""
    arrays: dict[str, Any] = {}
    masks: dict[str, FullMask] = {}
    for leaf in leaves:
        arrays[leaf.name] = None
        if leaf.shape is None:
            continue
        keep = None
        if leaf.mask is not None:
            with naming(f"the mask of {leaf.name!r}"):
                masks[leaf.name] = decode(leaf.mask, tensors[leaf.name + MASK_SUFFIX].tobytes(), leaf.shape)
                keep = masks[leaf.name].combined()
                if int(np.count_nonzero(keep)) != leaf.mask.kept:
                    raise ValueError(f"keeps {int(np.count_nonzero(keep))} weights, expected {leaf.mask.kept}")
        scale = tensors.get(leaf.name + SCALE_SUFFIX) if leaf.stored != leaf.dtype else None
        array = widen(tensors[leaf.name], scale, keep, leaf.shape, leaf.dtype)
        if leaf.axes != "HWIO":
            array = np.ascontiguousarray(array.transpose(FROM_HWIO[leaf.axes]))
        arrays[leaf.name] = array if leaf.key is None else _wrap_key(leaf, array)
    return arrays, masks


def _wrap_key(leaf: Leaf, data: np.ndarray) -> jax.Array:
    try:
        return jax.random.wrap_key_data(jnp.asarray(data), impl=leaf.key)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{leaf.name!r} is no random key of {leaf.key!r} ({error})") from error
