"""A net as one file of StableHLO that jax alone can run: no code of the net, of Flax or of this package is needed.

    with open("net.stablehlo", "rb") as file:
        net = jax.export.deserialize(bytearray(file.read()))
    logits = net.call(images)                           # any number of images

(jax wants the small package flatbuffers to read and to write it.)

Its weights stand inside, as they are read: those that are removed do not. Layers run by their patterns in plain XLA
operations where that should pay, dense elsewhere.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.errors
import jax.export
import numpy as np

from clicktrain_jax.deploy.inference import InferenceNet
from clicktrain_jax.extras import hint

STABLEHLO = "net.stablehlo"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def to_stablehlo(net: InferenceNet) -> bytes:
    """Serialise a net, for any number of images and for CPUs, GPUs and TPUs.

    Args:
        net: of the export. Images are uint8 if it normalises them, float32 otherwise.

    Returns:
        What `jax.export.deserialize` takes; logits are float32 (batch, classes).

    Raises:
        ValueError: flatbuffers, which jax writes it with, is not installed; a function that wants to know the number of
            images.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    try:
        function, prepared = net.portable(batch)
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        raise ValueError(
            f"apply_fn does not serve every number of images, as {STABLEHLO} does ({error}): write x.shape[0] for "
            "len(x) and compare no number with it, or leave the file out, stablehlo=False"
        ) from error
    images = jax.ShapeDtypeStruct((batch, *net.folded.image_shape), net.image_dtype)
    try:
        with _without_paths():
            program = jax.export.export(jax.jit(lambda images: function(prepared, images)), platforms=PLATFORMS)
            return bytes(program(images).serialize())
    except ImportError as error:
        raise ValueError(f"jax wants flatbuffers for {STABLEHLO}: {hint('deploy')}, or leave it out") from error
    except Exception as error:  # whatever jax raises for what cannot stand in a file
        raise ValueError(
            f"apply_fn cannot be written as {STABLEHLO} ({type(error).__name__}: {error}): it runs without Python, on "
            "any device. Leave callbacks (jax.debug.print, jax.pure_callback) and what one device alone can do out of "
            "apply_fn, or leave the file out, stablehlo=False"
        ) from error


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """No names of this machine's files in what jax writes: they tell nobody else anything, and change its bytes."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


class PortableNet:
    """A net that was read from StableHLO; made by `clicktrain_jax.load` where no code of the net is at hand.

    Attributes:
        manifest: of the export.
    """

    def __init__(self, data: bytes, manifest: Mapping[str, Any]) -> None:
        """Made by `clicktrain_jax.load`.

        Args:
            data: of `to_stablehlo`.
            manifest: of the export.

        Raises:
            ValueError: this version of jax cannot read it.
        """
        try:
            self._exported = jax.export.deserialize(bytearray(data))
        except ImportError as error:
            raise ValueError(f"jax wants flatbuffers to read {STABLEHLO}: {hint('deploy')}") from error
        except Exception as error:  # whatever another version's bytes make jax raise
            raise ValueError(f"{STABLEHLO} cannot be read by jax {jax.__version__}: {error}") from error
        self.manifest = manifest
        self._call = jax.jit(self._exported.call)
        (self._images,) = self._exported.in_avals

    def __repr__(self) -> str:
        return f"PortableNet({self._images.dtype} images {' x '.join(map(str, self._images.shape[1:]))})"

    def __call__(self, images: Any) -> jax.Array:
        """Classify images.

        Args:
            images: (batch, height, width, channels) of the dtype that was exported.

        Returns:
            float32 logits (batch, classes).

        Raises:
            ValueError: images of another shape or dtype.
        """
        shape, dtype = np.shape(images), getattr(images, "dtype", None)
        expected = self._images.shape[1:]
        if len(shape) != 4 or shape[1:] != expected or shape[0] < 1 or dtype != self._images.dtype:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"images are {dtype} {shape}; expected {np.dtype(self._images.dtype)} (batch, {sizes})")
        return self._call(images)
