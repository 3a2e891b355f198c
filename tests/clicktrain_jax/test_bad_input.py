"""What a user can get wrong: each a ValueError that says what was received and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct

FOUR = ct.patterns.fixed_set(4)


@pytest.fixture
def params():
    return {
        "Conv_0": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)},
        "Conv_1": {"kernel": jnp.ones((5, 5, 8, 4))},
        "Dense_0": {"kernel": jnp.ones((4, 2))},
    }


def refuses(message):
    return pytest.raises(ValueError, match=message)


BAD_RULES = {
    "matches nothing": (
        {"Conv_0/kernel": 0.5, "Conv_9/kernel": 0.5},
        r"'Conv_9/kernel' matches nothing.*'Conv_0/kernel'",
    ),
    "matches a part only": ({"Conv_0": 0.5}, r"'Conv_0' matches nothing; names are matched whole"),
    "shadowed": ({"Conv_.*/kernel": 0.5, "Conv_0/kernel": 0.1}, r"'Conv_0/kernel' never applies: rules before it"),
    "prunes a dense layer": ({".*/kernel": 0.5}, r"'Dense_0/kernel' of shape \(4, 2\), which is not 4-D"),
    "prunes a bias": ({"Conv_0/.*": 0.5}, r"'Conv_0/bias' of shape \(8,\), which is not 4-D"),
    "is no regular expression": ({"Conv_(": 0.5}, r"'Conv_\(' is not a regular expression"),
    "is no text": ({0: 0.5}, r"key 0 is not a string"),
    "prunes nothing": ({"Conv_0/kernel": None}, r"the rules prune no layer"),
    "none": ({}, r"rules=\{\}: expected a non-empty mapping"),
    "a list": ([("Conv_0/kernel", 0.5)], r"expected a non-empty mapping"),
}


@pytest.mark.parametrize("rules", BAD_RULES)
def test_rules(params, rules):
    rules, message = BAD_RULES[rules]
    with refuses(message):
        ct.make_plan(params, rules)


@pytest.mark.parametrize(
    "fraction", [-0.1, 1.0, 1, 55, float("nan"), float("inf"), True, False, "0.5", [0.5]], ids=repr
)
def test_fractions(params, fraction):
    with refuses(r"'Conv_0/kernel': fraction .* is outside \[0, 1\)"):
        ct.make_plan(params, {"Conv_0/kernel": fraction})


def test_strict_names_the_uncovered_convolution(params):
    with refuses(r"strict: no rule covers the convolution 'Conv_1/kernel' \(5, 5, 8, 4\)"):
        ct.make_plan(params, {"Conv_0/kernel": 0.5}, strict=True)
    assert len(ct.make_plan(params, {"Conv_0/kernel": 0.5, "Conv_1/.*": None}, strict=True).layers) == 1


TILES = [8, (8,), (0, 1), (-1, None), (1.5, 1), (True, 1), ("8", 1), (1, 1, 1), None]


@pytest.mark.parametrize("tile", TILES, ids=repr)
def test_tiles(params, tile):
    with refuses(r"tile=.*: expected \(filters, channels\), each a positive int or None"):
        ct.make_plan(params, {"Conv_0/kernel": 0.5}, tile=tile)


def test_grouped_convolutions():
    depthwise = {"kernel": jnp.ones((3, 3, 1, 8))}
    with refuses(r"'kernel' of shape \(3, 3, 1, 8\) has one input channel, like a depthwise"):
        ct.make_plan(depthwise, {"kernel": 0.5})
    grouped = {"kernel": jnp.ones((3, 3, 4, 8))}
    with refuses(r"'kernel' is a grouped convolution \(feature_group_count=2\)"):
        ct.make_plan(grouped, {"kernel": 0.5}, groups={"kernel": 2})
    # Patterns alone are allowed, and so is an ordinary convolution that says so.
    for tree, fraction, groups in [(depthwise, 0.0, None), (grouped, 0.0, {"kernel": 2}), (depthwise, 0.5, {".*": 1})]:
        assert ct.make_plan(tree, {"kernel": fraction}, groups=groups).layers[0].fraction == fraction


BAD_PATTERNS = {
    "one pattern alone": (FOUR[0], r"shape \(3, 3\): expected \(P, kh, kw\)"),
    "empty set": (FOUR[:0], r"0 patterns: expected 1 to 255"),
    "too many": (np.ones((256, 3, 3), bool), r"256 patterns: expected 1 to 255"),
    "too large": (np.ones((1, 7, 7), bool), r"7x7 taps: at most 32"),
    "weights": (FOUR * 0.5, r"values other than 0 and 1"),
    "an empty pattern": (np.zeros((2, 3, 3), bool), r"a pattern keeps no tap"),
    "of another size": (np.ones((2, 5, 5), bool), r"5x5 taps on 'Conv_0/kernel' with 3x3 kernels"),
}


@pytest.mark.parametrize("patterns", BAD_PATTERNS)
def test_pattern_sets(params, patterns):
    patterns, message = BAD_PATTERNS[patterns]
    plan = ct.make_plan(params, {"Conv_0/kernel": 0.5})
    with refuses(message):
        ct.select_masks(params, plan, patterns)
    with refuses(message):
        ct.clicktrain(optax.identity(), plan, select_step=0, prune_step=1, coeff=0.0, patterns=patterns)


def test_3x3_patterns_on_a_5x5_kernel(params):
    plan = ct.make_plan(params, {"Conv_1/kernel": 0.5})
    with refuses(r"patterns of 3x3 taps on 'Conv_1/kernel' with 5x5 kernels: leave that layer dense"):
        ct.select_masks(params, plan, FOUR)
    with refuses(r"3x3 taps on 'Conv_1/kernel'"):
        ct.clicktrain(optax.identity(), plan, select_step=0, prune_step=1, coeff=0.0)


@pytest.mark.parametrize("number", [0, 5, 16, "4"])
def test_fixed_sets(number):
    with refuses(r"num_patterns=.*: fixed sets exist for 4, 8 and 12"):
        ct.patterns.fixed_set(number)


@pytest.mark.parametrize("text", ["11/0", "112/000", "ab"])
def test_pattern_text(text):
    with refuses("is not rows of 0 and 1"):
        ct.patterns.parse(text)


def plan_of(params):
    return ct.make_plan(params, {"Conv_0/kernel": 0.5})


def test_nan_scores(params):
    scores = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), params)
    with refuses(r"scores of 'Conv_0/kernel' hold NaN"):
        ct.select_masks(scores, plan_of(params), FOUR)
    # NaN in a layer that is not planned is nobody's concern here.
    ct.select_masks(scores | {"Conv_0": params["Conv_0"]}, plan_of(params), FOUR)


def test_trees_and_shapes_that_do_not_belong_together(params):
    plan = plan_of(params)
    masks = ct.select_masks(params, plan, FOUR)
    without = {name: params[name] for name in ("Conv_0", "Conv_1")}
    reshaped = params | {"Conv_0": {"kernel": jnp.ones((3, 3, 8, 4)), "bias": jnp.ones(8)}}
    holed = params | {"Conv_0": {"kernel": None, "bias": jnp.ones(8)}}
    tx = ct.clicktrain(optax.sgd(0.1), plan, select_step=0, prune_step=1, coeff=0.0)
    for call in (
        lambda tree: ct.select_masks(tree, plan, FOUR),
        lambda tree: ct.apply_masks(tree, masks),
        lambda tree: ct.group_lasso(tree, masks),
        lambda tree: ct.report(tree, masks),
        lambda tree: ct.importance.taylor(tree, params),
        tx.init,
    ):
        with refuses(r"Conv_0/kernel.*shape|shape .*Conv_0/kernel"):
            call(reshaped)
        with refuses(r"belongs to another tree.*'Dense_0/kernel'"):
            call(without)
    with refuses(r"holds None at 'Conv_0/kernel'"):
        tx.init(holed)
    with refuses(r"belongs to another tree.*'Dense_0/kernel'"):
        ct.add_group_lasso(without, params, masks, 0.1)
    with refuses(r"'Conv_0/kernel'"):
        ct.add_group_lasso(params, reshaped, masks, 0.1)


def test_lasso_of_parameters_without_the_pruned_layer(params):
    masks = ct.select_masks(params, plan_of(params), FOUR)
    with refuses(r"'Conv_0"):
        ct.add_group_lasso(params, {"Dense_0": params["Dense_0"]}, masks, 0.1)


def transform(params, **changed):
    options = {"select_step": 0, "prune_step": 1, "coeff": 0.0} | changed
    return ct.clicktrain(optax.sgd(0.1), plan_of(params), **options)


def test_transform_options(params):
    with refuses("select_step=5 is not before prune_step=5"):
        transform(params, select_step=5, prune_step=5)
    for coeff in (-1e-4, float("nan"), "1e-3", True, None, jnp.float32(-1), jnp.ones(2), np.array(np.inf)):
        with refuses("coeff=.*: expected a finite number >= 0"):
            transform(params, coeff=coeff)
        if coeff is not None:
            with refuses("coeff=.*: expected a finite number >= 0"):
                ct.add_group_lasso(params, params, None, coeff)
    for coeff in (np.array(1e-3), jnp.bfloat16(1e-3), np.float32(0), 1):
        transform(params, coeff=coeff)
    with refuses(r"importance='fisher': expected one of \['group_taylor', 'magnitude', 'taylor'\] or a function"):
        transform(params, importance="fisher")


KEY = jax.random.key(0)
METHODS = {
    "clicktrain": lambda *args: ct.clicktrain(*args, select_step=0, prune_step=1, coeff=0.0),
    "phase updates": lambda *args: ct.phase_updates(*args, coeff=0.0),
    "magnitude": lambda *args: ct.methods.magnitude(*args, prune_step=1),
    "gradual": lambda *args: ct.methods.gradual_magnitude(*args, begin_step=0, end_step=2, every=1),
    "rigl": lambda *args: ct.methods.rigl(*args, key=KEY, every=1, end_step=2),
    "sparse evolutionary": lambda *args: ct.methods.sparse_evolutionary(*args, key=KEY, every=1, end_step=2),
    "random": lambda *args: ct.methods.random(*args, key=KEY),
    "n of m": lambda *args: ct.methods.n_of_m(*args, prune_step=1),
    "sr_ste": lambda *args: ct.methods.sr_ste(*args),
    "admm": lambda *args: ct.methods.admm(*args, patterns=FOUR, rho=1e-2, begin_step=0, every=1),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_optimizer_or_no_plan(params, method):
    for inner, kind in (("sgd", "str"), (optax.sgd, "function"), (None, "NoneType"), (plan_of(params), "Plan")):
        with refuses(rf"inner is a {kind}: expected an optax transformation, such as optax.sgd\(0.1\)"):
            METHODS[method](inner, plan_of(params))
    for plan, kind in (({"Conv_0/kernel": 0.5}, "dict"), (None, "NoneType")):
        with refuses(rf"plan is a {kind}: expected what clicktrain_jax.make_plan\(params, rules\) returns"):
            METHODS[method](optax.sgd(0.1), plan)


UPDATES = ("clicktrain", "magnitude", "sr_ste", "admm")


@pytest.mark.parametrize("method", UPDATES)
def test_updates_of_other_trees(params, method):
    tx = METHODS[method](optax.sgd(0.1), plan_of(params))
    state, part = tx.init(params), {"Conv_0": {"kernel": params["Conv_0"]["kernel"]}}
    holed = params | {"Conv_0": {"kernel": None, "bias": jnp.ones(8)}}
    with refuses("params: belongs to another tree"):
        tx.update(params, state, part)
    with refuses("'Conv_0/kernel'"):
        tx.update(holed, state, params)
    with refuses("'Conv_0/kernel'"):
        tx.update(params, state, holed)
    if method == "clicktrain":
        with refuses("grads: belongs to another tree.*'Conv_0/bias'"):
            tx.update(part, state, params)


def test_masks_of_0_and_1_are_masks_and_other_numbers_are_not(params):
    masks = ct.select_masks(params, plan_of(params), FOUR)
    for dtype in (np.uint8, np.float32, jnp.bfloat16):
        numbers = jax.tree.map(lambda mask, dtype=dtype: mask.astype(dtype), (masks.pattern, masks.kernel))
        of_numbers = ct.Masks(*numbers)
        assert ct.report(params, of_numbers).promised_conv_compression == (
            ct.report(params, masks).promised_conv_compression
        )
        jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(params, of_numbers), ct.apply_masks(params, masks))
        assert ct.apply_masks(params, numbers[1])["Conv_0"]["kernel"].sum() == masks.kernel["Conv_0"]["kernel"].sum()
    soft = jax.tree.map(lambda mask: 0.5 * mask, masks.kernel)
    for call in (ct.apply_masks, ct.report):
        with refuses("masks: the mask of 'Conv_0/kernel' has dtype float32, expected bool: True where a weight stays"):
            call(params, soft)
    with refuses("the mask of 'Conv_0/kernel' has dtype float32"):
        ct.Masks(masks.pattern, soft)


def test_an_optimizer_state_in_place_of_masks(params):
    state = transform(params).init(params)
    for call in (ct.apply_masks, ct.report, ct.group_lasso):
        for whole in (state, (optax.EmptyState(), state)):
            with refuses(r"masks is an optimizer state: expected clicktrain_jax.masks_of\(opt_state\)"):
                call(params, whole)


@pytest.mark.parametrize("shape", ["8,8,3", 8, (1, 8, 8, 3), (8, 8), (8.0, 8, 3), (8, 0, 3), None], ids=repr)
def test_image_shapes(params, tmp_path, shape):
    with refuses(r"image_shape=.*: expected \(height, width, channels\)"):
        ct.export(tmp_path / "net", lambda variables, images: images, params, None, image_shape=shape)


def test_update_without_parameters(params):
    tx = transform(params)
    with refuses(r"clicktrain needs the parameters: call update\(grads, state, params\)"):
        tx.update(params, tx.init(params))


def test_masks_of_other_states(params):
    with refuses("one clicktrain.* inside, found 0"):
        ct.masks_of(optax.adam(1e-3).init(params))
    tx = transform(params)
    with refuses("one clicktrain.* inside, found 2"):
        ct.masks_of(optax.chain(tx, tx).init(params))


def test_output_sizes_of_unknown_layers(params):
    masks = ct.select_masks(params, plan_of(params), FOUR)
    with refuses("output_sizes names 'Conv_7/kernel', which is no leaf of params"):
        ct.report(params, masks, output_sizes={"Conv_0/kernel": (4, 4), "Conv_7/kernel": (4, 4)})


def test_names_that_two_leaves_share():
    twice = {"a": {"kernel": jnp.ones((3, 3, 4, 8))}, "a/kernel": jnp.ones((3, 3, 4, 8))}
    with refuses("a/kernel"):
        ct.make_plan(twice, {"a/kernel": 0.5})
