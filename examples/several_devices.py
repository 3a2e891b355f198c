"""Data-parallel training on several devices; on a CPU two are made: python examples/several_devices.py [--epochs 8].

Batches are split over the devices, weights and optimizer state are whole on each. Under `jit` the gradients are those
of the whole batch, so that every device chooses the same masks.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")  # read when jax starts

import digits  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from linen_net import Net  # noqa: E402

import clicktrain_jax as ct  # noqa: E402


def main(epochs):
    """Train on all devices, and print what came out."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    (images, labels), (test_images, test_labels) = digits.load()
    model = Net()
    params = model.init(jax.random.key(0), images[:1])["params"]
    plan = ct.make_plan(params, None, target=6.0)
    steps = digits.steps(labels, epochs)
    optimizer = ct.clicktrain(optax.adam(3e-3), plan, **ct.schedule(steps), coeff=2.5e-4)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        def loss(params):
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = jax.device_put((params, optimizer.init(params)), whole)
    for batch in digits.batches(images, labels, epochs):
        params, opt_state = train_step(params, opt_state, *jax.device_put(batch, split))

    zeros = [int((np.asarray(shard.data) == 0).sum()) for shard in params["Conv_2"]["kernel"].addressable_shards]
    print(f"{len(zeros)} devices, zeros in Conv_2 on each: {zeros}")
    report = ct.report(params, ct.masks_of(opt_state))
    top1 = (model.apply({"params": params}, test_images).argmax(-1) == test_labels).mean()
    print(f"top-1 {100 * top1:.1f}%, {report.conv_compression:.1f}x fewer convolution weights")


if __name__ == "__main__":
    main(digits.asked_epochs(__doc__))
