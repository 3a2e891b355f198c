"""PruneTrain: the lasso by hand, its calibration, living channels, nets that compute the same without the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.channels import channel_nodes
from clicktrain_jax.channels.narrowing import narrow, narrow_shapes, widths
from clicktrain_jax.methods.prunetrain import (
    PruneTrainState,
    add_channel_lasso,
    channel_lasso,
    living_channels,
    prunetrain,
)
from clicktrain_jax.trees import map_named, named_leaves

IMAGE = (32, 32, 3)
PREFIXES = ("params/", "batch_stats/", "params/")  # of parameters, statistics and an optimizer's state
# A plain function: two convolutions whose outputs are added, a third one, two linear layers behind a flattened map.
SHAPES = {"a": (3, 3, 3, 16), "b": (1, 1, 3, 16), "c": (3, 3, 16, 12), "d": (4 * 4 * 12, 6), "e": (6, 5)}


def plain(params, x):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.nn.relu(conv(x, params["a"]) + conv(x, params["b"]))
    x = jax.nn.relu(conv(x, params["c"]))
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ params["d"]) @ params["e"]


def random_like(tree, seed=0):
    """Trained-looking values: positive variances and scales, nothing zero."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        if name.endswith(("var", "scale")):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1], initial=1))).astype(np.float32)

    return map_named(draw, tree)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def small():
    """(parameters, nodes) of the plain function."""
    params = random_like({name: np.empty(shape) for name, shape in SHAPES.items()})
    return params, channel_nodes(plain, params, (4, 4, 3))


@functools.cache
def build(name, width=0.25, **options):
    """(model, its variables' shapes, nodes). No dropout: its random bits depend on the width."""
    if name.startswith("vgg"):
        options["dropout"] = 0.0
    model = models.build(name, num_classes=10, width=width, **{"conv": models.NarrowConv, **options})
    abstract = models.abstract_variables(model, IMAGE)
    return model, abstract, channel_nodes(lambda variables, x: model.apply(variables, x, train=False), abstract, IMAGE)


def with_dead_channels(variables, nodes, *, readers=True, share=0.6):
    """Zeros for a share of each free group of maps; ``(variables, {first writer: channels that live})``."""
    rng = np.random.default_rng(1)
    leaves, lives = {name: np.array(leaf) for name, leaf in named_leaves(variables)}, {}
    for node in nodes:
        if node.fixed or leaves[node.writers[0][0]].ndim != 4:
            continue
        alive = lives[node.writers[0][0]] = rng.permutation(node.size) >= int(share * node.size)
        entries = [(name, axis, 1) for name, axis in node.writers]
        entries += [(name, axis, 1) for name, axis in node.followers if name.endswith(("scale", "bias"))]
        for name, axis, outer in entries + list(node.readers) * readers:
            repeats = leaves[name].shape[axis] // (outer * node.size)
            np.moveaxis(leaves[name], axis, 0)[~np.tile(np.repeat(alive, repeats), outer)] = 0
    return map_named(lambda name, _: leaves[name], variables), lives


def images(count=4):
    return np.random.default_rng(3).normal(size=(count, *IMAGE)).astype(np.float32)


def test_the_lasso_by_hand(small, toy):
    params, nodes = small
    # Output channels of a, b, c; input channels of c, and of d behind (row, column, channel).
    parts = [np.moveaxis(params[name], -1, 0) for name in "abc"]
    parts += [np.moveaxis(params["c"], 2, 0), np.moveaxis(np.reshape(params["d"], (16, 12, 6)), 1, 0)]
    assert sum(map(len, parts)) == 16 + 16 + 12 + 16 + 12
    expected = sum(np.sqrt(np.sum(np.square(group, dtype=np.float64)) + 1e-8) for part in parts for group in part)
    lasso = toy.quick_jit(lambda params: channel_lasso(params, nodes, prefix=""))
    assert lasso(params).dtype == jnp.float32
    np.testing.assert_allclose(lasso(params), expected, rtol=1e-6)
    np.testing.assert_allclose(lasso(jax.tree.map(np.zeros_like, params)), 72e-4, rtol=1e-5)


