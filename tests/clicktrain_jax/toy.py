"""A problem small enough to run every optimizer through all phases: pull each weight to a moving target.

No convolution is computed, so that programs compile fast. The kernels' shapes differ from each other and from all other
leaves: an array in an optimizer state is known by its shape alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clicktrain_jax as ct
from clicktrain_jax.trees import placed_like

SHAPES = {
    "Conv_0": {"kernel": (3, 3, 2, 3)},
    "Conv_1": {"kernel": (3, 3, 8, 4), "bias": (4,)},
    "Conv_2": {"kernel": (1, 1, 4, 5)},
    "Dense_0": {"kernel": (3, 2)},
}
RULES = {"Conv_0/kernel": None, "Conv_1/kernel": 0.55, "Conv_2/kernel": 0.5}
PRUNED = ("Conv_1", "Conv_2")
SELECT, PRUNE, STOP = 2, 5, 8
SCHEDULE = {"select_step": SELECT, "prune_step": PRUNE, "coeff": 0.05}


# Programs here run a few times: compiled without optimisation they are ready sooner.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def is_shape(node):
    return isinstance(node, tuple)


def params(dtype=jnp.float32, seed=0):
    """Normal weights, none of them zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), dtype), SHAPES, is_leaf=is_shape)


def plan(tree=None, **options):
    return ct.make_plan(params() if tree is None else tree, RULES, strict=True, **options)


def loss(tree, step):
    """Half the squared distance to a target that differs from weight to weight and from step to step."""

    def distance(leaf):
        target = placed_like(jnp.sin(3.0 * jnp.arange(leaf.size) + step).reshape(leaf.shape), leaf)
        return 0.5 * jnp.sum(jnp.square(leaf.astype(jnp.float32) - target))

    return sum(distance(leaf) for leaf in jax.tree.leaves(tree))


class Run(NamedTuple):
    """``params[t]`` and ``states[t]`` before update t; ``grads[t]`` the loss gradient of update t. Without jit every
    step is traced."""

    params: list
    states: list
    grads: list
    traces: int


def run(tx, tree=None, steps=STOP, grad_dtype=None, jit=quick_jit, **extra):
    """A user's loop: grads -> update -> apply_updates, one jitted step."""
    traces = 0

    @jit
    def train_step(tree, state, step):
        nonlocal traces
        traces += 1
        grads = jax.grad(loss)(tree, step)
        grads = jax.tree.map(lambda grad: grad.astype(grad_dtype or grad.dtype), grads)
        updates, state = tx.update(grads, state, tree, **extra)
        return optax.apply_updates(tree, updates), state, grads

    tree = params() if tree is None else tree
    history = Run([tree], [tx.init(tree)], [], 0)
    for step in range(steps):
        tree, state, grads = train_step(history.params[-1], history.states[-1], jnp.float32(step))
        history.params.append(tree)
        history.states.append(state)
        history.grads.append(grads)
    return history._replace(traces=traces)


def keep_of(state):
    """{layer: boolean mask of what stays} by numpy, of the toy's own containers."""
    masks = ct.masks_of(state)
    both = {}
    for layer in PRUNED:
        pattern, kernel = masks.pattern[layer]["kernel"], np.asarray(masks.kernel[layer]["kernel"])
        both[layer] = kernel if pattern is None else kernel & np.asarray(pattern)
    return both


def mirrors(state, layer):
    """All arrays in a state that have the shape of a layer's kernel."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state) if np.shape(leaf) == SHAPES[layer]["kernel"]]


def expected_keep(oracle, tree, grads):
    """What the loops of `oracle` select from one update's weights and gradient."""
    both = {}
    for layer in PRUNED:
        scores = (np.asarray(tree[layer]["kernel"], np.float64) * np.asarray(grads[layer]["kernel"], np.float64)) ** 2
        both[layer] = oracle.kernel_mask(scores, round(100 * RULES[f"{layer}/kernel"]))
        pattern = oracle.pattern_mask(scores, ct.patterns.fixed_set(4))
        if pattern is not None:
            both[layer] &= pattern
    return both
