"""One update of a run, in pure functions: the gradient on a batch, what it says of importance, what a phase does."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clicktrain_jax import models, reduction
from clicktrain_jax.methods import Method
from experiments.configs.base import TrainConfig
from experiments.data import normalise
from experiments.data.augment import Crops, Mixture, crop, draw_crops, draw_mixture, mix
from experiments.train.devices import AXIS
from experiments.train.parts import in_parts
from experiments.train.state import Images, TrainState

# Beside the structures; no module has such a name.
_RETAINED = "retained weights"
# Entries of an array that a kernel of its own would be more trouble than work for.
SMALL = 2**13
# Of the run's key: experiments.train.step and compiled have the streams before it.
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


def mixes(config: TrainConfig, epoch: int) -> bool:
    """Whether an epoch's images are mixed up."""
    if config.mixup_epoch is None or config.mixup_alpha == 0:
        return False
    if epoch >= config.epochs:  # after the dense run: none in ADMM's epochs, the dense schedule's tail afterwards
        after = epoch - config.epochs - (config.admm.epochs if config.admm else 0)
        if after < 0:
            return False
        epoch = config.epochs - config.retrain.epochs + after
    return epoch >= config.mixup_epoch


class Drawn(NamedTuple):
    """What chance decides in an update; of many updates, with an axis for them before the others.

    Attributes:
        crops: None where images are neither cropped nor flipped.
        mixture: None in a run that never mixes images; in its epochs that do not, each image keeps all of itself.
        dropout: a key.
    """

    crops: Crops | None
    mixture: Mixture | None
    dropout: jax.Array


