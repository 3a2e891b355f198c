"""The nets compute the same with the batch beside the channels, and run a layer by its structure where it has one."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from clicktrain_jax import models
from clicktrain_jax.models import layout as layouts
from clicktrain_jax.models.resnet import ResidualBlock

# At half the width resnet32 has widths 8, 16, 32, so that its shortcuts pad channels.
WIDTHS = dict.fromkeys(models.names(), 0.125) | {"small": 0.25, "resnet32": 0.5}
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def masked_convolution(x, w, mask, *, strides, padding, layout):
    """Stands for a convolution by structure: here the structure is the mask."""
    return models.xla_convolution(x, w * mask, strides=strides, padding=padding, layout=layout)


pattern_conv = partial(models.PatternConv, convolve=masked_convolution)


def image_shape(name):
    """Of the nets that take any size, a small one."""
    return (8, 8, 1) if name == "small" else (32, 32, 3) if name.startswith("vgg") else (16, 16, 3)


@functools.cache
def variables_of(name):
    """Trained-looking variables: positive variances, scales near one, no leaf of zeros."""
    model = models.build(name, num_classes=5, width=WIDTHS[name])
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if path[-1] in ("var", "scale"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1], initial=1))).astype(np.float32)

    abstract = models.abstract_variables(model, image_shape(name))
    return jax.tree_util.tree_map_with_path(lambda path, x: leaf([key.key for key in path], x.shape), abstract)


def close(got, wanted, tolerance):
    """Largest difference against the largest value, leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max(), (one.shape, np.abs(one - other).max())


def outcome(name, layout, conv, variables, train):
    """Logits, new statistics and gradients of a net; gradients in the variables' tree."""
    model = models.build(name, num_classes=5, width=WIDTHS[name], layout=layout, conv=conv)
    x = jax.random.normal(jax.random.key(1), (4, *image_shape(name)))
    rest = {key: value for key, value in variables.items() if key != "params"}

    def loss(params):
        logits, new = model.apply(
            {"params": params, **rest}, x, train=train, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)}
        )
        return jnp.sum(jnp.sin(logits)), (logits, new["batch_stats"])

    gradients, (logits, statistics) = jit(jax.grad(loss, has_aux=True))(variables["params"])
    return logits, statistics, gradients


# The deep ones take a while to compile.
SLOW = ("vgg13", "vgg16", "resnet32_wide", "resnet50", "resnet50_cifar")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in models.names()]
)
def test_logits_gradients_and_statistics_do_not_depend_on_the_layout(name):
    variables = variables_of(name)
    logits, statistics, gradients = outcome(name, "NHWC", nn.Conv, variables, False)
    assert np.abs(logits).max() > 1e-2
    other = outcome(name, "HWNC", pattern_conv, variables, False)
    close(other, (logits, statistics, gradients), 1e-4)


by_patches = partial(pattern_conv, dense=models.patch_convolution)


@pytest.mark.parametrize(("name", "conv"), [("small", models.PatchConv), ("small", by_patches), ("vgg11", by_patches)])
def test_training_does_not_depend_on_the_layout(name, conv):
    """Batch statistics are taken over other axes, dropout comes behind the way back."""
    variables = variables_of(name)
    # Batch statistics of small maps make gradients sensitive to rounding: 1e-3 of the largest.
    close(outcome(name, "HWNC", conv, variables, True), outcome(name, "NHWC", models.PatchConv, variables, True), 1e-3)


@pytest.mark.parametrize("name", models.names())
def test_paths_and_sizes_do_not_depend_on_the_layout(name):
    plain = models.build(name, num_classes=5, width=WIDTHS[name])
    other = models.build(name, num_classes=5, width=WIDTHS[name], layout="HWNC", conv=pattern_conv)
    shape = models.default_image_shape(name)
    assert models.abstract_variables(other, shape) == models.abstract_variables(plain, shape)
    assert models.output_sizes(other, shape) == models.output_sizes(plain, shape)
    assert models.conv_layers(other, shape) == models.conv_layers(plain, shape)


@pytest.mark.parametrize("layout", ["NHWC", "HWNC"])
@pytest.mark.parametrize(("name", "path"), [("small", "Conv_2"), ("resnet18", "Block_2/Conv_1")])
def test_a_layer_with_a_structure_runs_by_it(name, path, layout):
    variables = variables_of(name)
    kernel = flatten_dict(variables["params"], sep="/")[f"{path}/kernel"]
    mask = np.random.default_rng(3).random(kernel.shape) < 0.4
    structures = {"kernel": mask}
    for key in reversed(path.split("/")):
        structures = {key: structures}
    seen = []

    def convolve(x, w, mask, **settings):
        seen.append((w.shape, settings))
        return masked_convolution(x, w, mask, **settings)

    conv = partial(models.PatternConv, convolve=convolve)
    got = outcome(name, layout, conv, variables | {"structures": structures}, False)
    assert [shape for shape, _ in seen] == [kernel.shape]
    assert seen[0][1] == {"strides": (1, 1), "padding": ((1, 1), (1, 1)), "layout": layout}

    masked = jax.tree.map(lambda leaf: jnp.where(mask, leaf, 0) if leaf is kernel else leaf, variables)
    logits, statistics, gradients = outcome(name, "NHWC", nn.Conv, masked, False)
    gradients = jax.tree.map(lambda g, w: jnp.where(mask, g, 0) if w is kernel else g, gradients, variables["params"])
    close(got, (logits, statistics, gradients), 1e-4)