def test_groups_of_a_padded_resnet(toy):
    """Channels that must stay count as well: every convolution's, as the paper has it."""
    _, abstract, nodes = build("resnet32", 0.5)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract["params"])
    kernels = {name: leaf.shape for name, leaf in named_leaves(zeros) if leaf.ndim == 4}
    groups = sum(shape[3] for shape in kernels.values()) + zeros["Dense_0"]["kernel"].shape[0]
    groups += sum(shape[2] for name, shape in kernels.items() if name != "Conv_0/kernel")
    lasso = toy.quick_jit(lambda params: channel_lasso(params, nodes))
    np.testing.assert_allclose(lasso(zeros), groups * 1e-4, rtol=1e-4)


def test_closed_form_gradient(small, toy):
    params, nodes = small
    added = toy.quick_jit(lambda grads, params: add_channel_lasso(grads, params, nodes, 0.3, prefix=""))
    grads = random_like(params, seed=5)
    half = {name: np.arange(size) % 2 == 0 for name, size in (("a", 16), ("c", 12))}
    for params_, grads_ in ((params, grads), [narrow(tree, half, nodes) for tree in (params, grads)]):
        push = toy.quick_jit(jax.grad(lambda tree: channel_lasso(tree, nodes, prefix="")))(params_)
        got = added(grads_, params_)
        for name in SHAPES:
            np.testing.assert_allclose(got[name], grads_[name] + 0.3 * push[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert got["a"].shape == (3, 3, 3, 8) and got["d"].shape == (4 * 4 * 6, 6)
    np.testing.assert_array_equal(got["e"], grads["e"])
    short = jax.eval_shape(added, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), grads), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(short)} == {jnp.dtype("bfloat16")}
    with pytest.raises(ValueError, match="'a' is regularised, but its gradient is None"):
        add_channel_lasso({**grads, "a": None}, params, nodes, 0.3, prefix="")


def test_calibration_at_the_first_update(small, toy):
    params, nodes = small
    tx = prunetrain(optax.sgd(0.5), nodes, ratio=0.2, prefix="")
    update = toy.quick_jit(lambda grads, state, params, value: tx.update(grads, state, params, value=value))
    state, grads = tx.init(params), random_like(params, seed=5)
    assert int(state.count) == 0 and float(state.coeff) == 0
    first = toy.quick_jit(lambda params: channel_lasso(params, nodes, prefix=""))(params)
    expected = 0.2 * 2.5 / (0.8 * first)
    added = toy.quick_jit(lambda grads, params: add_channel_lasso(grads, params, nodes, expected, prefix=""))
    # The lasso is a fifth of the whole loss.
    np.testing.assert_allclose(expected * first / (2.5 + expected * first), 0.2, rtol=1e-6)
    for step, value in enumerate((2.5, 0.7)):
        updates, state = update(grads, state, params, jnp.float32(value))
        np.testing.assert_allclose(state.coeff, expected, rtol=1e-6)
        assert int(state.count) == step + 1
        pushed = added(grads, params)
        for name in SHAPES:
            np.testing.assert_allclose(updates[name], -0.5 * pushed[name], rtol=1e-5, atol=1e-7)
        params = jax.tree.map(np.add, params, updates)


def test_what_the_transformation_refuses(small):
    params, nodes = small
    tx = prunetrain(optax.sgd(0.1), nodes, prefix="")
    state = tx.init(params)
    with pytest.raises(ValueError, match="value=None.*value=loss"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="a scalar"):
        tx.update(params, state, params, value=jnp.ones(4))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state, value=1.0)
    for ratio in (0, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="ratio="):
            prunetrain(optax.sgd(0.1), nodes, ratio=ratio)
    without = {name: leaf for name, leaf in params.items() if name != "c"}
    with pytest.raises(ValueError, match="no leaf 'c'"):
        tx.update(without, tx.init(without), without, value=1.0)
    with pytest.raises(ValueError, match="so there is no lasso"):
        channel_lasso(params, nodes[:1], prefix="")


