"""The manifest of an export: what is in the folder, as JSON that tells of any change to itself.

    {"format": ..., "version": 1, "digest": sha256 of the rest, "dtype": "float32", "kernel_axes": [...],
     "facts": {...},                                    what the exporter has to say
     "files": {name: {"bytes": n, "sha256": ...}},      every file but the manifest
     "leaves": {name: {"shape": [...], "dtype": "float32", "stored": "float32", "mask": {...} or null}},
     "masks": {"prefix": "params/", "sha256": ...} or null,
     "software": {package: version}}

A leaf without "mask" lies outside of the masks' tree; null is a leaf that they leave dense. A leaf that is None has
a null shape.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from clicktrain_jax.deploy.storage.layers import CODINGS, Coding, stored_bytes, view_shape
from clicktrain_jax.deploy.storage.values import DTYPES, STORABLE, num_filters
from clicktrain_jax.masks import FullMask
from clicktrain_jax.plan.convolutions import Axes
from clicktrain_jax.trees import KERNEL_AXES

FORMAT = "clicktrain-jax export"
VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
REPORT = "report.html"
MASK_SUFFIX, SCALE_SUFFIX = "#mask", "#scale"
# A few bytes can tell of a mask, and so of a leaf, of any size: what is declared must bear some proportion to the file.
MAX_DENSE_BYTES, MAX_DENSE_RATIO = 2**30, 1000
_FIELDS = {"format", "version", "digest", "dtype", "kernel_axes", "facts", "files", "leaves", "masks", "software"}
_SHA256 = 64


class Leaf(NamedTuple):
    """What the manifest says of one leaf.

    Attributes:
        name: "/"-joined keys.
        shape: None for a leaf that is None; that of ``kernel_axes`` for a kernel, whatever its own order is.
        dtype: of the leaf.
        stored: of its values in the file.
        key: implementation of a typed random key, whose data the values are; else None.
        in_masks: the masks' tree has this leaf.
        mask: None for a dense leaf.
        axes: the order that a kernel has in its tree.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str = ""
    stored: str = ""
    key: str | None = None
    in_masks: bool = False
    mask: Coding | None = None
    axes: Axes = "HWIO"

    @property
    def weights(self) -> int:
        """Entries of the whole leaf."""
        return 0 if self.shape is None else math.prod(self.shape)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that the weights' file has for this leaf: ``{name: (dtype, shape)}``."""
        if self.shape is None:
            return {}
        found = {self.name: (self.stored, self.shape if self.mask is None else (self.mask.kept,))}
        if self.mask is not None:
            found[self.name + MASK_SUFFIX] = ("uint8", (stored_bytes(self.mask, self.shape),))
        if self.stored == "int8" and self.dtype != "int8":
            found[self.name + SCALE_SUFFIX] = ("float32", (num_filters(self.shape),))
        return found

    def to_json(self) -> dict[str, Any]:
        """The leaf's entry in the manifest."""
        entry: dict[str, Any] = {"shape": None if self.shape is None else list(self.shape)}
        if self.shape is not None:
            entry |= {"dtype": self.dtype, "stored": self.stored}
        if self.key is not None:
            entry["key"] = self.key
        if self.axes != "HWIO":
            entry["axes"] = self.axes
        if self.in_masks:
            entry["mask"] = None if self.mask is None else self.mask._asdict()
        return entry


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return STORABLE[dtype].itemsize * math.prod(shape)


def to_text(manifest: dict[str, Any]) -> bytes:
    """The one way in which a manifest is written: sorted keys, a line for each leaf, file and fact.

    Raises:
        ValueError: NaN or infinite numbers, which JSON has not.
    """

    def lines(value: Any, depth: int) -> str:
        if depth == 2 or not isinstance(value, dict) or not value:
            return json.dumps(value, sort_keys=True, allow_nan=False)
        inner = [f"{' ' * (depth + 1)}{json.dumps(key)}: {lines(value[key], depth + 1)}" for key in sorted(value)]
        return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}"

    return (lines(manifest, 0) + "\n").encode("ascii")


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its own digest: sha256 of its text without the digest."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return rest | {"digest": hashlib.sha256(to_text(rest)).hexdigest()}


