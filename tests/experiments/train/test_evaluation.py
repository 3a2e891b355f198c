"""What `Trainer.evaluate` says of a set of images, against Flax and optax on all of them at once."""

import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import normalise


def test_evaluation_counts_every_image_once(tiny_trainer):
    state = tiny_trainer.init(3)
    loss, top1 = tiny_trainer.evaluate(state)
    data = tiny_trainer.dataset
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = normalise(jnp.asarray(data.eval_images), data.mean, data.std)
    logits = tiny_trainer.model.apply(variables, images, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(data.eval_labels))
    assert len(data.eval_labels) > 500  # more than one batch, the last one partial
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    assert top1 == np.mean(np.asarray(logits).argmax(-1) == data.eval_labels)