def test_inner_optimizers_get_the_loss(small):
    params, nodes = small

    def update(grads, state, params=None, *, value, **extra):
        return grads, {"value": value, **extra}

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = prunetrain(inner, nodes, prefix="")
    _, state = tx.update(params, tx.init(params), params, value=1.5, other=2)
    assert state.inner_state == {"value": 1.5, "other": 2}


def test_channels_live_while_one_weight_does(small):
    params, nodes = small
    params = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    params["a"][0, 0, 0, 3] = 1e-4  # written by either of the two that are added,
    params["b"][0, 0, 2, 7] = -0.5
    params["c"][2, 1, 5, :] = 9e-5  # too small,
    params["c"][2, 1, 9, 0] = 1.0  # read: channel 9; written: channel 0,
    params["d"][12 * 15 + 11, 2] = 1.0  # the last pixel of channel 11
    kept = living_channels(params, nodes, multiple=1)
    assert {name: np.flatnonzero(mask).tolist() for name, mask in kept.items()} == {"a": [3, 7, 9], "c": [0, 11]}
    params["d"][0, 0] = np.nan
    kept = living_channels(params, nodes, multiple=1, threshold=2.0)
    # What is not a number is not zero; of a, where all is small, the strongest stays.
    assert {name: np.flatnonzero(mask).tolist() for name, mask in kept.items()} == {"a": [9], "c": [0]}


def test_counts_are_rounded_up_with_the_strongest(small):
    params, nodes = small
    params = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    params["a"][0, 0, 0] = 1e-6 * np.arange(16)
    params["a"][0, 0, 0, [0, 2]] = 1
    params["c"][..., 4] = 1  # all 16 of a are read by it
    assert widths(living_channels(params, nodes)) == {"a": 16, "c": 8}
    params["c"][...] = 0
    params["c"][0, 0, 0, :9] = 1  # 9 of 12: the next multiple is more than there are
    kept = living_channels(params, nodes)
    assert np.flatnonzero(kept["a"]).tolist() == [0, 2, 10, 11, 12, 13, 14, 15] and kept["c"].all()
    assert widths(living_channels(params, nodes, multiple=3)) == {"a": 3, "c": 9}
    nothing = jax.tree.map(np.zeros_like, params)
    assert widths(living_channels(nothing, nodes)) == {"a": 8, "c": 8}


def test_residual_sums_are_one_group():
    _, abstract, nodes = build("resnet18")
    variables, _ = with_dead_channels(random_like(abstract), nodes, share=1)
    writers = ["Conv_0", "Block_0/Conv_1", "Block_1/Conv_1"]
    for index, path in enumerate(writers):
        kernel = functools.reduce(lambda tree, key: tree[key], path.split("/"), variables["params"])
        kernel["kernel"][0, 0, 0, 3 * index + 1] = 1.0
    kept = living_channels(variables, nodes, multiple=1)
    assert np.flatnonzero(kept["params/Conv_0/kernel"]).tolist() == [1, 4, 7]
    assert not {f"params/{path}/kernel" for path in writers[1:]} & kept.keys()
    assert len(kept) == 12


