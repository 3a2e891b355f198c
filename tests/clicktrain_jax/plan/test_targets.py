"""One target: reached within 1% on every net of the zoo, explicit fractions respected, no layer emptied."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.trees import named_leaves

FOUR = ct.patterns.fixed_set(4)


def scores_like(params, seed=0):
    """Heavy-tailed scores of very different scale from layer to layer, as real ones are."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 10.0 ** rng.integers(-8, 3)
        return jnp.asarray(scale * rng.lognormal(0.0, 2.0, leaf.shape), jnp.float32)

    return jax.tree.map(draw, params)


def zoo(name, width):
    model = models.build(name, num_classes=10, width=width)
    shape = models.default_image_shape(name)
    return (
        models.abstract_variables(model, shape)["params"],
        models.prunable_convs(model, shape),
        models.output_sizes(model, shape),
    )


def chosen(params, plan, scores=None, patterns=FOUR):
    scores = scores_like(params) if scores is None else scores
    return ct.select_masks(scores, plan, patterns)


# The deep ones take a while to compile.
ZOO = [
    ("vgg11", 0.25, 8.0),
    pytest.param("vgg13", 0.5, 12.0, marks=pytest.mark.slow),
    pytest.param("vgg16", 0.25, 4.0, marks=pytest.mark.slow),
    ("resnet18", 0.25, 6.0),
    pytest.param("resnet32_wide", 0.125, 6.0, marks=pytest.mark.slow),
    pytest.param("resnet32", 1.0, 8.0, marks=pytest.mark.slow),
    pytest.param("resnet50_cifar", 0.125, 4.0, marks=pytest.mark.slow),
    ("small", 1.0, 5.0),
]


@pytest.mark.parametrize(("name", "width", "target"), ZOO)
def test_the_target_is_met_within_one_percent(name, width, target):
    params, paths, _ = zoo(name, width)
    plan = ct.make_plan(params, dict.fromkeys(paths, "auto"), target=target)
    report = ct.report(params, chosen(params, plan))
    assert report.conv_compression == pytest.approx(target, rel=0.01)
    pruned = [layer for layer in report.layers if layer.pruned]
    # Whatever the scales: no layer, no filter and no input channel is emptied, and the removal differs by layer.
    assert len(pruned) == len(paths) and all(layer.retained > 0 for layer in pruned)
    assert len({round(layer.compression, 2) for layer in pruned}) > 1
    assert all(layer.kernels_removed >= 0 for layer in pruned)


def test_default_rules_are_all_convolutions_but_the_first_and_shortcuts():
    params, paths, _ = zoo("resnet18", 0.25)
    plan = ct.make_plan(params, None, target=6.0)
    assert {layer.name for layer in plan.layers} == set(paths)


@pytest.mark.parametrize(("of", "target"), [("model", 4.0), ("multiply_adds", 6.0)])
def test_what_is_counted(of, target):
    params, _, sizes = zoo("small", 1.0)
    plan = ct.make_plan(params, None, target=target, target_of=of, output_sizes=sizes)
    report = ct.report(params, chosen(params, plan), output_sizes=sizes)
    reached = report.model_compression if of == "model" else report.multiply_adds / report.retained_multiply_adds
    assert reached == pytest.approx(target, rel=0.01)


def test_explicit_fractions_win():
    params, paths, _ = zoo("vgg11", 0.25)
    rules = dict.fromkeys(paths, "auto") | {paths[2]: 0.25, paths[-1]: None}
    plan = ct.make_plan(params, rules, target=3.0)
    report = ct.report(params, chosen(params, plan))
    layers = {layer.name: layer for layer in report.layers}
    kernels = math.prod(layers[paths[2]].shape[2:])
    assert layers[paths[2]].kernels_removed == 0.25 * kernels
    assert not layers[paths[-1]].pruned
    assert report.conv_compression == pytest.approx(3.0, rel=0.01)


def test_the_first_rule_that_matches_counts():
    params, paths, _ = zoo("vgg11", 0.25)
    plan = ct.make_plan(params, {paths[1]: 0.25, paths[2]: None, "Conv_.*/kernel": 0.5})
    layers = {layer.name: layer.kernels_removed for layer in ct.report(params, chosen(params, plan)).layers}
    kernels = {name: math.prod(leaf.shape[2:]) for name, leaf in named_leaves(params) if leaf.ndim == 4}
    assert layers[paths[1]] == 0.25 * kernels[paths[1]] and not layers[paths[2]]
    assert layers[paths[3]] == 0.5 * kernels[paths[3]]


