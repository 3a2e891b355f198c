"""The nets: sizes against published ones, paths, dtypes, statistics. Values only on slim widths."""

import functools
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from clicktrain_jax import models
from clicktrain_jax.models.resnet import ResidualBlock

# Shapes, sizes and the order of layers are of no program.
pytestmark = pytest.mark.usefixtures("quick")

NAMES = "vgg11 vgg13 vgg16 resnet18 resnet32_wide resnet32 resnet50_cifar resnet50 small".split()
# Deeper nets are of the same modules; the sizes below are of every one.
every_kind = pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet32", "resnet50", "small"])
# These programs run once: compiling them without optimisation is up to 15 times faster.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def abstract(name, num_classes=10, **options):
    """Returns the model, its variables as shapes, and its image shape."""
    model = models.build(name, num_classes=num_classes, **options)
    image_shape = models.default_image_shape(name)
    return model, models.abstract_variables(model, image_shape), image_shape


conv_layers = functools.cache(models.conv_layers)


def initialised(model, image_shape):
    return jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, *image_shape)))


# Convolutions of the wide ResNet-32: 3x3s within a width, 3x3s between two, and its shortcuts.
WITHIN = 6 * 64**2 + 7 * 128**2 + 9 * 256**2 + 5 * 512**2
BETWEEN = 64 * 128 + 128 * 256 + 256 * 512
WIDE = 9 * (WITHIN + BETWEEN + 3 * 64) + BETWEEN


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters", "conv_weights", "listed"),
    [
        # By hand: convolutions, twice the widths for BatchNorm, 530,442 for the classifier.
        ("vgg11", 10, 9_217_728 + 2 * 2752 + 530_442, 9_217_728, 7),
        ("vgg13", 10, 9_402_048 + 2 * 2944 + 530_442, 9_402_048, 9),
        ("vgg16", 10, 14_710_464 + 2 * 4224 + 530_442, 14_710_464, 12),
        ("resnet18", 10, 11_173_962, 11_173_962 - 2 * 4800 - 5130, 16),  # the usual CIFAR form
        ("resnet32_wide", 10, WIDE + 2 * 8000 + 5130, WIDE, 30),
        ("resnet32", 10, 464_154, 464_154 - 2 * 1136 - 650, 30),  # He et al., table 6: 0.46M
        ("resnet50_cifar", 10, 23_520_842, 23_520_842 - 2 * 26_560 - 20_490, 48),
        ("resnet50", 1000, 25_557_032, 23_454_912, 48),  # torchvision
        ("small", 10, 129_312 + 2 * 288 + 1290, 129_312, 3),
    ],
)
def test_sizes_against_published_nets(name, num_classes, parameters, conv_weights, listed):
    model, variables, image_shape = abstract(name, num_classes)
    assert models.parameter_count(variables["params"]) == parameters
    layers = conv_layers(model, image_shape)
    assert sum(math.prod(layer.kernel_shape) for layer in layers) == conv_weights
    paths = models.prunable_convs(model, image_shape)
    assert (len(paths), "Conv_0/kernel" in paths) == (listed, False)


def test_stated_weights_and_widths():
    assert round(WIDE / 1e6, 1) == 20.1  # the recipes' "ResNet-32"
    first = conv_layers(*abstract("small")[::2])[0]  # stays dense: must not limit the compression
    assert math.prod(first.kernel_shape) < 0.01 * 129_312
    given = ((64, 1.0), (64, 0.5), (64, 0.01), (64, 0.42), (512, 0.25), (16, 2))
    assert [models.scaled_width(*pair) for pair in given] == [64, 32, 8, 24, 128, 32]


@every_kind
def test_width_scales_every_layer(name):
    params, slim = (flatten_dict(abstract(name, width=w)[1]["params"]) for w in (1.0, 0.5))
    logits = max(module for module, *_ in params if module.startswith("Dense"))
    assert params.keys() == slim.keys()
    for path, leaf in params.items():
        assert leaf.shape[-1] == slim[path].shape[-1] * (1 if path[0] == logits else 2), path


def test_conv_layers_of_vgg13_by_hand():
    model, _, image_shape = abstract("vgg13")
    widths = (64, 64, 128, 128, 256, 256, 512, 512, 512, 512)
    sizes = (32, 32, 16, 16, 8, 8, 4, 4, 2, 2)
    assert conv_layers(model, image_shape) == tuple(
        models.ConvLayer(f"Conv_{index}/kernel", (3, 3, cin, cout), (size, size))
        for index, (cin, cout, size) in enumerate(zip((3, *widths), widths, sizes, strict=False))
    )
    output_sizes = models.output_sizes(model, image_shape)
    assert list(output_sizes.items())[-3:] == [(f"Dense_{n}/kernel", (1, 1)) for n in range(3)]