@pytest.mark.parametrize("name", ["vgg11", "resnet18", slow("resnet50_cifar")])
def test_the_narrowed_net_computes_the_same(name, toy):
    model, abstract, nodes = build(name)
    variables, lives = with_dead_channels(random_like(abstract), nodes, readers=False)
    small = narrow(variables, lives, nodes)
    logits = toy.quick_jit(lambda variables, x: model.apply(variables, x, train=False))
    expected = np.asarray(logits(variables, images()))
    assert expected.std() > 1e-2
    np.testing.assert_allclose(logits(small, images()), expected, rtol=1e-5, atol=1e-5)
    # Weights and multiply-adds of what is left, by the same accounting as for any net.
    dense = jax.tree.map(lambda _: None, variables["params"])
    wide, slim = (
        ct.report(tree["params"], ct.Masks(dense, dense), output_sizes=models.output_sizes(model, IMAGE))
        for tree in (variables, small)
    )
    by_hand = sum(leaf.size for leaf in jax.tree.leaves(small["params"]) if leaf.ndim == 4)
    assert slim.conv_weights == by_hand < 0.3 * wide.conv_weights
    assert slim.multiply_adds < 0.3 * wide.multiply_adds
    # Its shapes follow from the numbers of channels alone.
    assert narrow_shapes(abstract, widths(lives), nodes) == jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small
    )


