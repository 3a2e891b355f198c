"""Derivatives of accelerated nets: reverse mode of any order, vmap, checkpoint; forward mode is refused in words."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn_masks, masked

import clicktrain_jax as ct
from pallas_kernels import native

BACKENDS = ["xla", pytest.param("cpu", marks=pytest.mark.skipif(not native.is_fast(), reason="no native kernels"))]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (8, 8):
            x = jnp.tanh(nn.Conv(width, (3, 3), use_bias=False)(x))
        return nn.Dense(2)(x.mean((1, 2)))


@functools.cache
def made():
    """``(model, masks, masked parameters, images)``: the second layer is pruned."""
    model, x = Net(), np.random.default_rng(1).normal(size=(2, 5, 4, 1)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    masks = drawn_masks(params, ct.make_plan(params, {"Conv_1/kernel": 0.5}))
    return model, masks, masked(params, masks), x


def losses(backend):
    """``(loss of the accelerated net, loss of the net itself, parameters that move)``."""
    model, masks, params, x = made()

    def loss_of(apply):
        return lambda moved: jnp.sum(jnp.sin(apply({"params": params | moved}, x)))

    fast = ct.accelerate(model.apply, masks, backend=backend)
    return loss_of(fast), loss_of(model.apply), {"Conv_0": params["Conv_0"]}


FORWARD = {
    "jvp": lambda f, p: jax.jvp(f, (p,), (p,)),
    "jvp of jit": lambda f, p: jax.jvp(jax.jit(f), (p,), (p,)),
    "linearize": lambda f, p: jax.linearize(f, p)[1](p),
    "jacfwd": lambda f, p: jax.jacfwd(f)(p),
    "jacfwd of jit": lambda f, p: jax.jacfwd(jax.jit(f))(p),
    "hessian": lambda f, p: jax.hessian(f)(p),
    "forward over reverse": lambda f, p: jax.jvp(jax.grad(f), (p,), (p,)),
}


@pytest.mark.parametrize("how", FORWARD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused_and_says_what_to_do(backend, how):
    fast, plain, moved = losses(backend)
    for jit in (jax.jit, lambda function: function):
        with pytest.raises(TypeError, match=r"accelerated net: .*apply_masks.*jax.jacrev\(jax.grad\(loss\)\)"):
            jit(functools.partial(FORWARD[how], fast))(moved)
    jax.eval_shape(functools.partial(FORWARD[how], plain), moved)


REVERSE = {
    "hessian": (lambda f, p: jax.jacrev(jax.grad(f))(p), lambda f, p: jax.hessian(f)(p)),
    "hessian times vector": (
        lambda f, p: jax.vjp(jax.grad(f), p)[1](p)[0],
        lambda f, p: jax.jvp(jax.grad(f), (p,), (p,))[1],
    ),
    "tangent by two reverse passes": (
        lambda f, p: jax.vjp(lambda dy: jax.vjp(f, p)[1](dy)[0], jnp.ones(()))[1](p)[0],
        lambda f, p: jax.jvp(f, (p,), (p,))[1],
    ),
    "checkpoint": (lambda f, p: jax.grad(jax.checkpoint(f))(p), lambda f, p: jax.grad(f)(p)),
    "vmap of gradients": (
        lambda f, p: jax.vmap(jax.grad(f))(_both(p)),
        lambda f, p: jax.tree.map(lambda *two: jnp.stack(two), jax.grad(f)(p), jax.grad(f)(_doubled(p))),
    ),
    "gradient of vmap": (
        lambda f, p: jax.grad(lambda p: jax.vmap(f)(jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), p)).sum())(
            p
        ),
        lambda f, p: jax.grad(lambda p: f(p) + f(_doubled(p)))(p),
    ),
    "scan": (
        lambda f, p: jax.grad(lambda p: jax.lax.scan(lambda c, _: (c + f(p), None), 0.0, length=2)[0])(p),
        lambda f, p: jax.grad(lambda p: 2 * f(p))(p),
    ),
}


def _doubled(params):
    return jax.tree.map(lambda leaf: 2 * leaf, params)


def _both(params):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)


@functools.cache
def of_the_net_itself(how):
    _, plain, moved = losses("xla")
    return jax.jit(functools.partial(REVERSE[how][1], plain))(moved)


@pytest.mark.parametrize("how", REVERSE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_mode_of_any_order_is_the_nets_own(backend, how):
    fast, _, moved = losses(backend)
    got, wanted = jax.jit(functools.partial(REVERSE[how][0], fast))(moved), of_the_net_itself(how)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.any(two)
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * np.abs(two).max())
