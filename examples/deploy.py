"""From a pruned net to a small file, and back: python examples/deploy.py [--epochs 4]. Needs the extra [deploy]."""

import tempfile
from pathlib import Path

import digits
import jax
import numpy as np
import optax
from linen_net import Net

import clicktrain_jax as ct


def main(epochs):
    """Train briefly, then accelerate, export, load and compare."""
    (images, labels), (test_images, test_labels) = digits.load()
    model = Net()
    params = model.init(jax.random.key(0), images[:1])["params"]
    # Filters in tiles of 16 share a pattern and a removal: what convolutions by patterns run fastest.
    plan = ct.make_plan(params, None, target=6.0, tile=(16, 1))
    steps = digits.steps(labels, epochs)
    optimizer = ct.clicktrain(optax.adam(3e-3), plan, **ct.schedule(steps), coeff=2.5e-4)

    def predict(variables, images):
        return model.apply(variables, images)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        def loss(params):
            logits = predict({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for batch in digits.batches(images, labels, epochs):
        params, opt_state = train_step(params, opt_state, *batch)
    variables, masks = {"params": params}, ct.masks_of(opt_state)
    wanted = predict(variables, test_images)

    # Your own code, its convolutions by their patterns.
    fast = ct.accelerate(predict, masks)
    print(fast.report(variables, test_images).to_text())
    print(f"accelerated: largest difference {np.abs(fast(variables, test_images) - wanted).max():.1e}")

    # A folder: weights.safetensors holds what is kept.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.export"
        ct.export(path, predict, variables, masks, image_shape=(8, 8, 1), stablehlo=False)
        stored = (path / "weights.safetensors").stat().st_size
        dense = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        net = ct.load(path, predict)
        print(f"loaded: largest difference {np.abs(net(test_images) - wanted).max():.1e}")
        top1 = (np.asarray(net(test_images)).argmax(-1) == test_labels).mean()
    print(f"{dense:,} bytes of dense weights, {stored:,} stored")
    compression = ct.report(params, masks).conv_compression
    print(f"top-1 {100 * top1:.1f}%, {compression:.1f}x fewer convolution weights")


if __name__ == "__main__":
    main(digits.asked_epochs(__doc__, default=4))
