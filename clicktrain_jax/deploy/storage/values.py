"""The values of one leaf as they are stored: as they are, or narrowed to fewer bits."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.trees import is_key

DTYPES = ("float32", "bfloat16", "float16", "int8")
_NAMES = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16", "float32",
    "float64",
)  # fmt: skip
# What can be stored, by name. jax.numpy knows bfloat16 where numpy does not.
STORABLE: dict[str, np.dtype] = {name: np.dtype(getattr(jnp, name)) for name in _NAMES}
INT8_MAX = 127


def to_numpy(name: str, leaf: Any) -> tuple[np.ndarray, str | None]:
    """A leaf as a numpy array, and the implementation's name when it is a typed random key.

    Raises:
        ValueError: no array, or a dtype that cannot be stored.
    """
    key = None
    if isinstance(leaf, jax.Array) and is_key(leaf):
        key = str(jax.random.key_impl(leaf))
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"{name!r} is a ShapeDtypeStruct: expected an array, there are no values to store")
    array = np.asarray(leaf)
    if array.dtype.name not in STORABLE:
        raise ValueError(f"{name!r} has dtype {array.dtype}, which cannot be stored: expected one of {list(STORABLE)}")
    return np.ascontiguousarray(array).reshape(array.shape), key


def stored_dtype(array: np.ndarray, masked: bool, dtype: str) -> str:
    """Name of the dtype that a leaf is stored in, when the export's is ``dtype``.

    Masked leaves and all of rank 2 and more are narrowed, if they are floating and wider. Vectors (biases,
    BatchNorm's) stay as they are: they are small and their rounding costs much.
    """
    narrow = STORABLE[dtype]
    own = array.dtype
    if dtype == "float32" or not (masked or array.ndim >= 2) or not jnp.issubdtype(own, jnp.floating):
        return own.name
    return dtype if narrow.itemsize < own.itemsize else own.name


def narrow(name: str, array: np.ndarray, keep: np.ndarray | None, stored: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The values to store, and for int8 the scales.

    Args:
        name: of the leaf, for errors.
        array: of any shape.
        keep: bool of that shape, or None.
        stored: from `stored_dtype`.

    Returns:
        Values in ``stored``: of the array's shape, or with a mask (kept,), in the array's C order. Scales: None, or
        float32 (cout,), one a filter (last axis; one for all below rank 2): the value is the integer times the scale.

    Raises:
        ValueError: float16 or bfloat16 would make a finite value infinite; int8 of NaN or infinite values.
    """
    if stored == array.dtype.name:
        return (array if keep is None else array[keep]), None
    if stored == "int8":
        return _to_int8(name, array, keep)
    values = array if keep is None else array[keep]
    with np.errstate(over="ignore", invalid="ignore"):
        narrowed = values.astype(STORABLE[stored])
    lost = np.isfinite(values) & ~np.isfinite(narrowed)
    if lost.any():
        worst = np.abs(values[lost].astype(np.float64)).max()
        raise ValueError(
            f"{name!r} holds {worst:.4g}, which is infinite in {stored}: store it in bfloat16 or float32 instead"
        )
    return narrowed, None


def _to_int8(name: str, array: np.ndarray, keep: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    wide = array.astype(np.promote_types(array.dtype, np.float32), copy=False)
    if keep is not None:
        wide = np.where(keep, wide, wide.dtype.type(0))
    if not np.isfinite(wide).all():
        raise ValueError(f"{name!r} holds NaN or infinite values, which int8 cannot hold: store it in float32")
    largest = np.abs(_by_filter(wide)).max(axis=0, initial=0.0).astype(np.float64)
    if largest.max(initial=0.0) > np.finfo(np.float32).max:
        raise ValueError(f"{name!r} holds {largest.max():.4g}, beyond the float32 scales of int8: store it in float64")
    scale = (largest / INT8_MAX).astype(np.float32)
    # At the edge of float32 the rounded scale could make the largest value infinite.
    safe = scale.astype(np.float64) * INT8_MAX <= np.finfo(np.float32).max
    scale = np.where(safe, scale, np.nextafter(scale, np.float32(0)))
    # A filter of zeros, or of values too small for a scale, has scale 0 and comes back as zeros.
    divisor = np.where(scale > 0, scale, np.float32(1))
    rounded = np.rint(_by_filter(wide) / divisor).clip(-INT8_MAX, INT8_MAX)
    integers = np.where(scale > 0, rounded, 0).astype(np.int8).reshape(array.shape)
    return (integers if keep is None else integers[keep]), scale


def widen(
    values: np.ndarray, scale: np.ndarray | None, keep: np.ndarray | None, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    """The inverse of `narrow` but for what rounding took: shape and dtype of the leaf, +0 where masked."""
    own = STORABLE[dtype]
    if scale is None and keep is None:
        return values.astype(own).reshape(shape)
    whole = np.zeros(shape, own if scale is None else np.float32)
    if keep is None:
        whole[...] = values
    else:
        whole.reshape(-1)[np.flatnonzero(keep)] = values  # twice as fast as whole[keep]
    if scale is not None:
        whole = (_by_filter(whole) * scale).reshape(shape)
    return whole.astype(own, copy=False)


def num_filters(shape: tuple[int, ...]) -> int:
    """How many scales an int8 leaf has: its last axis, or 1 for all of a vector."""
    return shape[-1] if len(shape) >= 2 else 1


def _by_filter(array: np.ndarray) -> np.ndarray:
    return array.reshape(math.prod(array.shape[:-1]) if array.ndim >= 2 else array.size, num_filters(array.shape))
