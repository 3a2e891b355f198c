"""A trained net, loaded from its checkpoint, pruned and fine-tuned: python examples/pretrained.py [--epochs 6].

The dense net is trained first and saved, in place of one of your own. Then: a small learning rate, a selection after
a few updates, the prune soon after, and fine-tuning for the rest.
"""

import tempfile
from pathlib import Path

import digits
import jax
import numpy as np
import optax
from linen_net import Net

import clicktrain_jax as ct

MODEL = Net()


def loss(params, images, labels):
    """Mean cross entropy."""
    logits = MODEL.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(params, optimizer, batches):
    """The same loop for both: parameters and optimizer state after all batches."""

    @jax.jit
    def step(params, state, images, labels):
        updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for batch in batches:
        params, state = step(params, state, *batch)
    return params, state


def top1(params, images, labels):
    """In percent."""
    return 100 * float((MODEL.apply({"params": params}, images).argmax(-1) == labels).mean())


def main(epochs):
    """Train dense, save, load, prune, fine-tune."""
    (images, labels), test = digits.load()
    params = MODEL.init(jax.random.key(0), images[:1])["params"]
    dense, _ = train(params, optax.adam(3e-3), digits.batches(images, labels, epochs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.npz"
        np.savez(path, *jax.tree.leaves(dense))
        loaded = np.load(path)
        loaded = jax.tree.unflatten(jax.tree.structure(params), [loaded[name] for name in loaded.files])
    print(f"dense: top-1 {top1(loaded, *test):.1f}%")

    plan = ct.make_plan(loaded, None, target=6.0)
    # Scores are the mean over the first 8 updates: at trained weights a single gradient says little.
    pruning = ct.clicktrain(
        optax.adam(1e-3),
        plan,
        select_step=8,
        prune_step=digits.steps(labels, epochs) // 3,
        coeff=2.5e-4,
        importance="group_taylor",
        importance_steps=8,
    )
    tuned, state = train(loaded, pruning, digits.batches(images, labels, epochs))
    masks = ct.masks_of(state)
    print(f"pruned at once: top-1 {top1(ct.apply_masks(loaded, masks), *test):.1f}%")
    compression = ct.report(tuned, masks).conv_compression
    print(f"fine-tuned: top-1 {top1(tuned, *test):.1f}%, {compression:.1f}x fewer convolution weights")


if __name__ == "__main__":
    main(digits.asked_epochs(__doc__, default=6))
