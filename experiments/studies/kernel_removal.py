"""Removing single kernels from a trained net: the change of the loss, scores, and how well these rank it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import rankdata

import clicktrain_jax as ct
from clicktrain_jax.trees import Tree, named_leaves
from experiments.data import normalise
from experiments.train.state import TrainState
from experiments.train.step import Trainer

_BATCH = 500
_SPLITS = 20  # random halves of the images that the noise of the truth is estimated from


def draw_kernels(shape: Sequence[int], count: int, seed: int) -> np.ndarray:
    """Kernels of a layer, uniformly at random without repetition.

    Args:
        shape: (kh, kw, cin, cout).
        count: how many; all of them when there are no more.
        seed: of this draw.

    Returns:
        int32 (count, 2), ascending pairs of input and output channel.
    """
    cin, cout = shape[2:]
    drawn = np.random.default_rng(seed).permutation(cin * cout)[:count]
    return np.stack(np.divmod(np.sort(drawn), cout), axis=1).astype(np.int32)


def loss_changes(
    model: nn.Module,
    variables: Any,
    images: np.ndarray,
    labels: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    layer: str,
    kernels: np.ndarray,
) -> np.ndarray:
    """What setting one kernel to zero does to the cross entropy of every image; the rest of the net is intact.

    Only what comes after the layer is computed anew for each kernel: its input and output are kept, and one kernel
    changes one channel of the output by the response of one channel of the input.

    Args:
        model: a linen module whose convolutions have ``strides`` and ``padding`` and no bias.
        variables: its ``params`` and ``batch_stats``; BatchNorm uses the latter.
        images: uint8 (N, H, W, C).
        labels: int32 (N,).
        mean: of the normalisation, C values.
        std: of the normalisation, C values.
        layer: path of the convolution's kernel, as `clicktrain_jax.models.prunable_convs` gives it.
        kernels: int (K, 2), pairs of input and output channel.

    Returns:
        float64 (K, N), loss without the kernel minus loss with it, both by the same program.

    Raises:
        ValueError: the net calls no such layer.
    """
    owner = layer.removesuffix("/kernel")
    form: dict[str, Any] = {}

    @jax.jit
    def capture(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept = []

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            result = call(*args, **kwargs)
            if _is_call_of(owner, context):
                form.update(window_strides=context.module.strides, padding=context.module.padding)
                kept.append((args[0], result))
            return result

        with nn.intercept_methods(keep):
            model.apply(variables, images, train=False)
        if len(kept) != 1:
            raise ValueError(f"layer={layer!r} is called {len(kept)} times: expected a convolution called once")
        return kept[0]

    @jax.jit
    def losses(
        variables: Any, images: Any, labels: Any, before: Any, after: Any, kernel: jax.Array, share: jax.Array
    ) -> jax.Array:
        """Of every image, with ``share`` of the kernel taken away."""
        weights = dict(named_leaves(variables["params"]))[layer]
        taps = jax.lax.dynamic_slice(weights, (0, 0, *kernel), (*weights.shape[:2], 1, 1))
        response = jax.lax.conv_general_dilated(
            jax.lax.dynamic_slice_in_dim(before, kernel[0], 1, axis=3),
            taps.astype(before.dtype),
            **form,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        column = jax.lax.dynamic_slice_in_dim(after, kernel[1], 1, axis=3)
        changed = jax.lax.dynamic_update_slice_in_dim(after, column - share * response, kernel[1], axis=3)

        def replace(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            return changed if _is_call_of(owner, context) else call(*args, **kwargs)

        # What comes before the layer is then needed by nobody, and is not compiled.
        with nn.intercept_methods(replace):
            logits = model.apply(variables, images, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    parts = []
    with jax.default_matmul_precision("highest"):
        for begin in range(0, len(labels), _BATCH):
            batch = normalise(jnp.asarray(images[begin : begin + _BATCH]), mean, std)
            some = jnp.asarray(labels[begin : begin + _BATCH])
            before, after = capture(variables, batch)
            arguments = (variables, batch, some, before, after)
            intact = losses(*arguments, kernels[0], np.float32(0))
            without = [losses(*arguments, kernel, np.float32(1)) for kernel in kernels]
            parts.append(np.asarray(without, np.float64) - np.asarray(intact, np.float64))
    return np.concatenate(parts, axis=1)


def _is_call_of(owner: str, context: Any) -> bool:
    return context.method_name == "__call__" and "/".join(context.module.path) == owner


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0.0 where all values of one are equal.

    Raises:
        ValueError: unequal lengths, fewer than two values, a value that is not finite.
    """
    pair = np.asarray([first, second], np.float64) if len(first) == len(second) else np.empty((0, 0))
    if pair.shape[1] < 2 or not np.isfinite(pair).all():
        raise ValueError(f"{len(first)} and {len(second)} values: expected as many of each, two or more, all finite")
    ranks = np.asarray([rankdata(values) for values in pair])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    scale = np.sqrt(np.square(centred).sum(axis=1).prod())
    return float(centred.prod(axis=0).sum() / scale) if scale else 0.0


