"""The nets compute the same with the batch beside the channels, and run a layer by its structure where it has one."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax.traverse_util import flatten_dict

from clicktrain_jax import models
from clicktrain_jax.models import layout as layouts
from clicktrain_jax.models.resnet import ResidualBlock

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
Residual = partial(models.ResNet, 5, blocks_per_stage=(1, 1), stage_widths=(64, 128), width=0.125)
# Every kind of layer and block of the zoo, each once beside its neighbours: deeper nets have more of the same. name:
# (how it is made, images). At this width a padded shortcut has 8 channels and 16.
NETS = {
    "small": (partial(models.build, "small", num_classes=5, width=0.25), (8, 8, 1)),
    "vgg": (partial(models.VGG, 5, (1, 1, 1, 1, 1), width=0.125), (32, 32, 3)),
    "projection": (Residual, (16, 16, 3)),
    "padded": (partial(Residual, shortcut="pad"), (16, 16, 3)),
    "bottleneck": (partial(Residual, blocks_per_stage=(2, 1), kind="bottleneck", stem="imagenet"), (33, 31, 3)),
}


def masked_convolution(x, w, mask, *, strides, padding, layout):
    """Stands for a convolution by structure: here the structure is the mask."""
    return models.xla_convolution(x, w * mask, strides=strides, padding=padding, layout=layout)


pattern_conv = partial(models.PatternConv, convolve=masked_convolution)


@functools.cache
def variables_of(name):
    """Trained-looking variables: positive variances, scales near one, no leaf of zeros."""
    make, image_shape = NETS[name]
    return drawn(make(), image_shape)


def close(got, wanted, tolerance):
    """Largest difference against the largest value, leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max(), (one.shape, np.abs(one - other).max())


@functools.cache
def images(name):
    return np.random.default_rng(1).normal(size=(4, *NETS[name][1])).astype(np.float32)


@functools.cache
def program(name, layout, conv, train):
    """Logits, new statistics and gradients of a net by its variables; gradients in the parameters' tree."""
    model = NETS[name][0](layout=layout, conv=conv)

    def loss(params, rest):
        options = {"train": train, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
        logits, new = model.apply({"params": params, **rest}, images(name), **options)
        return jnp.sum(jnp.sin(logits)), (logits, new["batch_stats"])

    return jit(jax.grad(loss, has_aux=True))


def outcome(name, layout, conv, variables, train):
    rest = {key: value for key, value in variables.items() if key != "params"}
    gradients, (logits, statistics) = program(name, layout, conv, train)(variables["params"], rest)
    return logits, statistics, gradients


@pytest.mark.parametrize("name", NETS)
def test_logits_gradients_and_statistics_do_not_depend_on_the_layout(name):
    variables = variables_of(name)
    logits, statistics, gradients = outcome(name, "NHWC", nn.Conv, variables, False)
    assert np.abs(logits).max() > 1e-2
    other = outcome(name, "HWNC", pattern_conv, variables, False)
    close(other, (logits, statistics, gradients), 1e-4)


by_patches = partial(pattern_conv, dense=models.patch_convolution)


@pytest.mark.parametrize(("name", "conv"), [("small", models.PatchConv), ("small", by_patches), ("vgg", by_patches)])
def test_training_does_not_depend_on_the_layout(name, conv):
    """Batch statistics are taken over other axes, dropout comes behind the way back."""
    variables = variables_of(name)
    # Batch statistics of small maps make gradients sensitive to rounding: 1e-3 of the largest.
    close(outcome(name, "HWNC", conv, variables, True), outcome(name, "NHWC", models.PatchConv, variables, True), 1e-3)


@pytest.mark.parametrize("name", ["small", "vgg11", "resnet18", "resnet32", "resnet50"])
def test_paths_and_sizes_do_not_depend_on_the_layout(name):
    plain = models.build(name, num_classes=5, width=0.25)
    other = models.build(name, num_classes=5, width=0.25, layout="HWNC", conv=pattern_conv)
    shape = models.default_image_shape(name)
    assert models.abstract_variables(other, shape) == models.abstract_variables(plain, shape)
    assert models.output_sizes(other, shape) == models.output_sizes(plain, shape)
    assert models.conv_layers(other, shape) == models.conv_layers(plain, shape)


@pytest.mark.parametrize("layout", ["NHWC", "HWNC"])
@pytest.mark.parametrize(("name", "path"), [("small", "Conv_2"), ("projection", "Block_1/Conv_1")])
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

    masked = jax.tree.map(lambda leaf: np.where(mask, leaf, 0) if leaf is kernel else leaf, variables)
    logits, statistics, gradients = outcome(name, "NHWC", nn.Conv, masked, False)
    gradients = jax.tree.map(lambda g, w: np.where(mask, g, 0) if w is kernel else g, gradients, variables["params"])
    close(got, (logits, statistics, gradients), 1e-4)


@pytest.mark.parametrize("conv", [models.PatternConv, partial(models.PatternConv, dense=models.patch_convolution)])
def test_pattern_conv_without_structures_is_flax_conv(conv):
    options = {"strides": (2, 2), "padding": ((1, 1), (0, 1)), "use_bias": False}
    ours, theirs = conv(6, (3, 3), **options), nn.Conv(6, (3, 3), **options)
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 4)).astype(np.float32)
    variables = jax.jit(theirs.init)(jax.random.key(1), x)
    made = jax.eval_shape(ours.init, jax.random.key(1), x)
    assert made == jax.eval_shape(lambda: variables)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-4, atol=1e-5)
    half = conv(6, (3, 3), dtype=jnp.bfloat16, **options)
    assert jax.eval_shape(half.init, jax.random.key(1), x)["params"]["kernel"].dtype == jnp.float32
    assert jax.eval_shape(half.apply, variables, x).dtype == jnp.bfloat16


def test_pools_are_flax_pools():
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 3)).astype(np.float32)
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
    direction = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

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
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 8)).astype(np.float32)
    variables = drawn(plain, x.shape[1:])
    found, wanted = (jit(partial(net.apply, train=False))(variables, x) for net in (block, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