SHAPES = [
    {"removal_score": "retained"},
    {"removal_scope": "filter"},
    {"tile": (16, 1), "removal_tile": (1, 1)},
    {"removal_tile": (8, 1), "floor": False},
    {"tile": (8, 8), "removal_tile": (1, 1), "removal_scope": "tile"},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_every_shape_meets_the_target(options):
    params, _, _ = zoo("small", 2.0)
    plan = ct.make_plan(params, None, target=8.0, **options)
    report = ct.report(params, chosen(params, plan))
    assert report.conv_compression == pytest.approx(8.0, rel=0.01)


def test_scales_of_layers_do_not_count():
    params, _, _ = zoo("small", 1.0)
    plan = ct.make_plan(params, None, target=5.0)
    scores = scores_like(params)
    # A power of two: the products are exact.
    scaled = {name: jax.tree.map(lambda s, i=i: s * 2.0**i, layer) for i, (name, layer) in enumerate(scores.items())}
    jax.tree.map(np.testing.assert_array_equal, chosen(params, plan, scores), chosen(params, plan, scaled))


def test_a_dead_layer_keeps_its_floor():
    params, paths, _ = zoo("vgg11", 0.25)
    scores = scores_like(params)
    scores["Conv_4"]["kernel"] = jnp.zeros_like(scores["Conv_4"]["kernel"])
    masks = chosen(params, ct.make_plan(params, None, target=8.0), scores)
    kernel = np.asarray(masks.kernel["Conv_4"]["kernel"])[0, 0]
    assert kernel.any(axis=0).all() and kernel.any(axis=1).all()
    assert ct.report(params, masks).conv_compression == pytest.approx(8.0, rel=0.01)
    # Without a floor one unit stays.
    free = chosen(params, ct.make_plan(params, None, target=8.0, floor=False), scores)
    assert np.asarray(free.kernel["Conv_4"]["kernel"])[0, 0].sum() == 1


def test_by_hand():
    """Two layers of four 1x1 kernels; two of all eight weights may stay beyond the floorless last ones."""
    tree = {"a": np.zeros((1, 1, 4, 1), np.float32), "b": np.zeros((1, 1, 4, 1), np.float32)}
    tree["a"][0, 0, :, 0] = [1, 2, 3, 10]  # relative damage 1/16, 2/15, 3/13
    tree["b"][0, 0, :, 0] = [40, 80, 90, 100]  # 40/310, 80/270, 90/190
    plan = ct.make_plan(tree, {".": "auto"}, target=2.0, floor=False, groups={".": 1})
    masks = ct.select_masks(tree, plan, FOUR)
    # 1/16, 40/310 = 0.129, 2/15 = 0.133 and 3/13 = 0.23 go first.
    assert np.asarray(masks.kernel["a"]).ravel().tolist() == [False, False, False, True]
    assert np.asarray(masks.kernel["b"]).ravel().tolist() == [False, True, True, True]


def test_damage_is_weighed_against_what_the_layer_still_holds():
    """By their scores alone, whatever their scale, the three least of the first layer would go."""
    tree = {"a": np.zeros((1, 1, 4, 1), np.float32), "b": np.zeros((1, 1, 4, 1), np.float32)}
    tree["a"][0, 0, :, 0] = [1, 2, 3, 10]  # relative damage 1/16, 2/15 = 0.13, 3/13 = 0.23
    tree["b"][0, 0, :, 0] = [20, 21, 22, 63]  # 20/126 = 0.16, 21/106 = 0.20, 22/85 = 0.26
    plan = ct.make_plan(tree, {".": "auto"}, target=2.0, floor=False, groups={".": 1})
    masks = ct.select_masks(tree, plan, FOUR)
    for name in "ab":
        assert np.asarray(masks.kernel[name]).ravel().tolist() == [False, False, True, True]


def test_what_fractions_leave_counts_for_the_target():
    """A quarter of one layer, and at least one kernel of the other: 17 of 128 may be reached, 80 are to begin with."""
    rng = np.random.default_rng(0)
    tree = {name: rng.exponential(size=(1, 1, 8, 8)).astype(np.float32) for name in "ab"}
    rules = {"a": 0.75, "b": "auto"}
    plan = ct.make_plan(tree, rules, target=5.0, floor=False)
    assert ct.report(tree, ct.select_masks(tree, plan, FOUR)).conv_compression == pytest.approx(5.0, rel=0.03)
    with pytest.raises(ValueError, match="the reachable maximum is 7.52"):
        ct.make_plan(tree, rules, target=8.0, floor=False)
    with pytest.raises(ValueError, match="already reach, 1.60"):
        ct.make_plan(tree, rules, target=1.5, floor=False)


def test_ties_go_until_the_target_and_no_further():
    tree = {name: np.ones((3, 3, 8, 8), np.float32) for name in "abc"}
    plan = ct.make_plan(tree, {".": "auto"}, target=4.5)
    masks = ct.select_masks(tree, plan, FOUR)
    assert ct.report(tree, masks).promised_conv_compression == pytest.approx(4.5, rel=0.01)


BAD = [
    ({"target": 0.5}, "target=0.5: expected a compression of 1 or more"),
    ({"target": "8"}, "target='8': expected a compression"),
    ({"target": 500.0}, r"target=500 over convolutions is out of reach: the reachable maximum is \d+\.\d\d"),
    ({"target": 2.0}, r"target=2 over convolutions is below what patterns .* already reach, 2\.2"),
    ({"target": 8.0, "target_of": "bytes"}, "target_of='bytes': expected one of"),
    ({"target": 8.0, "target_of": "multiply_adds"}, "needs output_sizes with 'Conv_1/kernel'"),
    ({"target": 8.0, "rules": {"Conv_1/kernel": 0.5}}, "every rule gives a fraction, so nothing is left"),
    ({"rules": {"Conv_1/kernel": "auto"}}, "a rule says 'auto', but there is no target"),
    ({"target": 8.0, "rules": {"Conv_1/kernel": "all"}}, "fraction 'all' is outside"),
    ({}, "rules=None: expected a non-empty mapping"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_targets(options, message):
    params, _, _ = zoo("vgg11", 0.25)
    rules = options.pop("rules", None)
    with pytest.raises(ValueError, match=message):
        ct.make_plan(params, rules, **options)


def test_the_reachable_maximum_is_reachable():
    params, paths, _ = zoo("resnet18", 0.25)
    rules = dict.fromkeys(paths, "auto")
    with pytest.raises(ValueError, match="reachable maximum is") as refusal:
        ct.make_plan(params, rules, target=100.0)
    maximum = float(str(refusal.value).partition("maximum is ")[2].split()[0])
    plan = ct.make_plan(params, rules, target=maximum)
    assert ct.report(params, chosen(params, plan)).conv_compression == pytest.approx(maximum, rel=0.01)


def test_short_tiles_of_explicit_fractions_do_not_hide_what_cannot_be_reached():
    """Light short tiles may be the ones to go: then a wide fraction saves little."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 3, 16, 24), "b": (3, 3, 24, 40), "c": (1, 1, 40, 24)}
    tree = {name: rng.exponential(size=shape).astype(np.float32) ** 3 for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="out of reach"):
        ct.make_plan(tree, {"b": 0.3, ".*": "auto"}, target=4.0, tile=(32, 1), floor=False)
    plan = ct.make_plan(tree, {"b": 0.3, ".*": "auto"}, target=2.9, tile=(32, 1), floor=False)
    masks = ct.select_masks(tree, plan, FOUR)
    assert all(np.asarray(mask).any() for mask in masks.kernel.values())


def test_grouped_convolutions_are_left_out_of_the_default_rules():
    tree = {"a": np.ones((3, 3, 16, 32)), "b": np.ones((3, 3, 8, 32))}
    plan = ct.make_plan(tree, target=2.5, groups={"b": 4})
    assert [layer.name for layer in plan.layers] == ["a"]


def test_a_target_counts_with_its_entries():
    params, _, _ = zoo("small", 1.0)
    plan = ct.make_plan(params, None, target=8.0, entries=3)
    with pytest.raises(ValueError, match=r"entries=3 taps a kernel .* the patterns have \[4\]"):
        ct.select_masks(scores_like(params), plan, FOUR)
    masks = chosen(params, plan, patterns=ct.patterns.candidates((3, 3), 3)[::11])
    assert ct.report(params, masks).conv_compression == pytest.approx(8.0, rel=0.01)