def test_conv_layers_of_resnet50_by_hand():
    model, _, image_shape = abstract("resnet50")
    expected = [("Conv_0/kernel", (7, 7, 3, 64), (112, 112))]
    cin, size, block = 64, 56, 0
    for count, inner in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for position in range(count):
            before, size = size, size // 2 if position == 0 and inner > 64 else size
            root, cout = f"Block_{block}", 4 * inner
            expected += [
                (f"{root}/Conv_0/kernel", (1, 1, cin, inner), (before, before)),
                (f"{root}/Conv_1/kernel", (3, 3, inner, inner), (size, size)),
                (f"{root}/Conv_2/kernel", (1, 1, inner, cout), (size, size)),
            ]
            if position == 0:
                expected.append((f"{root}/shortcut/kernel", (1, 1, cin, cout), (size, size)))
            cin, block = cout, block + 1
    assert conv_layers(model, image_shape) == tuple(models.ConvLayer(*row) for row in expected)


def test_multiply_adds_of_resnet50():
    model, variables, image_shape = abstract("resnet50", num_classes=1000)
    params = flatten_dict(variables["params"], sep="/")
    sizes = models.output_sizes(model, image_shape)
    assert sizes.keys() == {path for path in params if path.endswith("/kernel")}
    total = sum(math.prod(params[path].shape) * math.prod(size) for path, size in sizes.items())
    assert total == 4_089_184_256  # torchvision states 4.09 G


class Backwards(nn.Module):
    def setup(self):  # in another order than the calls; and there is no `train`
        self.late = nn.Conv(4, (3, 3), strides=2)
        self.early = nn.Conv(6, (1, 1))

    def __call__(self, x):
        return self.late(self.early(x))


class Shared(nn.Module):
    factor: int  # by which the image shrinks between two calls of one convolution

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(2, (3, 3))
        return conv(conv(x)[:, :: self.factor, :: self.factor])


class Hidden(nn.Module):
    @nn.compact
    def __call__(self, x):  # with a kernel that no module called "odd" uses
        weights = self.param("odd", lambda key: {"kernel": jnp.ones((3, 3, 2, 2))})
        return x * weights["kernel"].sum()


def test_conv_layers_of_other_models():
    assert models.conv_layers(Backwards(), (8, 6, 2)) == (
        models.ConvLayer("early/kernel", (1, 1, 2, 6), (8, 6)),
        models.ConvLayer("late/kernel", (3, 3, 6, 4), (4, 3)),
    )
    assert len(models.conv_layers(Shared(1), (8, 8, 2))) == 1
    with pytest.raises(ValueError, match=r"Conv_0/kernel.*\(8, 8\) and \(4, 4\)"):
        models.conv_layers(Shared(2), (8, 8, 2))
    with pytest.raises(ValueError, match="no module call was seen.*odd/kernel"):
        models.output_sizes(Hidden(), (8, 8, 2))


