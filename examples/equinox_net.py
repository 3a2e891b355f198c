"""An Equinox net, whose kernels are (filters, channels, height, width): python examples/equinox_net.py [--epochs 8].

Needs `pip install equinox`.
"""

import digits
import equinox as eqx
import jax
import optax

import clicktrain_jax as ct


class Net(eqx.Module):
    """Three convolutions; it knows nothing of pruning."""

    convolutions: list
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        sizes = ((1, 32, 1), (32, 64, 2), (64, 64, 1))
        self.convolutions = [
            eqx.nn.Conv2d(before, after, 3, strides, padding=1, key=one)
            for (before, after, strides), one in zip(sizes, keys)
        ]
        self.head = eqx.nn.Linear(16 * 64, 10, key=keys[3])

    def __call__(self, x):
        """(1, 8, 8) -> logits (10,)."""
        for conv in self.convolutions:
            x = jax.nn.relu(conv(x))
        return self.head(x.reshape(-1))


def main(epochs):
    """Train, and print what came out."""
    (images, labels), (test_images, test_labels) = digits.load()
    images, test_images = (each.transpose(0, 3, 1, 2) for each in (images, test_images))
    params, static = eqx.partition(Net(jax.random.key(0)), eqx.is_inexact_array)

    plan = ct.make_plan(params, {"convolutions/0/weight": None, "convolutions/.*/weight": 0.5}, axes="OIHW")
    steps = digits.steps(labels, epochs)
    optimizer = ct.clicktrain(optax.adam(3e-3), plan, **ct.schedule(steps), coeff=2.5e-4)

    def predict(params, images):
        return jax.vmap(eqx.combine(params, static))(images)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(predict(params, images), labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for batch in digits.batches(images, labels, epochs):
        params, opt_state = train_step(params, opt_state, *batch)

    report = ct.report(params, ct.masks_of(opt_state))
    print(report.to_text())
    top1 = (predict(params, test_images).argmax(-1) == test_labels).mean()
    print(f"top-1 {100 * top1:.1f}%, {report.conv_compression:.1f}x fewer convolution weights")


if __name__ == "__main__":
    main(digits.asked_epochs(__doc__))