@pytest.mark.parametrize("conv", [models.PatternConv, partial(models.PatternConv, dense=models.patch_convolution)])
def test_pattern_conv_without_structures_is_flax_conv(conv):
    options = {"strides": (2, 2), "padding": ((1, 1), (0, 1)), "use_bias": False}
    ours, theirs = conv(6, (3, 3), **options), nn.Conv(6, (3, 3), **options)
    x = jax.random.normal(jax.random.key(0), (2, 9, 7, 4))
    variables = theirs.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-4, atol=1e-5)
    half = conv(6, (3, 3), dtype=jnp.bfloat16, **options)
    assert half.init(jax.random.key(1), x)["params"]["kernel"].dtype == jnp.float32
    assert half.apply(variables, x).dtype == jnp.bfloat16


def test_pools_are_flax_pools():
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    pools = [
        (partial(layouts.max_pool, size=2, strides=2), partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))),
        (
            partial(layouts.max_pool, size=3, strides=2, padding=((1, 1), (0, 1))),
            partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (0, 1))),
        ),
        (partial(layouts.avg_pool, size=2), partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2))),
    ]
    for ours, theirs in pools:
        wanted = theirs(x)
        np.testing.assert_array_equal(ours(x, layout="NHWC"), wanted)
        moved = ours(layouts.from_nhwc(x, "HWNC"), layout="HWNC")
        np.testing.assert_array_equal(layouts.to_nhwc(moved, "HWNC"), wanted)


@pytest.mark.parametrize("layout", ["NHWC", "HWNC"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_max_pool_s_derivatives_are_those_of_reduce_window(layout, size):
    """Ours goes another way; of equal values the first one takes the gradient, as there."""
    # Few values, so that most windows hold equal ones; both signs, as zeros alone would hide which place is taken.
    values = np.random.default_rng(0).integers(-2, 3, (2, 2 * size, 3 * size, 5)).astype(np.float32)
    x = layouts.from_nhwc(jnp.asarray(values), layout)
    direction = jax.random.normal(jax.random.key(1), x.shape)

    def cubes(pool):
        return lambda x: (pool(x) ** 3 * jnp.arange(1.0, 6.0)).sum()

    def slope(cubes):
        return jit(jax.grad(cubes))

    def curvature(cubes):
        return jit(lambda x, direction: jax.jvp(jax.grad(cubes), (x,), (direction,)))

    window = layouts.per_axis(layout, size, size, 1)
    ours = cubes(partial(layouts.max_pool, size=size, strides=size, layout=layout))
    theirs = cubes(lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID"))
    gradient = slope(ours)(x)
    np.testing.assert_array_equal(gradient, slope(theirs)(x))
    assert np.count_nonzero(gradient) < x.size / size**2 + 1
    for one, two in zip(curvature(ours)(x, direction), curvature(theirs)(x, direction), strict=True):
        np.testing.assert_array_equal(one, two)
    assert jax.eval_shape(jax.grad(ours), x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    # A scatter in the compiled derivative would be the slow way again.
    assert "select_and_scatter" not in jax.jit(jax.grad(ours)).lower(x).as_text()


def test_what_does_not_go_together_is_refused():
    for conv in (nn.Conv, partial(nn.Conv, precision="highest"), lambda *args, **options: nn.Conv(*args, **options)):
        with pytest.raises(ValueError, match="has no parameter `layout`.*PatternConv"):
            models.build("small", num_classes=5, layout="HWNC", conv=conv)
    with pytest.raises(ValueError, match="'NHWC' or 'HWNC', got 'NCHW'"):
        models.build("small", num_classes=5, layout="NCHW")
    # Built by hand, the nets refuse it too, when they are called.
    with pytest.raises(ValueError, match="has no parameter `layout`"):
        models.abstract_variables(models.VGG(5, layout="HWNC"), (32, 32, 3))
    x = jnp.ones((2, 4, 4, 3))
    with pytest.raises(ValueError, match="got 'CHWN'"):
        models.PatternConv(4, (3, 3), layout="CHWN").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="PatternConv has no bias"):
        models.PatternConv(4, (3, 3), use_bias=True).init(jax.random.key(0), x)
    conv = models.PatternConv(4, (1, 1))
    variables = conv.init(jax.random.key(0), x) | {"structures": {"kernel": jnp.ones((1, 1, 3, 4), bool)}}
    with pytest.raises(ValueError, match="no function that uses it.*convolve="):
        conv.apply(variables, x)


def test_the_net_s_layout_wins_over_the_convolution_s():
    """A convolution made for HWNC in a net that runs in NHWC would be silently wrong."""
    conv = partial(models.PatternConv, layout="HWNC")
    block = ResidualBlock(8, conv=layouts.conv_in_layout(conv, "NHWC"))
    plain = ResidualBlock(8)
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 8))
    variables = plain.init(jax.random.key(1), x, train=False)
    np.testing.assert_allclose(
        block.apply(variables, x, train=False), plain.apply(variables, x, train=False), rtol=1e-4, atol=1e-5
    )
