"""A Flax NNX net with nnx.Optimizer, pruned while it is trained: python examples/nnx_net.py [--epochs 8]."""

import digits
import jax.numpy as jnp
import optax
from flax import nnx

import clicktrain_jax as ct


class Net(nnx.Module):
    """Three convolutions with BatchNorm; it knows nothing of pruning."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.body = nnx.List([nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs), nnx.Conv(64, 64, (3, 3), rngs=rngs)])
        self.norms = nnx.List([nnx.BatchNorm(64, momentum=0.9, rngs=rngs) for _ in self.body])
        self.head = nnx.Linear(16 * 64, 10, rngs=rngs)

    def __call__(self, x):
        """(N, 8, 8, 1) -> logits (N, 10)."""
        x = nnx.relu(self.stem(x))
        for conv, norm in zip(self.body, self.norms):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.reshape(len(x), -1))


def loss(model, images, labels):
    """Mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    """One update, in place."""
    optimizer.update(model, nnx.grad(loss)(model, images, labels))


def main(epochs):
    """Train, and print what came out."""
    (images, labels), (test_images, test_labels) = digits.load()
    model = Net(nnx.Rngs(0))
    # Paths are those of the state: "body/0/kernel".
    plan = ct.make_plan(nnx.state(model, nnx.Param), {"stem/kernel": None, "body/.*/kernel": 0.5})
    steps = digits.steps(labels, epochs)
    wrapped = ct.clicktrain(optax.adam(3e-3), plan, **ct.schedule(steps), coeff=2.5e-4)
    optimizer = nnx.Optimizer(model, wrapped, wrt=nnx.Param)
    for batch in digits.batches(images, labels, epochs):
        train_step(model, optimizer, *map(jnp.asarray, batch))

    model.eval()
    report = ct.report(nnx.state(model, nnx.Param), ct.masks_of(optimizer))
    print(report.to_text())
    top1 = (model(test_images).argmax(-1) == test_labels).mean()
    print(f"top-1 {100 * top1:.1f}%, {report.conv_compression:.1f}x fewer convolution weights")


if __name__ == "__main__":
    main(digits.asked_epochs(__doc__))