class OwnConv(nn.Module):
    """A convolution that is no `nn.Conv`, called as one; it may be given nothing else."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    use_bias: bool
    dtype: object
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x):
        assert not self.use_bias
        assert self.padding == tuple((k // 2, k // 2) for k in self.kernel_size)  # as in PyTorch
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel, self.strides, self.padding, dimension_numbers=axes
        )


@every_kind
def test_an_injected_conv_keeps_paths_shapes_and_sizes(name):
    plain, own = (abstract(name, conv=conv) for conv in (nn.Conv, OwnConv))
    assert own[1] == plain[1]
    assert conv_layers(own[0], own[2]) == conv_layers(plain[0], plain[2])


@every_kind
def test_bfloat16_keeps_float32_parameters_statistics_and_logits(name):
    model, variables, image_shape = abstract(name, num_classes=7, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    computed = set()

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if isinstance(context.module, (nn.Conv, nn.BatchNorm, ResidualBlock)):
            computed.add(out.dtype)
        return out

    def step(variables):
        x, rngs = jnp.zeros((2, *image_shape)), {"dropout": jax.random.key(0)}
        return model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])

    with nn.intercept_methods(record):
        logits, updates = jax.eval_shape(step, variables)
    assert computed == {jnp.dtype("bfloat16")}
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert updates["batch_stats"] == variables["batch_stats"]


@pytest.mark.parametrize(("name", "dtype"), [("small", jnp.float32), ("vgg11", jnp.bfloat16)])
def test_train_updates_the_statistics_and_evaluation_does_not(name, dtype):
    image_shape = models.default_image_shape(name)
    model = models.build(name, num_classes=10, width=0.125, dtype=dtype, conv=OwnConv)
    variables = initialised(model, image_shape)
    x = (3 + np.random.default_rng(1).normal(size=(4, *image_shape))).astype(np.float32)
    forward = partial(model.apply, rngs={"dropout": jax.random.key(2)}, mutable=["batch_stats"])
    logits, updates = jit(partial(forward, train=True))(variables, x)
    assert np.isfinite(logits).all()
    old, new = (flatten_dict(tree["batch_stats"], sep="/") for tree in (variables, updates))
    assert not [path for path in old if np.array_equal(old[path], new[path])]
    _, unchanged = jit(partial(forward, train=False))(variables, x)
    jax.tree.map(np.testing.assert_array_equal, unchanged["batch_stats"], variables["batch_stats"])

    # Momentum 0.9, from a mean of 0 and a variance of 1.
    kernel = variables["params"]["Conv_0"]["kernel"]
    conv = OwnConv(8, (3, 3), (1, 1), ((1, 1), (1, 1)), False, dtype, nn.initializers.zeros)
    y = np.asarray(conv.apply({"params": {"kernel": kernel}}, x), np.float32)
    near = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    near(new["BatchNorm_0/mean"], 0.1 * y.mean((0, 1, 2)))
    near(new["BatchNorm_0/var"], 0.9 + 0.1 * y.var((0, 1, 2)))


def test_padded_shortcut_by_hand():
    """With its last BatchNorm silenced, a block is the ReLU of its shortcut."""
    block = ResidualBlock(16, strides=2, shortcut="pad")
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 8)).astype(np.float32)
    variables = initialised(block, (4, 4, 8))
    assert "shortcut" not in variables["params"]
    variables["params"]["BatchNorm_1"]["scale"] = np.zeros(16, np.float32)
    expected = np.zeros((1, 2, 2, 16), np.float32)
    expected[..., 4:12] = np.maximum(x[:, ::2, ::2], 0)
    np.testing.assert_allclose(jit(partial(block.apply, train=False))(variables, x), expected)


def test_initial_values_of_vgg():
    params = initialised(models.build("vgg11", num_classes=10, width=0.25), (32, 32, 3))["params"]
    kernel = params["Conv_5"]["kernel"]  # 147,456 values: their deviation is known to 0.2%
    np.testing.assert_allclose(np.std(kernel), math.sqrt(2 / (9 * 128)), rtol=0.02)
    assert np.abs(kernel).max() > 3 * np.std(kernel)  # not truncated
    np.testing.assert_array_equal(params["BatchNorm_5"]["scale"], 0.5)
    # He's initialisation at other widths than the published one, which starts from N(0, 0.01).
    np.testing.assert_allclose(np.std(params["Dense_0"]["kernel"]), math.sqrt(2 / 128), rtol=0.03)
    np.testing.assert_array_equal(params["Dense_2"]["bias"], 0)


def test_the_full_width_vgg_starts_its_classifier_as_published():
    model = models.build("vgg11", num_classes=10)
    params = initialised(model, (32, 32, 3))["params"]
    for layer in range(3):
        np.testing.assert_allclose(np.std(params[f"Dense_{layer}"]["kernel"]), 0.01, rtol=0.03)


def test_initial_values_of_resnet():
    params = initialised(models.ResNet(10, (1, 1, 1), (16, 32, 64), shortcut="pad"), (32, 32, 3))["params"]
    block = params["Block_2"]
    np.testing.assert_array_equal(block["BatchNorm_1"]["scale"], 1)
    for layer, fan_in in ((params["Conv_0"], 27), (block["Conv_1"], 576), (params["Dense_0"], 64)):
        bound, kernel = 1 / math.sqrt(fan_in), layer["kernel"]
        assert 0.95 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6)
        np.testing.assert_allclose(np.std(kernel), bound / math.sqrt(3), rtol=0.08)
    assert 0 < np.abs(params["Dense_0"]["bias"]).max() <= 1 / 8


def refused(message, function, *args, **kwargs):
    with pytest.raises(ValueError, match=message):
        function(*args, **kwargs)


def test_bad_settings():
    assert models.names() == tuple(NAMES)
    known = r"'vgg_13'; did you mean 'vgg13'\?.*resnet50_cifar"
    refused(known, models.build, "vgg_13", num_classes=10)
    refused(r"'zzz'\. Known nets: vgg11", models.default_image_shape, "zzz")
    refused("at least 1, got 0", models.build, "small", num_classes=0)
    for width in (0, -1.0, math.inf):
        refused("width must be a positive", models.build, "small", num_classes=10, width=width)
    wrong = {"kind": "wide", "shortcut": "A", "stem": "cifar", "blocks_per_stage": (1, 1)}
    for field, value in wrong.items():
        net = models.ResNet(10, **{field: value})
        refused(f"{field}.* must be", models.abstract_variables, net, (32, 32, 3))
    refused("needs 5 entries", models.output_sizes, models.VGG(10, (1, 1)), (32, 32, 3))


def test_bad_images():
    vgg, small = (models.build(name, num_classes=10) for name in ("vgg11", "small"))
    for shape in ((32, 32), (1, 32, 32, 3), (32, 0, 3), (32.0, 32, 3)):
        refused("image_shape must be", models.output_sizes, vgg, shape)
    refused("takes images of 32x32, got 28x30", models.conv_layers, vgg, (28, 30, 3))
    refused("4x4 or larger, got 3x8", models.conv_layers, small, (3, 8, 1))
    key = jax.random.key(0)
    refused(r"got \(32, 32, 3\)", vgg.init, key, jnp.zeros((32, 32, 3)), train=False)
    refused("got uint8", small.init, key, jnp.zeros((1, 8, 8, 1), jnp.uint8), train=False)
