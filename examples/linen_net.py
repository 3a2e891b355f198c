"""A Flax linen net, pruned 6x while it is trained: python examples/linen_net.py [--epochs 8]."""

import digits
import flax.linen as nn
import jax
import optax

import clicktrain_jax as ct


class Net(nn.Module):
    """Four convolutions; it knows nothing of pruning."""

    @nn.compact
    def __call__(self, x):
        """(N, 8, 8, 1) -> logits (N, 10)."""
        for width, strides in ((16, 1), (32, 2), (64, 1), (64, 1)):
            x = nn.relu(nn.Conv(width, (3, 3), strides=strides)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def main(epochs):
    """Train, and print what came out."""
    (images, labels), (test_images, test_labels) = digits.load()
    model = Net()
    params = model.init(jax.random.key(0), images[:1])["params"]

    plan = ct.make_plan(params, None, target=6.0)  # 6x over all convolutions; the first one stays dense
    print(plan)
    steps = digits.steps(labels, epochs)
    optimizer = ct.clicktrain(optax.adam(3e-3), plan, **ct.schedule(steps), coeff=2.5e-4)

    def loss(params, images, labels):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def train_step(params, opt_state, images, labels):
        grads = jax.grad(loss)(params, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for batch in digits.batches(images, labels, epochs):
        params, opt_state = train_step(params, opt_state, *batch)

    report = ct.report(params, ct.masks_of(opt_state))
    print(ct.status(opt_state))
    print(report.to_text())
    top1 = (model.apply({"params": params}, test_images).argmax(-1) == test_labels).mean()
    print(f"top-1 {100 * top1:.1f}%, {report.conv_compression:.1f}x fewer convolution weights")


if __name__ == "__main__":
    main(digits.asked_epochs(__doc__))