def draw_of(trainer: Any, batch: int) -> Callable[[Any, Any], Drawn]:
    """``(key of the run, updates done) -> Drawn``, a pure function. The sampler of mixup's lambda has loops in it."""
    config = trainer.config
    mixed_epochs = np.asarray([mixes(config, epoch) for epoch in range(config.total_epochs)])

    def draw(key: Any, step: Any) -> Drawn:
        step_key = jax.random.fold_in(jax.random.fold_in(key, _STEP), step)
        augment_key, mixup_key, dropout_key = jax.random.split(step_key, 3)
        crops = mixture = None
        if config.crop_padding or config.flip:
            crops = draw_crops(augment_key, batch, pad=config.crop_padding, flip=config.flip)
        if mixed_epochs.any():
            now = jnp.asarray(mixed_epochs).at[step // trainer.steps_per_epoch].get(mode="clip")
            mixture = draw_mixture(mixup_key, batch, config.mixup_alpha)
            mixture = mixture._replace(lam=jnp.where(now, mixture.lam, 1))
        return Drawn(crops, mixture, dropout_key)

    return draw


def gradient_of(trainer: Any, batch: int, way: str) -> Callable[..., Gradient]:
    """The gradient on one batch, as a pure function.

    ``(params, batch_stats, step, data, order, index, key, structures) -> Gradient``; ``index`` counts updates in the
    epoch and the batch is ``order[index * batch_size:][:batch]``, or all of ``data`` where ``order`` is None; ``way``
    says how the convolutions are run. One program serves epochs with mixup and without: compiling it is most of what a
    short run waits for.
    """
    draw, of_drawn = draw_of(trainer, batch), gradient_of_drawn(trainer, batch, way)

    def gradient(
        params: Any, batch_stats: Any, step: Any, data: Images, order: Any, index: Any, key: Any, structures: Any
    ) -> Gradient:
        return of_drawn(params, batch_stats, data, order, index, draw(key, step), structures)

    return gradient


def gradient_of_drawn(trainer: Any, batch: int, way: str) -> Callable[..., Gradient]:
    """`gradient_of` with what was drawn before: ``(params, batch_stats, data, order, index, drawn, structures)``."""
    config, dataset, model, forward = trainer.config, trainer.dataset, trainer.models[way], trainer.method.forward
    devices = trainer.devices

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
        losses = functools.partial(cross_entropy, smoothing=config.label_smoothing, scatters=trainer.on_cpu)
        loss = losses(logits, first).mean()
        guess = logits.argmax(-1)
        top1 = (guess == first).mean()
        if lam is not None:
            loss = lam * loss + (1 - lam) * losses(logits, second).mean()
            top1 = lam * top1 + (1 - lam) * (guess == second).mean()
        return loss, (new["batch_stats"], top1)

    def summed(found: Gradient, retained: Any) -> Gradient:
        if retained is None:
            return jax.lax.psum(found, AXIS)
        grads = reduction.pmean(found.grads, retained, AXIS, reduce=jax.lax.psum)
        return Gradient(grads, *jax.lax.psum(tuple(found[1:]), AXIS))

    def of_images(*arguments: Any) -> Gradient:
        (loss, (batch_stats, top1)), grads = jax.value_and_grad(loss_of, has_aux=True)(*arguments)
        return Gradient(grads, batch_stats, loss, top1)

    of_batch = in_parts(
        of_images,
        devices,
        accumulate=config.accumulate,
        shards=config.shards,
        ordered=config.loop.ordered,
        unrolled=trainer.on_cpu and not trainer.scan,
        summed=summed,
    )

    def gradient(
        params: Any, batch_stats: Any, data: Images, order: Any, index: Any, drawn: Drawn, structures: Any
    ) -> Gradient:
        structures, retained = _parted(structures)

        def seen(images: jax.Array, crops: Crops | None) -> jax.Array:
            if crops is not None:
                images = devices.each(functools.partial(crop, pad=config.crop_padding), batch)(crops, images)
            return normalise(images, dataset.mean, dataset.std)

        chosen = partners = None
        if order is None:
            images, label = data
        elif devices.mesh is None:
            chosen = jax.lax.dynamic_slice(order, (index * config.batch_size,), (batch,))
            images, label = data.images[chosen], data.labels[chosen]
        else:
            # A last, smaller batch is alone in its array: whatever its index, the only one is taken.
            images, label = (jax.lax.dynamic_index_in_dim(array, index, keepdims=False) for array in data)
        images = seen(images, drawn.crops)
        labels = (label, label, None)
        if drawn.mixture is not None:
            if chosen is not None and not trainer.on_cpu:
                # Each is gathered twice, in the kernel that mixes, rather than all of them in a kernel of its own.
                partner = drawn.mixture.partner
                theirs, crops = jax.tree.map(lambda array: array[partner], (chosen, drawn.crops))
                partners = seen(data.images[theirs], crops)
            images, labels = mix(drawn.mixture, images, label, partners)
        images, *both = devices.divided((images, *labels[:2]))
        labels = (*both, labels[2])
        return of_batch(params, batch_stats, structures, images, labels, drawn.dropout, retained)

    return gradient


def with_retained(structures: dict[str, Any], retained: reduction.Retained) -> dict[str, Any]:
    """Structures for an update whose devices send each other these weights' gradients alone."""
    return {**structures, _RETAINED: retained}


def _parted(structures: dict[str, Any]) -> tuple[dict[str, Any], reduction.Retained | None]:
    return {name: held for name, held in structures.items() if name != _RETAINED}, structures.get(_RETAINED)


def change_of(trainer: Any, kind: str) -> Callable[..., Any]:
    """What an update does with a gradient, ``(state, metrics, index, gradient) -> (state, metrics)``, a pure function.

    ``kind`` is a field of `clicktrain_jax.PhaseUpdates`; a run without them has the optimizer's own update.
    """
    plain = optax.with_extra_args_support(trainer.optimizer).update
    update = plain if trainer.updates is None else getattr(trainer.updates, kind)
    if kind == "masked":
        update = _as_due(update, trainer.schedule)

    def change(state: TrainState, metrics: Any, index: Any, gradient: Gradient) -> tuple[TrainState, Any]:
        loss = gradient.loss
        moved, opt_state = update(gradient.grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, moved)
        row = jnp.stack([loss, gradient.top1]).astype(jnp.float32)
        # Not a slice that is written: where many small arrays are written by one kernel, these numbers are too.
        metrics = jnp.where(jnp.arange(len(metrics))[:, None] == index, row, metrics)
        average = ()
        if trainer.config.ema_epochs:
            first = (trainer.config.total_epochs - trainer.config.ema_epochs) * trainer.steps_per_epoch
            average = averaged(
                state.average, (params, gradient.batch_stats), state.step - first, trainer.config.ema_decay
            )
        return TrainState(state.step + 1, params, gradient.batch_stats, opt_state, average), metrics

    return change


def averaged(average: Any, now: Any, done: Any, decay: float) -> Any:
    """An exponential moving average, one update on.

    Args:
        average: tree, before.
        now: tree like it: what the update made.
        done: int scalar, updates averaged so far; below 1 the average begins, as ``now``.
        decay: weight of what was; of the first updates less, so that where it began counts no more than others.
    """
    held = jnp.minimum(decay, (1.0 + done) / (10.0 + done)).astype(jnp.float32)
    held = jnp.where(done < 1, 0.0, held)
    return jax.tree.map(lambda old, new: held * old + (1 - held) * new, average, now)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, *, scatters: bool = True) -> jax.Array:
    """Losses (batch,) of logits (batch, classes) and int labels (batch,), a share of which is spread evenly.

    ``scatters`` says how the gradient is made: as optax's, or in one kernel of a GPU; the same but for the last bit.
    """
    if scatters:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        is_label = labels[:, None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)
        loss = jax.nn.logsumexp(logits, -1) - jnp.where(is_label, logits, 0).sum(-1)
    if not smoothing:
        return loss
    return (1 - smoothing) * loss - smoothing * jax.nn.log_softmax(logits).mean(-1)