def plain_data(value: Any, where: str) -> Any:
    """JSON data as it will be read back: tuples as lists.

    Raises:
        ValueError: what JSON has not, or would change.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}: expected text, JSON has no other keys")
        return {key: plain_data(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or type(value) in (str, bool, int) or type(value) is float and math.isfinite(value):
        return value
    raise ValueError(f"{where} is {value!r}: expected plain data for JSON (finite numbers, text, lists, ...)")


def parse(data: bytes) -> tuple[dict[str, Any], list[Leaf]]:
    """Check a manifest's bytes in every way that needs no other file.

    Raises:
        ValueError: what is wrong, without the file's name.
    """
    try:
        manifest = json.loads(data.decode("ascii"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        same = isinstance(manifest, dict) and to_text(manifest) == data
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("is not the ASCII text that an export writes: it was changed or cut") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON ({error}): it was changed or cut") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"is not the manifest of an export: expected 'format': {FORMAT!r}")
    version = manifest.get("version")
    if version != VERSION or isinstance(version, (bool, float)):
        raise ValueError(f"has version {version!r}, this program reads version {VERSION}: export again")
    if manifest != seal(manifest):
        raise ValueError("was changed after it was written: its digest does not fit; export again")
    if not same:
        raise ValueError("was changed after it was written: same content, other text; export again")
    _need(set(manifest) == _FIELDS, f"has fields {sorted(set(manifest) ^ _FIELDS)} too many or too few")
    _need(manifest["kernel_axes"] == list(KERNEL_AXES), f"has kernel axes other than {KERNEL_AXES}")
    _need(manifest["dtype"] in DTYPES, f"has dtype {manifest['dtype']!r}, expected one of {DTYPES}")
    _need(isinstance(manifest["facts"], dict), "has facts that are no object")
    _need(_is_text_map(manifest["software"]), "has software versions that are no text")
    _check_files(manifest["files"])
    _need(isinstance(manifest["leaves"], dict), "has leaves that are no object")
    leaves = [_leaf(name, entry) for name, entry in manifest["leaves"].items()]
    masks = manifest["masks"]
    in_masks = [leaf for leaf in leaves if leaf.in_masks]
    if masks is None:
        _need(not in_masks, "has masks at leaves and none in all")
    else:
        _need(isinstance(masks, dict) and _is_text_map(masks) and set(masks) == {"prefix", "sha256"}, "has bad 'masks'")
        _need(bool(in_masks), "has masks of no leaf")
        _need(all(leaf.name.startswith(masks["prefix"]) for leaf in in_masks), "has masks outside of their prefix")
    dense = sum(leaf.weights * STORABLE[leaf.dtype].itemsize for leaf in leaves if leaf.shape is not None)
    limit = max(MAX_DENSE_BYTES, MAX_DENSE_RATIO * manifest["files"][WEIGHTS]["bytes"])
    _need(dense <= limit, f"declares {dense} bytes of arrays, more than {limit}: refused for its weights' file")
    return manifest, leaves


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("has a key twice: it was changed")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"holds {text}, which is no JSON: it was changed")


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def check_file_name(name: Any) -> None:
    """Raise a ValueError unless this is a plain file name, one that stays inside of its folder."""
    plain = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..")
    if not plain or set(name) & set("/\\:"):
        raise ValueError(f"names the file {name!r}: expected a plain name inside of the folder")


def _check_files(files: Any) -> None:
    _need(isinstance(files, dict) and WEIGHTS in files, f"lists no {WEIGHTS}")
    for name, entry in files.items():
        check_file_name(name)
        _need(name != MANIFEST, f"lists {MANIFEST} itself")
        _need(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"}, f"has a bad entry for {name!r}")
        _need(_is_count(entry["bytes"]), f"has a bad size for {name!r}")
        _need(isinstance(entry["sha256"], str) and len(entry["sha256"]) == _SHA256, f"has a bad sha256 for {name!r}")


def _leaf(name: str, entry: Any) -> Leaf:
    where = f"leaf {name!r}"
    _need(isinstance(entry, dict) and "shape" in entry, f"{where} has no shape")
    in_masks, coding = "mask" in entry, entry.get("mask")
    if entry["shape"] is None:
        _need(set(entry) <= {"shape", "mask"} and coding is None, f"{where} is None and has more than that")
        return Leaf(name, None, in_masks=in_masks)
    required = {"shape", "dtype", "stored"}
    _need(required <= set(entry) <= required | {"key", "mask", "axes"}, f"{where} has bad fields")
    shape, dtype, stored, key = entry["shape"], entry["dtype"], entry["stored"], entry.get("key")
    _need(isinstance(shape, list) and len(shape) <= 32 and all(map(_is_count, shape)), f"{where} has shape {shape!r}")
    # An axis of 0 must not hide others that no array can have.
    _need(math.prod(size or 1 for size in shape) < 2**53, f"{where} has shape {shape!r}")
    for which in (dtype, stored):
        _need(isinstance(which, str) and which in STORABLE, f"{where} has dtype {which!r}")
    _need(stored == dtype or (stored in DTYPES and "float" in dtype), f"{where} of {dtype} is stored as {stored}")
    _need("key" not in entry or isinstance(key, str) and dtype == stored == "uint32", f"{where} has key {key!r}")
    axes = entry.get("axes", "HWIO")
    _need("axes" not in entry or (axes == "OIHW" and len(shape) == 4), f"{where} has axes {axes!r}")
    mask = None if coding is None else _coding(where, coding, tuple(shape))
    return Leaf(name, tuple(shape), dtype, stored, key, in_masks, mask, axes)


def _coding(where: str, entry: Any, shape: tuple[int, ...]) -> Coding:
    _need(isinstance(entry, dict) and set(entry) == set(Coding._fields), f"{where} has a bad mask")
    coding = Coding(**entry)
    taps, cin, cout = view_shape(shape)
    _need(coding.coding in CODINGS, f"{where} has mask coding {coding.coding!r}, expected one of {CODINGS}")
    _need(coding.parts in ("pattern", "kernel", "both"), f"{where} has mask parts {coding.parts!r}")
    _need(type(coding.kernel_weights) is bool, f"{where} has a bad mask")
    kernels = cin * coding.filters if _is_count(coding.filters) else 0
    limits = {"kept": taps * cin * cout, "filters": cout, "kernels": kernels, "patterns": kernels}
    for field, limit in limits.items():
        value = getattr(coding, field)
        _need(_is_count(value) and value <= limit, f"{where} has a mask of {value!r} {field}, at most {limit} fit")
    _need(coding.coding == "weights" or not coding.kernel_weights, f"{where} has a bad mask")
    return coding


def masks_digest(masks: Iterable[tuple[str, FullMask]]) -> str:
    """sha256 of masks by name, the same however they are stored. Patterns count where their kernel stays."""
    digest = hashlib.sha256()
    for name, mask in sorted(masks, key=lambda one: one[0]):
        combined = mask.combined()
        kernel = np.zeros(0, bool)
        if mask.parts == "both":
            kernel = mask.kernel.reshape(view_shape(combined.shape))
            # Whole kernels are the rule, and a ninth of the bits.
            if kernel.strides[0] == 0 or (kernel == kernel[:1]).all():
                kernel = kernel[:1]
        digest.update(json.dumps([name, list(combined.shape), mask.parts, kernel.size]).encode("ascii"))
        digest.update(np.packbits(combined).tobytes())
        digest.update(np.packbits(kernel).tobytes())
    return digest.hexdigest()