@pytest.mark.parametrize("name", [slow("vgg11"), slow("resnet18"), "small"])
def test_an_update_of_the_narrowed_net_is_the_wide_one_s(name, toy):
    model, abstract, nodes = build(name, **({"width": 0.5} if name == "small" else {}))
    variables, lives = with_dead_channels(random_like(abstract), nodes)
    kept = living_channels(variables, nodes)
    assert all((kept[name] >= mask).all() and kept[name].sum() % 8 == 0 for name, mask in lives.items())
    tx = prunetrain(optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)), nodes)

    @toy.quick_jit
    def step(params, batch_stats, opt_state):
        def loss_of(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, new = model.apply(variables, images(), train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean(), new["batch_stats"]

        (loss, new_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), new_stats, opt_state

    # Momentum as in mid-training. The coefficient is set: the dead groups' norms of 1e-4 are in the wide net's R.
    inner_state = optax.tree.map_params(
        tx, lambda leaf: random_like({"leaf": leaf}, seed=leaf.size)["leaf"], tx.init(variables["params"])
    ).inner_state
    opt_state = PruneTrainState(jnp.int32(3), jnp.float32(0.01), inner_state)
    wide = (variables["params"], variables["batch_stats"], opt_state)
    slim = [narrow(tree, kept, nodes, prefix=prefix) for tree, prefix in zip(wide, PREFIXES)]
    assert models.parameter_count(slim[0]) < 0.7 * models.parameter_count(wide[0])
    expected = [narrow(jax.device_get(tree), kept, nodes, prefix=prefix) for tree, prefix in zip(step(*wide), PREFIXES)]
    named = [named_leaves(tree) for tree in (jax.device_get(step(*slim)), tuple(expected), tuple(slim))]
    unchanged = []
    for (name, new), (_, want), (_, old) in zip(*named, strict=True):
        np.testing.assert_allclose(new, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(initial=0.1), err_msg=name)
        unchanged += [name] * np.array_equal(new, old)
    assert [name.rpartition("/")[2] for name in unchanged] == ["coeff"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        slow("vgg13", {}),
        ("resnet50_cifar", {}),
        slow("resnet32", {"width": 1.0}),
        slow("resnet18", {"layout": "HWNC", "dtype": jnp.bfloat16}),
        ("vgg11", {"conv": functools.partial(models.NarrowConv, dense=models.patch_convolution), "layout": "HWNC"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_net_fits_together_when_narrowed(name, options):
    """Forward and backward, shapes only; counts that differ from group to group, then by chance are all equal."""
    model, abstract, nodes = build(name, **options)
    shape_of = {name: leaf.shape for name, leaf in named_leaves(abstract)}
    free = [node for node in nodes if not node.fixed and len(shape_of[node.writers[0][0]]) == 4]

    def loss(params, batch_stats, x):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(logits), (new["batch_stats"], logits)

    for trained, counts in (
        (jax.grad(loss, has_aux=True), [3 + index % 5 for index in range(len(free))]),
        (lambda params, *rest: (params, loss(params, *rest)[1]), [5] * len(free)),
    ):
        sizes = {node.writers[0][0]: count for node, count in zip(free, counts)}
        shapes = narrow_shapes(abstract, sizes, nodes)
        assert models.parameter_count(shapes) < models.parameter_count(abstract)
        x = jax.ShapeDtypeStruct((2, *IMAGE), jnp.float32)
        grads, (batch_stats, logits) = jax.eval_shape(trained, shapes["params"], shapes["batch_stats"], x)
        found = jax.tree.map(jnp.shape, {"params": grads, "batch_stats": batch_stats})
        assert found == jax.tree.map(jnp.shape, shapes)
        assert logits.shape == (2, 10) and logits.dtype == jnp.float32


def test_trees_that_mirror_the_parameters():
    """Known by the end of their paths: the stem's ("Conv_0/kernel") is the end of a block's, too."""
    _, abstract, nodes = build("resnet18")
    params = random_like(abstract["params"])
    kept = {"Conv_0/kernel": np.arange(16) < 8, "Block_0/Conv_0/kernel": np.arange(16) < 3}
    tx = optax.chain(optax.clip(1.0), prunetrain(optax.inject_hyperparams(optax.adamw)(learning_rate=0.1), nodes))
    state = jax.jit(lambda state: narrow(state, kept, nodes, prefix="params/"))(tx.init(params))
    new = narrow(params, kept, nodes, prefix="params/")
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(new))
    assert new["Block_0"]["Conv_0"]["kernel"].shape == (3, 3, 8, 3)
    assert new["Block_2"]["Conv_0"]["kernel"].shape == (3, 3, 8, 32)
    assert new["Dense_0"]["kernel"] is params["Dense_0"]["kernel"]
    # Kernels alone, as of optax.masked, and None in place of the others.
    masks = map_named(lambda name, leaf: leaf > 0 if name == "Block_0/Conv_0/kernel" else None, params)
    assert [leaf.shape for leaf in jax.tree.leaves(narrow(masks, kept, nodes, prefix="params/"))] == [(3, 3, 8, 3)]
    # A module that the net's nodes do not know, with a path that ends like the stem's.
    other = {"Aux": {"Conv_0": {"kernel": np.ones((3, 3, 3, 16))}}, **params}
    narrowed = narrow({"mu": other}, kept, nodes, prefix="params/")["mu"]
    assert narrowed.pop("Aux")["Conv_0"]["kernel"] is other["Aux"]["Conv_0"]["kernel"]
    assert jax.tree.map(jnp.shape, narrowed) == jax.tree.map(jnp.shape, new)
    # An optimizer without momentum has nothing to slice.
    plain_state = optax.sgd(optax.constant_schedule(0.1)).init(params)
    assert jax.tree.leaves(narrow(plain_state, kept, nodes, prefix="params/")) == jax.tree.leaves(plain_state)


def test_narrowing_refuses(small):
    params, nodes = small
    half = np.arange(16) < 8
    for kept, reason in (
        ({"z": half}, "'z' writes no group"),
        ({"a": half * 1.0}, "expected bool"),
        ({"a": ~half & half}, "with 0 channels"),
        ({"a": half, "b": ~half}, "another mask"),
        ({"a": half[:-1]}, "'a' has shape .*expected to hold 15 channels"),
        ({"e": np.arange(5) < 3}, "must stay, because it is an axis of the network's output"),
    ):
        with pytest.raises(ValueError, match=reason):
            narrow(params, kept, nodes)
    with pytest.raises(ValueError, match="prefix='params/': no leaf of the tree"):
        narrow(params, {"a": half}, nodes, prefix="params/")
    for size in (0, 17, 2.0, True):
        with pytest.raises(ValueError, match="expected 1 to 16 channels"):
            narrow_shapes(params, {"a": size}, nodes)
    with pytest.raises(ValueError, match="multiple=0"):
        living_channels(params, nodes, multiple=0)
    with pytest.raises(ValueError, match="threshold=-1"):
        living_channels(params, nodes, threshold=-1)
    with pytest.raises(ValueError, match="call it outside jit"):
        jax.jit(lambda params: living_channels(params, nodes))(params)
