"""Where a run's arrays lie: on one device, or divided over a mesh of them.

On a mesh the parameters, BatchNorm's statistics and the optimizer's state are whole on every device, and a batch's
images are divided. XLA's partitioner does the rest: it sums gradients and statistics over all devices, so that every
device makes the same update of the same numbers and chooses the same masks. With one device there is no mesh, and the
programs are those that know of none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.configs.base import TrainConfig
from experiments.data import Dataset
from experiments.train.state import Images

AXIS = "batch"


class Devices:
    """The devices of a run.

    Args:
        devices: at least one.

    Attributes:
        count: how many.
        mesh: of one axis, "batch"; None for one device.
        everywhere: the sharding of what is whole on every device; None for one device.
    """

    def __init__(self, devices: Sequence[Any] = (None,)) -> None:
        self.count = len(devices)
        self.mesh = Mesh(np.asarray(devices), (AXIS,)) if self.count > 1 else None
        self.everywhere = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def whole(self, tree: Any) -> Any:
        """A tree of arrays, whole on every device; all processes have the same values."""
        return tree if self.mesh is None else jax.tree.map(self._whole, tree)

    def _whole(self, leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(self._whole(jax.random.key_data(leaf)))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, self.everywhere, lambda index: host[index])

    def placed(self, shapes: Any) -> Any:
        """A tree of `jax.ShapeDtypeStruct` that says they are whole on every device."""
        if self.mesh is None:
            return shapes
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.everywhere), shapes)

    def images(self, images: np.ndarray, labels: np.ndarray) -> Images:
        """A set on the one device; on the host for several."""
        return Images(images, labels) if self.mesh is not None else Images(jnp.asarray(images), jnp.asarray(labels))

    def share(self, batch: int) -> int:
        """How many images of a batch that is divided this process reads."""
        return batch if self.mesh is None else batch * self.mesh.local_mesh.size // self.count

    def batch(self, images: np.ndarray, labels: np.ndarray) -> Images:
        """A batch that is divided over the devices, of the share of it that this process reads."""
        if self.mesh is None:
            return Images(*jax.device_put((images, labels)))
        place = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return Images(*(jax.make_array_from_process_local_data(place, array) for array in (images, labels)))

    def spec(self, batch: int, axis: int = 0) -> PartitionSpec:
        """How arrays with so many images along an axis lie: divided; whole where they cannot be."""
        return PartitionSpec(*[None] * axis, None if batch % self.count else AXIS)

    def divided(self, tree: Any, axis: int = 0) -> Any:
        """The same arrays inside of a program, divided along an axis where they can be."""
        if self.mesh is None:
            return tree

        def place(leaf: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, self.spec(leaf.shape[axis], axis)))

        return jax.tree.map(place, tree)

    def each(self, function: Callable[..., Any], batch: int) -> Callable[..., Any]:
        """A function of so many images, and of arrays with one entry an image, that treats each image by itself."""
        if self.mesh is None or batch % self.count:
            return function
        place = PartitionSpec(AXIS)
        return jax.shard_map(function, mesh=self.mesh, in_specs=place, out_specs=place)

    def epoch_images(self, dataset: Dataset, order: np.ndarray, batch: int, updates: int, tail: int) -> dict[int, Any]:
        """What an epoch trains on, in its order, by the size of batch.

        Args:
            dataset: on the host; a process reads the images of its own devices alone.
            order: int (N,), numbers of images.
            batch: images of an update.
            updates: of that size.
            tail: images of one smaller update after them; 0 for none.

        Returns:
            ``{size of batch: Images (updates, size, ...)}``, divided along the second axis.
        """
        parts = {batch: order[: updates * batch].reshape(updates, batch)} if updates else {}
        if tail:
            parts[tail] = order[updates * batch :][:tail].reshape(1, tail)

        def put(array: np.ndarray, numbers: np.ndarray) -> jax.Array:
            place = NamedSharding(self.mesh, self.spec(numbers.shape[1], 1))
            shape = (*numbers.shape, *array.shape[1:])
            return jax.make_array_from_callback(shape, place, lambda index: array[numbers[index[:2]]])

        return {
            size: Images(put(dataset.train_images, numbers), put(dataset.train_labels, numbers))
            for size, numbers in parts.items()
        }


def devices_of(config: TrainConfig) -> Devices:
    """The devices that a config asks for: all that jax sees unless it says otherwise.

    Raises:
        ValueError: more than jax sees; a batch that they cannot divide.
    """
    seen, asked = jax.devices(), config.loop.devices
    if asked is not None and asked > len(seen):
        raise ValueError(
            f"loop.devices={asked}: jax sees {len(seen)} of {seen[0].platform} here; ask for fewer, or leave it out"
        )
    if asked is not None and asked < len(seen) and jax.process_count() > 1:
        raise ValueError(
            f"loop.devices={asked}: {jax.process_count()} processes use all of their {len(seen)} devices; leave "
            "it out, and give each process fewer"
        )
    found = Devices(seen[:asked])
    # Shards lie whole on a device; of one batch, and of each of those that follow each other, all devices have a part.
    what, divided = "shards", config.shards
    if config.shards == 1:
        what, divided = "batch_size", config.batch_size // config.accumulate
        what = f"{what} / accumulate" if config.accumulate > 1 else what
    if divided % found.count:
        fewer = max(count for count in range(1, found.count) if divided % count == 0)
        raise ValueError(
            f"{what}={divided} cannot be divided over {found.count} devices: choose a multiple of {found.count}, "
            f"or --loop.devices {fewer}"
        )
    return found