def correlate(truth: dict[str, np.ndarray], scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Rank correlation layer by layer, its mean over the layers, and of all kernels together.

    Args:
        truth: by layer, (K,).
        scores: by layer, (K,).
    """
    by_layer = {name: spearman(truth[name], scores[name]) for name in truth}
    joined = [np.concatenate([values[name] for name in truth]) for values in (truth, scores)]
    return {"by_layer": by_layer, "layer_mean": float(np.mean(list(by_layer.values()))), "together": spearman(*joined)}


def split_half(changes: dict[str, np.ndarray], size: bool) -> dict[str, Any]:
    """How well the truth of one half of the images ranks that of the other: mean of `correlate` over random halves.

    Args:
        changes: by layer, (K, N).
        size: rank by the size of the change rather than by the change.

    Returns:
        ``layer_mean`` and ``together``, each with its ``_ceiling``: what a criterion that knew the exact truth would
        be expected to reach against the truth of all images, the square root of Spearman-Brown's reliability.
    """
    draw = np.random.default_rng(0)
    found = []
    for _ in range(_SPLITS):
        order = draw.permutation(next(iter(changes.values())).shape[1])
        middle = len(order) // 2
        halves = [
            {name: change[:, half].mean(axis=1) for name, change in changes.items()}
            for half in (order[:middle], order[middle:])
        ]
        if size:
            halves = [{name: np.abs(change) for name, change in half.items()} for half in halves]
        found.append(correlate(*halves))
    result = {}
    for field in ("layer_mean", "together"):
        half = float(np.mean([one[field] for one in found]))
        result[field] = half
        result[f"{field}_ceiling"] = float(np.sqrt(2 * max(half, 0.0) / (1 + max(half, 0.0))))
    return result


def summarise(
    changes: dict[str, np.ndarray], scores: dict[tuple[str, int | None], dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Correlations of every criterion with the true changes, and the noise of the truth.

    Args:
        changes: by layer, (K, N), per kernel and image.
        scores: by criterion and number of batches, by layer, (draws, K).
    """
    signed = {name: change.mean(axis=1) for name, change in changes.items()}
    targets = {"size": {name: np.abs(change) for name, change in signed.items()}, "signed": signed}
    rows = []
    for (criterion, count), by_layer in scores.items():
        draws = len(next(iter(by_layer.values())))
        row: dict[str, Any] = {"criterion": criterion, "batches": count, "draws": draws}
        for target, truth in targets.items():
            found = [correlate(truth, {name: by_layer[name][draw] for name in truth}) for draw in range(draws)]
            row[target] = {
                "layer_mean": [one["layer_mean"] for one in found],
                "together": [one["together"] for one in found],
                "by_layer": {name: float(np.mean([one["by_layer"][name] for one in found])) for name in truth},
            }
        rows.append(row)
    every = np.concatenate(list(changes.values()))
    means, errors = every.mean(axis=1), every.std(axis=1, ddof=1) / np.sqrt(every.shape[1])
    return {
        "images": every.shape[1],
        "split_half": {target: split_half(changes, size=target == "size") for target in targets},
        "share_of_loss_lowered": float((means < 0).mean()),
        "share_beyond_two_errors": float((np.abs(means) > 2 * errors).mean()),
        "correlations": rows,
    }


def score_program(trainer: Trainer, indices: dict[str, np.ndarray], criteria: Sequence[str]) -> Callable[..., Any]:
    """``(state, data, order, index, key) -> (score trees, drawn kernels' scores)`` by criterion, of one batch.

    The gradient is the train step's own: an optimizer that leaves the weights alone and keeps the gradient stands in
    for the real one.
    """
    keeper = copy.copy(trainer)
    keeper.optimizer = optax.GradientTransformation(
        lambda params: params, lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads)
    )
    step = keeper.update_step("dense", trainer.config.batch_size)

    @jax.jit
    def score(state: TrainState, data: Any, order: Any, index: Any, key: Any) -> tuple[Any, Any]:
        metrics = jnp.zeros((trainer.steps_per_epoch, 2), jnp.float32)
        # The step counter decides the crops, flips and dropout of a batch.
        grads = step(state._replace(step=index), metrics, data, order, index, key, {})[0].opt_state
        trees = {name: ct.importance.CRITERIA[name](state.params, grads) for name in criteria}
        return trees, {name: kernel_sums(tree, indices) for name, tree in trees.items()}

    return score


def kernel_sums(tree: Tree, indices: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Scores of the drawn kernels, float32 (K,) by layer: each the sum over its taps."""
    leaves = dict(named_leaves(tree))
    return {name: leaves[name].sum(axis=(0, 1))[pairs[:, 0], pairs[:, 1]] for name, pairs in indices.items()}