def _as_due(masked: Callable[..., Any], schedule: Any) -> Callable[..., Any]:
    def update(grads: Any, held: Any, params: Any, **extra: Any) -> Any:
        due = schedule.due(held.count, held.selected, held.pruned, held.gathered)
        return masked(grads, held, params, due.prunes, **extra)

    return update


def evaluation_of(trainer: Any, batch: int) -> Callable[..., jax.Array]:
    """Evaluation on so many images: ``(params, batch_stats, data, begin) -> float32 [sum of losses, correct ones]``."""

    def evaluate(params: Any, batch_stats: Any, data: Images, begin: Any) -> jax.Array:
        images = jax.lax.dynamic_slice_in_dim(data.images, begin, batch)
        labels = jax.lax.dynamic_slice_in_dim(data.labels, begin, batch)
        images, labels = trainer.devices.divided((images, labels))
        images = normalise(images, trainer.dataset.mean, trainer.dataset.std)
        variables = {"params": trainer.method.forward(params), "batch_stats": batch_stats}
        logits = trainer.model.apply(variables, images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.stack([losses.sum(), (logits.argmax(-1) == labels).sum().astype(jnp.float32)])

    return evaluate


def update_step(trainer: Any, kind: str, batch: int, way: str = "dense") -> Callable[..., Any]:
    """One whole update, ``(state, metrics, data, order, index, key, structures) -> (state, metrics)``, a pure function.

    ``structures`` is empty when dense; the other arguments are those of `gradient_of` and `change_of`.
    """
    gradient, change = gradient_of(trainer, batch, way), change_of(trainer, kind)

    def step(
        state: TrainState, metrics: Any, data: Images, order: Any, index: Any, key: Any, structures: Any
    ) -> tuple[TrainState, Any]:
        found = gradient(state.params, state.batch_stats, state.step, data, order, index, key, structures)
        return change(state, metrics, index, found)

    return step


def update_loop(trainer: Any, kind: str, batch: int, way: str, count: int) -> Callable[..., Any]:
    """So many updates in one compiled loop, ``(state, metrics, data, order, first, key, structures) -> ...``.

    The arguments are those of `update_step`, ``first`` being the first update's index. What chance decides is drawn
    before the loop, and ``count`` is no argument: a loop whose end a GPU has to look up waits for the host each time.
    Between updates small arrays, counts and metrics lie side by side, so that one kernel writes them all, and the large
    weights that the net reads in its short dtype are kept in it too, so that what changes a weight writes both.
    """
    draw, gradient = draw_of(trainer, batch), gradient_of_drawn(trainer, batch, way)
    change, dtype = change_of(trainer, kind), jnp.dtype(trainer.config.precision)
    # Not where a method computes the weights that the net sees, nor where they are not rounded.
    rounds = dtype.itemsize < 4 and trainer.method.forward is Method.forward
    places = read_in(trainer, dtype) if rounds else set()

    def rounded(params: Any) -> dict[int, jax.Array]:
        """By their place among the leaves."""
        return {place: leaf.astype(dtype) for place, leaf in enumerate(jax.tree.leaves(params)) if place in places}

    def run(
        state: TrainState, metrics: Any, data: Images, order: Any, first: Any, key: Any, structures: Any
    ) -> tuple[TrainState, Any]:
        drawn = jax.vmap(draw, (None, 0))(key, state.step + jnp.arange(count))

        def once(number: Any, carry: Any) -> Any:
            packed, short = carry
            (state, metrics), index = unpack(packed), first + number
            now = jax.tree.map(lambda leaf: leaf[number], drawn)
            # What is rounded has a gradient of its own dtype, as it has where the net does the rounding.
            leaves, structure = jax.tree.flatten(state.params)
            params = structure.unflatten(short.get(place, leaf) for place, leaf in enumerate(leaves))
            found = gradient(params, state.batch_stats, data, order, index, now, structures)
            grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), found.grads, state.params)
            state, metrics = change(state, metrics, index, found._replace(grads=grads))
            wrong = [f"{path} to {now}" for path, now in _dtypes(state).items() if now != dtypes.get(path)]
            if wrong:  # bits of one would be read as another
                raise TypeError(f"an update changed {', '.join(wrong)}: expected the dtypes of the state before it")
            return pack((state, metrics))[0], rounded(state.params)

        dtypes = _dtypes(state)
        packed, unpack = pack((state, metrics))
        packed, _ = jax.lax.fori_loop(0, count, once, (packed, rounded(state.params)))
        return unpack(packed)

    return run


