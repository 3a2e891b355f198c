"""One update of a run, in two pure functions: the gradient on a batch, and what a phase does with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clicktrain_jax.phases import Phase
from experiments.data import augment, mixup, normalise
from experiments.train_state import Held, Images, TrainState

# Of the run's key: experiments.step has the streams before it.
_STEP = 2


class Gradient(NamedTuple):
    """What a batch says.

    Attributes:
        grads: tree like the parameters.
        batch_stats: BatchNorm's new statistics.
        loss: float32 scalar, without group lasso.
        top1: float32 scalar, share of the batch that was classified as labelled.
    """

    grads: Any
    batch_stats: Any
    loss: jax.Array
    top1: jax.Array


def gradient_of(trainer: Any, mix: bool, batch: int, way: str) -> Callable[..., Gradient]:
    """The gradient on one batch, as a pure function.

    ``(params, batch_stats, step, data, order, index, key, structures) -> Gradient``; ``index`` counts updates in the
    epoch and the batch is ``order[index * batch_size:][:batch]``; ``way`` says how the convolutions are run.
    """
    config, dataset, model, forward = trainer.config, trainer.dataset, trainer.models[way], trainer.method.forward

    def loss_of(params: Any, batch_stats: Any, structures: Any, images: Any, labels: tuple, key: jax.Array) -> Any:
        held = {"structures": structures} if structures else {}
        logits, new = model.apply(
            {"params": forward(params), "batch_stats": batch_stats, **held},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        first, second, lam = labels
        losses = optax.softmax_cross_entropy_with_integer_labels
        loss = losses(logits, first).mean()
        guess = logits.argmax(-1)
        top1 = (guess == first).mean()
        if mix:
            loss = lam * loss + (1 - lam) * losses(logits, second).mean()
            top1 = lam * top1 + (1 - lam) * (guess == second).mean()
        return loss, (new["batch_stats"], top1)

    def gradient(
        params: Any, batch_stats: Any, step: Any, data: Images, order: Any, index: Any, key: Any, structures: Any
    ) -> Gradient:
        step_key = jax.random.fold_in(jax.random.fold_in(key, _STEP), step)
        augment_key, mixup_key, dropout_key = jax.random.split(step_key, 3)
        chosen = jax.lax.dynamic_slice(order, (index * config.batch_size,), (batch,))
        images = augment(augment_key, data.images[chosen], pad=config.crop_padding, flip=config.flip)
        images = normalise(images, dataset.mean, dataset.std)
        labels = (data.labels[chosen], None, None)
        if mix:
            images, labels = mixup(mixup_key, images, labels[0], config.mixup_alpha)
        (loss, (batch_stats, top1)), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, batch_stats, structures, images, labels, dropout_key
        )
        return Gradient(grads, batch_stats, loss, top1)

    return gradient


def change_of(trainer: Any, phase: Phase, gathers: bool) -> Callable[..., Any]:
    """What a phase does with a gradient, as a pure function.

    ``(state, metrics, index, gradient, masks) -> (state, metrics, chosen)``; ``chosen`` is None except for SELECT. In
    the dense phase the optimizer's update is called as it is: no mask, no conditional. With ``gathers`` the update's
    scores are added to the state's.
    """
    updates, optimizer = trainer.updates, optax.with_extra_args_support(trainer.optimizer)

    def change(
        state: TrainState, metrics: Any, index: Any, gradient: Gradient, masks: Any
    ) -> tuple[TrainState, Any, Any]:
        grads, loss = gradient.grads, gradient.loss
        arguments = (grads, state.opt_state, state.params)
        chosen, scores = None, state.scores
        if gathers:
            scores = updates.gather(scores, grads, state.params)
        if phase == Phase.SELECT:
            chosen = updates.select(grads, state.params, scores)
            scores = jax.tree.map(jnp.zeros_like, scores)
        if phase <= Phase.SELECT:
            moved, opt_state = optimizer.update(*arguments, value=loss)
        else:
            by_phase = {
                Phase.REGULARIZE: updates.regularize, Phase.PRUNE: updates.prune, Phase.PRUNED: updates.pruned,
            }
            moved, opt_state = by_phase[phase](*arguments, masks, value=loss)
        params = optax.apply_updates(state.params, moved)
        metrics = metrics.at[index].set(jnp.stack([loss, gradient.top1]).astype(jnp.float32))
        return TrainState(state.step + 1, params, gradient.batch_stats, opt_state, scores), metrics, chosen

    return change


def evaluation_of(trainer: Any, batch: int) -> Callable[..., jax.Array]:
    """Evaluation on so many images: ``(params, batch_stats, data, begin) -> float32 [sum of losses, correct ones]``."""

    def evaluate(params: Any, batch_stats: Any, data: Images, begin: Any) -> jax.Array:
        images = jax.lax.dynamic_slice_in_dim(data.images, begin, batch)
        labels = jax.lax.dynamic_slice_in_dim(data.labels, begin, batch)
        images = normalise(images, trainer.dataset.mean, trainer.dataset.std)
        variables = {"params": trainer.method.forward(params), "batch_stats": batch_stats}
        logits = trainer.model.apply(variables, images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.stack([losses.sum(), (logits.argmax(-1) == labels).sum().astype(jnp.float32)])

    return evaluate


def update_step(
    trainer: Any, phase: Phase, mix: bool, batch: int, gathers: bool = False, way: str = "dense"
) -> Callable[..., Any]:
    """One whole update as a pure function.

    ``(state, metrics, data, order, index, key, held) -> (state, metrics, chosen)``; ``held`` is `Held` from the
    regularize phase on, None before; the others are those of `gradient_of` and `change_of`.
    """
    gradient, change = gradient_of(trainer, mix, batch, way), change_of(trainer, phase, gathers)

    def step(
        state: TrainState, metrics: Any, data: Images, order: Any, index: Any, key: Any, held: Any
    ) -> tuple[TrainState, Any, Any]:
        # Masks are a pair as well: taken for one another they would train on, wrongly.
        if held is not None and not isinstance(held, Held):
            raise TypeError(f"held is Held(masks, structures) or None, got {type(held).__name__}")
        masks, structures = (None, {}) if held is None else held
        found = gradient(state.params, state.batch_stats, state.step, data, order, index, key, structures)
        return change(state, metrics, index, found, masks)

    return step
