"""Compact storage: a masked tree and its masks in a folder of few bytes, each of them checked."""

from clicktrain_jax.deploy.storage.containers import masks_from_zeros
from clicktrain_jax.deploy.storage.sizes import Bytes, Sizes, sizes
from clicktrain_jax.deploy.storage.store import (
    Stored,
    pack,
    read,
    read_file,
    read_manifest,
    unpack,
    write,
    write_packed,
)

__all__ = [
    "Bytes",
    "Sizes",
    "Stored",
    "masks_from_zeros",
    "pack",
    "read",
    "read_file",
    "read_manifest",
    "sizes",
    "unpack",
    "write",
    "write_packed",
]