def _dtypes(state: TrainState) -> dict[str, Any]:
    """By the leaves' places, for people."""
    return {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def read_in(trainer: Any, dtype: jax.typing.DTypeLike) -> set[int]:
    """Which parameters, by their place among the leaves, are large and the net reads in ``dtype`` and in no other."""
    variables = dict(models.abstract_variables(trainer.model, trainer.image_shape))
    params, images = variables.pop("params"), jax.ShapeDtypeStruct((1, *trainer.image_shape), jnp.float32)

    def run(params: Any, others: Any, images: Any) -> jax.Array:
        return trainer.model.apply({"params": params, **others}, images, train=False)

    net = jax.make_jaxpr(run)(params, variables, images).jaxpr

    def is_read(weight: Any) -> bool:
        users = [each for each in net.eqns if any(operand is weight for operand in each.invars)]
        return all(
            str(each.primitive) == "convert_element_type" and each.params["new_dtype"] == dtype for each in users
        )

    weights = enumerate(net.invars[: len(jax.tree.leaves(params))])
    return {place for place, weight in weights if weight.aval.size > SMALL and is_read(weight)}


def pack(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """``(packed, unpack)``: small floating-point arrays of a tree, and counts, in one vector of bits for each size of
    number; the others as they are.

    Args:
        tree: of arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    small: dict[str, list[int]] = {}
    for place, leaf in enumerate(leaves):
        most = SMALL if jnp.issubdtype(leaf.dtype, jnp.floating) else int(jnp.issubdtype(leaf.dtype, jnp.integer))
        if 0 < leaf.size <= most:
            small.setdefault(f"uint{8 * leaf.dtype.itemsize}", []).append(place)
    flat = {
        bits: jnp.concatenate([_as(bits, leaves[place]).reshape(-1) for place in places])
        for bits, places in small.items()
    }
    whole = {place: leaf for place, leaf in enumerate(leaves) if all(place not in places for places in small.values())}

    def unpack(packed: Any) -> Any:
        flat, found = packed[0], dict(packed[1])
        for bits, places in small.items():
            sizes = [math.prod(shapes[place]) for place in places]
            for place, part in zip(places, jnp.split(flat[bits], list(itertools.accumulate(sizes))[:-1])):
                found[place] = _as(leaves[place].dtype, part).reshape(shapes[place])
        return structure.unflatten(found[place] for place in range(len(leaves)))

    return (flat, whole), unpack


def _as(dtype: jax.typing.DTypeLike, leaf: Any) -> jax.Array:
    """The same bits as numbers of another dtype, as wide."""
    return leaf if leaf.dtype == dtype else jax.lax.bitcast_convert_type(leaf, dtype)
