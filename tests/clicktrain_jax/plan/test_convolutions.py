"""Which leaves count as convolutions, what becomes of sizes without patterns, and kernels in OIHW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct

# What is chosen is of scores; how they are compiled is tested beside the selection.
pytestmark = pytest.mark.usefixtures("quick")

FOUR = ct.patterns.fixed_set(4)
CONV = {"Conv_0": {"kernel": (3, 3, 64, 64)}}


def arrays(shapes):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def planned(extra, **options):
    plan = ct.make_plan(arrays(CONV | extra), target=4.0, **options)
    return [layer.name for layer in plan.layers], dict(plan.left_out), plan


NO_CONVOLUTIONS = {
    "a position embedding": ({"pos_embedding": (1, 7, 7, 64)}, "positions or tokens"),
    "one under a module": ({"encoder": {"posembed_input": {"pos_embedding": (1, 14, 14, 64)}}}, "positions or tokens"),
    "a relative bias": ({"block": {"relative_position_bias_table": (8, 1, 49, 49)}}, "positions or tokens"),
    "latents": ({"latents": (1, 1, 32, 64)}, "not named like a kernel"),
    "scanned attention": ({"attention": {"query": {"kernel": (12, 64, 8, 8)}}}, "attention"),
    "its output": ({"MultiHeadDotProductAttention_0": {"out": {"kernel": (3, 3, 64, 192)}}}, "attention"),
    "heads, by their bias": ({"mixer": {"kernel": (3, 3, 64, 192), "bias": (3, 192)}}, "(3, 192)"),
    "stacked Conv1D": ({"blocks": {"kernel": (6, 3, 64, 64)}}, "6x3 is not square"),
    "stacked by vmap": ({"VmapBlock_0": {"Dense_0": {"kernel": (3, 3, 64, 64)}}}, "scan or vmap"),
    "stacked by scan": ({"ScanConv_0": {"kernel": (3, 3, 64, 64)}}, "scan or vmap"),
    "stacked, with their bias": ({"layers": {"kernel": (3, 3, 64, 64), "bias": (3, 64)}}, "(3, 64)"),
    "a local convolution": ({"ConvLocal_0": {"kernel": (7, 7, 576, 64)}}, "local kernels"),
    "one by its bias": ({"near": {"kernel": (7, 7, 576, 64), "bias": (7, 7, 64)}}, "(7, 7, 64)"),
    "a large local one": ({"near": {"kernel": (16, 16, 72, 64)}}, "16x16"),
    "a three-dimensional one": ({"Conv3D": {"kernel": (3, 3, 3, 64, 64)}}, "5-D"),
}


@pytest.mark.parametrize("which", NO_CONVOLUTIONS)
def test_what_is_no_convolution_is_left_out_and_listed(which):
    extra, reason = NO_CONVOLUTIONS[which]
    names, left_out, plan = planned(extra)
    assert names == ["Conv_0/kernel"]
    (name,) = left_out
    assert reason in left_out[name]
    assert f"  {name}: " in str(plan) and repr(plan) == str(plan)
    assert "declares it a convolution" in str(plan)
    # Nor do they count: the target is over convolutions.
    scores = jax.tree.map(jnp.square, drawn(CONV | extra))
    report = ct.report(arrays(CONV | extra), ct.select_masks(scores, plan, FOUR))
    assert report.conv_compression == pytest.approx(4.0, rel=0.01) and report.conv_weights == 9 * 64 * 64


def test_a_rule_declares_a_convolution():
    _, left_out, plan = planned({"ScanCell_0": {"Conv_0": {"kernel": (3, 3, 64, 64)}}})
    assert list(left_out) == ["ScanCell_0/Conv_0/kernel"]
    rules = {layer.name: "auto" for layer in plan.layers} | dict.fromkeys(left_out, "auto")
    tree = arrays(CONV | {"ScanCell_0": {"Conv_0": {"kernel": (3, 3, 64, 64)}}})
    assert len(ct.make_plan(tree, rules, target=4.0).layers) == 2


SHORTCUTS = ["conv_proj", "shortcut", "layer2_0_downsample_0", "proj_conv", "ResNetSkipConnection_0", "DownSample_1"]


@pytest.mark.parametrize("name", SHORTCUTS)
def test_shortcuts_stay_dense(name):
    names, left_out, _ = planned({name: {"kernel": (1, 1, 64, 64)}, "Conv_1": {"kernel": (1, 1, 64, 64)}})
    assert names == ["Conv_0/kernel", "Conv_1/kernel"]
    assert left_out == {f"{name}/kernel": "a shortcut, by its name"}


REAL = {
    "a convolution inside an attention": {"attention": {"conv_q": {"kernel": (3, 3, 64, 64)}}},
    "of a ConvLSTM, whose bias tells": {"ScanCell_0": {"Conv_0": {"kernel": (3, 3, 64, 64), "bias": (64,)}}},
    "of a localisation net": {"localization": {"Conv_0": {"kernel": (3, 3, 64, 64)}}},
    "of one called embedding": {"embedding": {"kernel": (3, 3, 64, 64)}},
    "1x1 in an attention": {"attention": {"query": {"kernel": (1, 1, 64, 64)}}},
    "of a stack": {"ConvStack_0": {"Conv_1": {"kernel": (3, 3, 64, 64)}}},
}


@pytest.mark.parametrize("which", REAL)
def test_what_is_one(which):
    names, left_out, _ = planned(REAL[which])
    assert len(names) == 2 and not left_out


def test_names_of_another_language():
    tree = arrays({"a": (3, 3, 64, 64), "b": (1, 1, 64, 64), "pos": (1, 7, 7, 64)})
    plan = ct.make_plan(tree, target=2.0)
    assert [layer.name for layer in plan.layers] == ["a", "b"] and dict(plan.left_out).keys() == {"pos"}


@pytest.mark.parametrize("size", [(2, 2), (5, 5), (7, 7), (1, 3)], ids=str)
def test_sizes_without_patterns_lose_whole_kernels(size):
    extra = {"Conv_1": {"kernel": (*size, 64, 64)}}
    names, left_out, plan = planned(extra)
    assert names == ["Conv_0/kernel", "Conv_1/kernel"] and not left_out
    assert "whole kernels" in str(plan).splitlines()[2] and "4 taps" in str(plan).splitlines()[1]
    scores = jax.tree.map(jnp.square, drawn(CONV | extra))
    masks = jax.jit(lambda scores: ct.select_masks(scores, plan, FOUR))(scores)
    assert np.asarray(masks.pattern["Conv_1"]["kernel"]).all()
    kernel = np.asarray(masks.kernel["Conv_1"]["kernel"])
    assert kernel.shape == (*size, 64, 64) and (kernel == kernel[:1, :1]).all() and not kernel.all()
    report = ct.report(ct.apply_masks(scores, masks), masks)
    assert report.marked == 0 and report.conv_compression == pytest.approx(4.0, rel=0.01)


def test_whole_kernels_through_a_run():
    tree = drawn({"Conv_0": {"kernel": (3, 3, 8, 8)}, "Conv_1": {"kernel": (7, 7, 8, 8)}})
    plan = ct.make_plan(tree, {"Conv_.*/kernel": 0.5}, entries={"Conv_1/kernel": None})
    # Above 32 taps no set of patterns exists, and none is asked for.
    assert plan == ct.make_plan(tree, {"Conv_.*/kernel": 0.5})
    tx = ct.clicktrain(optax.sgd(0.01, momentum=0.9), plan, select_step=0, prune_step=2, coeff=1e-3)
    state, step = tx.init(tree), jax.jit(tx.update)
    assert np.asarray(ct.masks_of(state).kernel["Conv_1"]["kernel"]).all()
    for _ in range(4):
        updates, state = step(tree, state, tree)
        tree = optax.apply_updates(tree, updates)
    masks = ct.masks_of(state)
    kept = np.asarray(tree["Conv_1"]["kernel"] != 0)
    assert kept.sum() == 32 * 49 and (kept == kept[:1, :1]).all()
    both = masks.pattern["Conv_1"]["kernel"] & masks.kernel["Conv_1"]["kernel"]
    np.testing.assert_array_equal(kept, np.asarray(both))
    assert (np.asarray(tree["Conv_0"]["kernel"]) != 0).sum() == 32 * 4


def test_entries_none_and_its_advice():
    tree = drawn({"Conv_1": {"kernel": (5, 5, 8, 4)}})
    with pytest.raises(ValueError, match=r"whole kernels alone, make_plan\(entries=\{'Conv_1/kernel': None\}\)"):
        ct.select_masks(tree, ct.make_plan(tree, {".*": 0.5}), FOUR)
    for entries in (None, {"Conv_1/kernel": None}):
        scores = jax.tree.map(jnp.square, tree)
        masks = ct.select_masks(scores, ct.make_plan(tree, {".*": 0.5}, entries=entries), FOUR)
        assert np.asarray(masks.kernel["Conv_1"]["kernel"]).sum() == 16 * 25
    with pytest.raises(ValueError, match="expected taps of 1 or more, or None for no patterns"):
        ct.make_plan(tree, {".*": 0.5}, entries={".*": 0})
    # Named by entries, a size beside 3x3 keeps its patterns in a plan without rules.
    plan = ct.make_plan(drawn({"Conv_1": {"kernel": (5, 5, 8, 4)}}), target=5.0, entries={"Conv_1/kernel": 6})
    assert plan.layers[0].chooses_patterns


NEAR = [
    ("Conv_.*/kernel", "did you mean '(.*/)?Conv_.*/kernel'?"),
    ("Block_0/Conv_.", "did you mean 'Block_0/Conv_./kernel'?"),
    ("params/Block_0/Conv_1/kernel", "did you mean 'Block_0/Conv_1/kernel'?"),
    ("block_0/conv_1/kernel", "did you mean 'Block_0/Conv_1/kernel'?"),
    ("conv/kernel|Conv_1/kernel", "did you mean '(.*/)?(conv/kernel|Conv_1/kernel)'?"),
]


@pytest.mark.parametrize(("rule", "hint"), NEAR)
def test_a_rule_that_almost_matches(rule, hint):
    nested = arrays({"Block_0": {"Conv_1": {"kernel": (3, 3, 8, 8)}}, "head": {"Conv_1": {"kernel": (3, 3, 8, 8)}}})
    with pytest.raises(ValueError, match="matches nothing") as refusal:
        ct.make_plan(nested, {rule: 0.5})
    assert hint in str(refusal.value)


def test_print_shows_the_rule_that_almost_matched():
    tree = arrays(
        {
            "Conv_0": {"kernel": (3, 3, 8, 8)},
            "Block_0": {"Conv_1": {"kernel": (3, 3, 8, 8)}},
            "other": {"kernel": (3, 3, 8, 8)},
            "Dense_0": {"kernel": (8, 8)},
        }
    )
    plan = ct.make_plan(tree, {"Conv_.*/kernel": 0.65, "other/.*": None})
    assert dict(plan.left_out) == {
        "Block_0/Conv_1/kernel": "no rule matches it "
        "(rule 'Conv_.*/kernel' nearly does: did you mean '(.*/)?Conv_.*/kernel'?)",
        "other/kernel": "rule 'other/.*' says so",
    }
    assert "did you mean '(.*/)?Conv_.*/kernel'" in str(plan) and "65.0%  4 taps" in str(plan)
    assert len(ct.make_plan(tree, {"(.*/)?Conv_.*/kernel": 0.65}).layers) == 2


def test_a_layer_that_vanishes_warns_by_name():
    tree = arrays({"Conv_0": {"kernel": (3, 3, 4, 4)}, "Conv_1": {"kernel": (1, 1, 2, 2)}})
    with pytest.warns(UserWarning, match=r"'Conv_0/kernel' vanishes: a fraction of 0.95 removes all of its 16 kernels"):
        ct.make_plan(tree, {"Conv_0/kernel": 0.95})
    with pytest.warns(UserWarning, match=r"'Conv_1/kernel' vanishes: .* use at most 0.7500"):
        ct.make_plan(tree, {".*": 0.8})
    ct.make_plan(tree, {"Conv_0/kernel": 0.9375, "Conv_1/kernel": 0.75})


OIHW = [
    {"conv": {"weight": (64, 32, 3, 3)}},
    {"conv": {"weight": (64, 32, 1, 1)}},
    {"conv": {"weight": (64, 3, 7, 7), "bias": (64,)}},
    {"conv": {"weight": (3, 3, 5, 5)}, "next": {"weight": (64, 3, 3, 3)}},
    {"conv": {"weight": (4, 3, 5, 5), "bias": (4, 1, 1)}},
    {"conv": {"kernel": (128, 64, 4, 4)}},
]


@pytest.mark.parametrize("tree", OIHW, ids=str)
def test_oihw_is_named(tree):
    tree = arrays(tree)
    for rules, more in (({"conv/.*(kernel|weight)": 0.5}, {}), (None, {"target": 2.0})):
        with pytest.raises(ValueError, match="looks like OIHW .* axes='OIHW'"):
            ct.make_plan(tree, rules, **more)


def test_what_could_be_both():
    tree = arrays({"conv": {"weight": (3, 3, 5, 5)}})
    with pytest.raises(ValueError, match="could be HWIO .* or OIHW"):
        ct.make_plan(tree, {".*": 0.5})
    assert ct.make_plan(tree, {".*": 0.5}, axes="HWIO").layers[0].shape == (3, 3, 5, 5)
    assert ct.make_plan(tree, {".*": 0.5}, axes="OIHW", entries=6).layers[0].shape == (5, 5, 3, 3)
    # Called "kernel", or beside others that are clear, it is what it is in jax.
    clear = {"b": {"weight": (3, 3, 8, 16)}}
    for other in ({"conv": {"kernel": (3, 3, 5, 5)}}, {"conv": {"weight": (3, 3, 5, 5)}} | clear):
        assert ct.make_plan(arrays(other), {"conv/.*": 0.5}).layers[0].shape == (3, 3, 5, 5)
    with pytest.raises(ValueError, match="axes='IOHW': expected 'HWIO'"):
        ct.make_plan(tree, {".*": 0.5}, axes="IOHW")


TO_OIHW = (3, 2, 0, 1)


def turned(tree):
    return jax.tree.map(lambda leaf: leaf.transpose(TO_OIHW) if leaf is not None and leaf.ndim == 4 else leaf, tree)


# (3, 3, 5, 5) is 5x5 taps of 3 to 3 channels here, which no shape tells.
SMALL = {
    "a": {"weight": (3, 3, 8, 16)},
    "b": {"weight": (1, 1, 16, 8)},
    "c": {"weight": (5, 5, 3, 3)},
    "fc": {"weight": (8, 4)},
}
OPTIONS = [{}, {"tile": (4, 1), "removal_tile": (2, 2)}, {"removal_score": "retained", "removal_scope": "filter"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_oihw_chooses_what_hwio_chooses(options):
    tree = drawn(SMALL)
    rules = {"[ab]/weight": 0.5, "c/weight": 0.3}
    plain = ct.make_plan(tree, rules, axes="HWIO", entries={"c/weight": None}, **options)
    plan = ct.make_plan(turned(tree), rules, axes="OIHW", entries={"c/weight": None}, **options)
    assert plan.layers[0].leaf_shape == (16, 8, 3, 3) and "(OIHW)" in str(plan)
    scores = jax.tree.map(jnp.square, tree)
    masks, expected = ct.select_masks(turned(scores), plan, FOUR), ct.select_masks(scores, plain, FOUR)
    for mine, theirs in ((masks.pattern, expected.pattern), (masks.kernel, expected.kernel)):
        jax.tree.map(np.testing.assert_array_equal, mine, turned(theirs))
    pruned = ct.apply_masks(turned(tree), masks)
    jax.tree.map(np.testing.assert_array_equal, pruned, turned(ct.apply_masks(tree, expected)))
    report, other = ct.report(pruned, masks, axes="OIHW"), ct.report(ct.apply_masks(tree, expected), expected)
    for field in ("conv_compression", "model_compression", "conv_weights", "marked"):
        assert getattr(report, field) == getattr(other, field)
    assert [layer.kernels_removed for layer in report.layers] == [layer.kernels_removed for layer in other.layers]
    sums = ct.group_lasso(turned(tree), masks, axes="OIHW")
    np.testing.assert_allclose(sums, ct.group_lasso(tree, expected, axes="HWIO"), rtol=1e-6)


@pytest.mark.parametrize("importance", ["taylor", "group_taylor"])
@pytest.mark.parametrize("steps", [1, 2])
def test_oihw_trains_as_hwio_does(importance, steps):
    def train(tree, axes):
        plan = ct.make_plan(tree, {"[abc]/weight": 0.5}, axes=axes, entries={"c/weight": None})
        tx = ct.clicktrain(
            optax.sgd(0.1, momentum=0.9),
            plan,
            select_step=1,
            prune_step=4,
            coeff=0.05,
            importance=importance,
            importance_steps=steps,
        )
        state, step = tx.init(tree), jax.jit(tx.update)
        for _ in range(6):
            updates, state = step(jax.tree.map(jnp.sin, tree), state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree, ct.masks_of(state)

    (tree, masks), (other, expected) = train(drawn(SMALL), "HWIO"), train(turned(drawn(SMALL)), "OIHW")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), other, turned(tree))
    for mine, theirs in ((expected.pattern, masks.pattern), (expected.kernel, masks.kernel)):
        jax.tree.map(np.testing.assert_array_equal, mine, turned(theirs))
    assert ct.report(other, expected, axes="OIHW").marked == 0
