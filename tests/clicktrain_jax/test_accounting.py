"""Counts on a tree small enough to count by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct

SIZES = {"conv1": (3, 3, 1, 4), "conv2": (3, 3, 4, 2), "conv3": (1, 1, 2, 3), "shortcut": (1, 1, 4, 3)}


@pytest.fixture(scope="module")
def tree():
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in SIZES.items()}
    params["norm"] = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    params["dense"] = {"kernel": jnp.ones((3, 5))}
    return params


@pytest.fixture(scope="module")
def pruned(tree, masks):
    return ct.apply_masks(tree, masks)


@pytest.fixture(scope="module")
def masks(tree):
    """conv2 keeps 5 of 8 kernels, 4 taps each; conv3 keeps 3 of 6; all else is dense."""
    nothing = jax.tree.map(lambda _: None, tree)
    corner = ct.patterns.fixed_set(4)[3][:, :, None, None]
    kept2 = np.array([[1, 0], [1, 0], [1, 0], [1, 1]], bool)
    kept3 = np.array([[1, 0, 1], [0, 1, 0]], bool)
    return ct.Masks(
        pattern=nothing | {"conv2": {"kernel": jnp.broadcast_to(corner, SIZES["conv2"])}},
        kernel=nothing
        | {
            "conv2": {"kernel": jnp.broadcast_to(kept2, SIZES["conv2"])},
            "conv3": {"kernel": jnp.broadcast_to(kept3, SIZES["conv3"])},
        },
    )


def test_counts(pruned, masks):
    report = ct.report(pruned, masks)
    layers = {layer.name: layer for layer in report.layers}
    assert {name: (layer.weights, layer.retained) for name, layer in layers.items()} == {
        "conv1/kernel": (36, 36),
        "conv2/kernel": (72, 20),
        "conv3/kernel": (6, 3),
        "shortcut/kernel": (12, 12),
        "norm/scale": (3, 3),
        "norm/bias": (3, 3),
        "dense/kernel": (15, 15),
    }
    assert [name for name, layer in layers.items() if layer.pruned] == ["conv2/kernel", "conv3/kernel"]
    assert layers["conv2/kernel"].kernels_removed == layers["conv3/kernel"].kernels_removed == 3
    assert layers["conv1/kernel"].kernels_removed == 0
    assert layers["conv2/kernel"].compression == 72 / 20
    assert (report.conv_weights, report.conv_retained) == (126, 71)
    assert (report.model_weights, report.model_retained) == (147, 92)
    assert report.conv_compression == 126 / 71
    assert report.model_compression == 147 / 92
    assert report.pruned_layers_compression == 78 / 23
    assert report.compression_without("shortcut") == 114 / 59
    assert report.compression_without("no such layer") == report.conv_compression


def test_multiply_adds(pruned, masks):
    sizes = {"conv1/kernel": (8, 8), "conv2/kernel": (4, 8), "conv3/kernel": (4, 4), "dense/kernel": (1, 1)}
    report = ct.report(pruned, masks, output_sizes=sizes)
    by_name = {layer.name: (layer.multiply_adds, layer.retained_multiply_adds) for layer in report.layers}
    assert by_name["conv1/kernel"] == (64 * 36, 64 * 36)
    assert by_name["conv2/kernel"] == (32 * 72, 32 * 20)
    assert by_name["conv3/kernel"] == (16 * 6, 16 * 3)
    assert by_name["dense/kernel"] == (15, 15)
    assert by_name["shortcut/kernel"] == by_name["norm/scale"] == (None, None)
    assert report.multiply_adds == 64 * 36 + 32 * 72 + 16 * 6 + 15
    assert report.retained_multiply_adds == 64 * 36 + 32 * 20 + 16 * 3 + 15
    assert sizes == {"conv1/kernel": (8, 8), "conv2/kernel": (4, 8), "conv3/kernel": (4, 4), "dense/kernel": (1, 1)}


def test_without_sizes_there_are_no_multiply_adds(tree, masks):
    report = ct.report(tree, masks)
    assert all(layer.multiply_adds is layer.retained_multiply_adds is None for layer in report.layers)
    assert report.multiply_adds == report.retained_multiply_adds == 0


def test_shapes_are_enough(tree, pruned, masks):
    assert ct.report(jax.eval_shape(lambda: tree), masks) == ct.report(pruned, masks)


def test_a_zero_that_the_masks_keep_counts(tree, pruned, masks):
    zeros = jax.tree.map(jnp.zeros_like, tree)
    assert ct.report(zeros, masks) == ct.report(pruned, masks)


def test_masks_that_are_handed_in_count_as_applied(tree, pruned, masks):
    report = ct.report(tree, masks)
    assert report.marked == 52 + 3 and report.conv_compression == report.promised_conv_compression == 126 / 71
    assert report.to_text().splitlines()[-1] == "marked, not yet zero: 55 weights; they count as removed"


def test_what_is_marked_and_not_yet_zero(tree, pruned, masks):
    masks.pending = True  # as `masks_of` says it between selection and prune
    report = ct.report(tree, masks)
    assert report.marked == 52 + 3
    assert (report.conv_compression, report.model_compression, report.pruned_layers_compression) == (1.0, 1.0, 1.0)
    assert (report.promised_conv_compression, report.promised_model_compression) == (126 / 71, 147 / 92)
    line = report.to_text().splitlines()[-1]
    assert line == (
        "marked, not yet zero: 55 weights; without them 1.77x over all convolutions, 1.60x over the whole model"
    )
    assert str(report) == report.to_text() and "55 weights marked" in repr(report)
    # One layer is zero already, and of another one weight is not.
    half = tree | {"conv2": pruned["conv2"], "conv3": {"kernel": pruned["conv3"]["kernel"].at[0, 0, 0, 1].set(1e-30)}}
    report = ct.report(half, masks, output_sizes={"conv3/kernel": (2, 2)})
    assert {layer.name: layer.marked for layer in report.layers if layer.marked} == {"conv3/kernel": 1}
    assert (report.conv_retained, report.retained_multiply_adds) == (72, 16)
    report = ct.report(pruned, masks)
    assert report.marked == 0 and "marked" not in report.to_text() + repr(report)
    assert report.promised_conv_compression == report.conv_compression


def test_a_run_that_ends_before_its_prune():
    params = {"Conv_0": {"kernel": jnp.linspace(-1.0, 1.0, 3 * 3 * 8 * 8).reshape(3, 3, 8, 8)}}
    tx = ct.clicktrain(optax.sgd(0.0), ct.make_plan(params, {".*": 0.5}), select_step=0, prune_step=9, coeff=0.0)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    report = ct.report(params, ct.masks_of(state))
    assert report.conv_compression == 1.0 and report.promised_conv_compression == 4.5
    assert "marked, not yet zero: 448 weights" in report.to_text()


def test_plain_data(pruned, masks):
    report = ct.report(pruned, masks)
    assert all(type(value) is int for layer in report.layers for value in layer.shape)
    assert dataclasses.asdict(report)["layers"][0]["name"] == "conv1/kernel"
    text = report.to_text().splitlines()
    assert "conv2/kernel" in text[2] and "3x3x4x2" in text[2] and text[2].endswith("3.60x")
    gone = {line.split()[0]: line.split()[2] for line in text[1:-2]}
    assert gone["conv1/kernel"] == "dense" and gone["conv2/kernel"] == "37.5%"
    assert text[-1].startswith("whole model") and text[-1].endswith("1.60x")
    assert not any("norm" in line for line in text)


def test_nothing_retained(tree, masks):
    none_kept = ct.Masks(masks.pattern, jax.tree.map(jnp.zeros_like, masks.kernel))
    assert ct.report(jax.eval_shape(lambda: tree), none_kept).pruned_layers_compression == math.inf


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ((10_000,), (1000, 2000)),
        ((100, 0.29, 0.57), (29, 57)),
        ((2, 0.0, 0.5), (0, 1)),
        ((6,), (0, 1)),
        ((7, 0.1, 0.12), (0, 1)),
    ],
)
def test_schedule(arguments, steps):
    assert ct.schedule(*arguments) == dict(zip(("select_step", "prune_step"), steps))


def test_schedule_goes_into_the_wrapper(tree):
    plan = ct.make_plan(tree, {"conv2/kernel": 0.5})
    ct.clicktrain(optax.sgd(0.1), plan, **ct.schedule(100, select=0.2, prune=0.5), coeff=2.5e-4).init(tree)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "total_steps=0: expected a positive integer"),
        ((1e4,), "total_steps=10000.0: expected a positive integer"),
        ((100, 0.3, 0.3), "select=0.3 is not before prune=0.3"),
        ((100, 10, 20), r"select=10: expected a share of the run in \[0, 1\)"),
        ((100, 0.1, 1.0), "prune=1.0: expected a share"),
        ((100, float("nan"), 0.5), "select=nan: expected a share"),
        ((1,), "total_steps=1: the run ends before its prune"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        ct.schedule(*arguments)
