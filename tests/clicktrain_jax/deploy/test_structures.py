"""A whole net with `pattern_conv` handed in computes what the masked net does, in either layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn, drawn_masks, masked

import clicktrain_jax as ct
import pallas_kernels as pk
from clicktrain_jax import models
from clicktrain_jax.deploy import structures
from clicktrain_jax.trees import map_named

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PATHS = ("Conv_1/kernel", "Conv_3/kernel")


@functools.cache
def net():
    model = models.build("small", num_classes=5, width=0.25)
    x = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
    return model, drawn(model, (8, 8, 1)), x


def select(seed):
    _, variables, _ = net()
    plan = ct.make_plan(variables["params"], dict.fromkeys(PATHS, 0.6), tile=(8, 1))
    return drawn_masks(variables["params"], plan, seed)


def outcome(model, variables, params, x):
    def loss(params):
        logits, new = model.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(logits)), (logits, new)

    return jax.grad(loss, has_aux=True)(params)


plainly = jit(lambda variables, params, x: outcome(net()[0], variables, params, x))


@pytest.mark.parametrize(
    ("dense", "layout"),
    [
        (models.xla_convolution, "NHWC"),
        pytest.param(models.xla_convolution, "HWNC", marks=pytest.mark.slow),
        pytest.param(models.patch_convolution, "NHWC", marks=pytest.mark.slow),
        (models.patch_convolution, "HWNC"),
    ],
)
def test_a_net_with_its_convolution_handed_in(layout, dense):
    _, variables, x = net()
    convolve = functools.partial(pk.pattern_conv, backend="xla")
    conv = functools.partial(models.PatternConv, convolve=convolve, dense=dense)
    model = models.build("small", num_classes=5, width=0.25, layout=layout, conv=conv)
    traces = []

    @jit
    def run(params, structures):  # structures are arguments, and so no part of the program
        traces.append(1)
        return outcome(model, variables | {"structures": structures}, params, x)

    for seed in (0, 1):
        masks = select(seed)
        collection = structures(masks, tile=(8, 1))
        assert sorted(collection) == [path.split("/")[0] for path in PATHS]
        poison = map_named(
            lambda name, leaf, keep: leaf if keep is None else np.where(keep, leaf, np.float32(np.nan)),
            variables["params"],
            ct.masks.combine(masks),
        )
        got = run(poison, collection)
        wanted = plainly(variables, masked(variables["params"], masks), x)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves((masked(wanted[0], masks), wanted[1]))):
            assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max() + 1e-6
    before = len(traces)
    run(poison, structures(masks, tile=(8, 1)))
    assert len(traces) == before


def test_what_is_left_out_and_what_is_refused():
    keep = {"a": {"kernel": np.ones((3, 3, 2, 2), bool)}, "b": {"kernel": np.eye(3, dtype=bool).reshape(3, 3, 1, 1)}}
    assert sorted(structures(keep)) == ["b"]
    np.testing.assert_array_equal(pk.mask_of(structures(keep)["b"]["kernel"]), keep["b"]["kernel"])
    with pytest.raises(ValueError, match="'b/kernel': the mask .* is not shared by tiles"):
        structures({"b": {"kernel": np.arange(36).reshape(3, 3, 2, 2) % 5 > 0}}, tile=(2, 1))
    with pytest.raises(ValueError, match="'b/kernel': a mask is bool"):
        structures({"b": {"kernel": np.zeros((3, 3), bool)}})
    with pytest.raises(ValueError, match="no leaf has a mask"):
        structures({"b": None})
