"""Groups of channels: found in the net's jaxpr, and what they mean: reordered, the net computes what it computed.

One long file: the models, the plain functions and the bad input all go through the same nets and float64 evaluator.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from clicktrain_jax import models
from clicktrain_jax.channels import ChannelNode, channel_nodes, find_node
from clicktrain_jax.channels.narrowing import leaf_axes
from clicktrain_jax.trees import map_named, named_leaves
from tests.clicktrain_jax.channels.plain_nets import FIXED, FREE, conv, flattened

# (name, width, image shape, convolution); resnet32 at half width has three widths, so that its shortcuts pad.
NETS = [
    ("small", 0.25, (8, 8, 1), nn.Conv),
    ("vgg11", 0.125, (32, 32, 3), nn.Conv),
    ("resnet18", 0.125, (8, 8, 3), nn.Conv),
    ("resnet32", 0.5, (8, 8, 3), nn.Conv),
    ("resnet50_cifar", 0.125, (8, 8, 3), nn.Conv),
    ("vgg11", 0.125, (32, 32, 3), models.PatchConv),
    ("resnet18", 0.125, (8, 8, 3), models.PatchConv),
]


def random_leaf(rng, name, shape):
    """Trained-looking variables: no zeros, no ones, positive variances."""
    if name.endswith(("var", "scale")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1], initial=1))).astype(np.float32)


@functools.cache
def build(name, width, image_shape, conv):
    """(function of variables and images, random variables, nodes)."""
    model = models.build(name, num_classes=10, width=width, conv=conv)
    abstract = models.abstract_variables(model, image_shape)
    rng = np.random.default_rng(0)
    variables = map_named(lambda leaf_name, leaf: random_leaf(rng, leaf_name, leaf.shape), abstract)

    def apply(variables, images):
        return model.apply(variables, images, train=False)

    return apply, variables, channel_nodes(apply, abstract, image_shape)


def random_orders(nodes, seed=0):
    """For each free node an order that is not the present one."""
    rng = np.random.default_rng(seed)
    return {node: np.roll(rng.permutation(node.size), 1) for node in nodes if not node.fixed}


def permute(variables, orders):
    """The variables with each node's channels in another order: channel i is what channel order[i] was."""
    places = [(*entry, order) for node, order in orders.items() for entry in leaf_axes(node)]

    def reorder(name, leaf):
        for other, axis, outer, order in places:
            if other == name:
                taken = np.arange(leaf.shape[axis]).reshape(outer or 1, order.size, -1)[:, order].reshape(-1)
                leaf = np.take(leaf, taken, axis)
        return leaf

    return map_named(reorder, variables)


def in_float64(closed, *arguments):
    """A jaxpr's value with float64 in place of float32: the nets' last layers compute in float32 whatever comes in."""
    jaxpr, env = closed.jaxpr, {}
    env.update(zip(jaxpr.invars, arguments))
    env.update(zip(jaxpr.constvars, closed.consts))

    def read(atom):
        value = jnp.asarray(atom.val if isinstance(atom, jax.extend.core.Literal) else env[atom])
        return value.astype(jnp.float64) if value.dtype == jnp.float32 else value

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is not None:
            results = in_float64(inner, *values)
        else:
            is_short = {key: value == jnp.float32 for key, value in equation.params.items() if key.endswith("type")}
            changes = {key: np.dtype(np.float64) for key, short in is_short.items() if short}
            results = equation.primitive.bind(*values, **{**equation.params, **changes})
            results = results if equation.primitive.multiple_results else [results]
        env.update(zip(equation.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


@pytest.mark.parametrize("net", NETS, ids=lambda net: f"{net[0]}-{net[3].__name__}")
def test_reordering_all_free_groups_keeps_the_function(net, toy):
    apply, variables, nodes = build(*net)
    images = np.random.default_rng(1).normal(size=(2, *net[2]))
    closed = jax.make_jaxpr(apply)(variables, images.astype(np.float32))
    with jax.enable_x64(True):

        @toy.quick_jit
        def logits(variables):
            (result,) = in_float64(closed, *jax.tree.leaves(variables), images)
            return result

        variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        expected = np.asarray(logits(variables))
        got = np.asarray(logits(permute(variables, random_orders(nodes))))
    assert expected.dtype == np.float64 and expected.std() > 1e-3
    assert np.abs(got - expected).max() <= 1e-10 * np.abs(expected).max()


def test_each_leaf_of_a_group_counts(toy):
    """Leave any one leaf of a group as it was, the writer or one that goes with it: the output changes."""
    net = NETS[0]
    apply, variables, nodes = build(*net)
    images = np.random.default_rng(1).normal(size=(2, *net[2])).astype(np.float32)
    logits = toy.quick_jit(apply)
    expected = logits(variables, images)
    node = find_node("Conv_1/kernel", nodes)
    reordered = permute(variables, {node: random_orders(nodes)[node]})
    assert np.allclose(logits(reordered, images), expected, rtol=1e-4, atol=1e-5)
    changed = [name for name, *_ in (*node.writers, *node.followers, *node.readers)]
    assert len(changed) == 6
    for left_out in changed:
        partly = map_named(lambda name, new, old: old if name == left_out else new, reordered, variables)  # noqa: B023
        assert np.abs(logits(partly, images) - expected).max() > 1e-2, left_out


def test_nodes_of_a_vgg():
    _, _, nodes = build(*NETS[1])
    assert nodes[0].readers == (("params/Conv_0/kernel", 2, 1),) and not nodes[0].writers and nodes[0].fixed
    for index in range(8):
        reader = f"params/Conv_{index + 1}/kernel" if index < 7 else "params/Dense_0/kernel"
        assert nodes[index + 1] == ChannelNode(
            size=(8, 16, 32, 32, 64, 64, 64, 64)[index],
            writers=((f"params/Conv_{index}/kernel", 3),),
            followers=(
                (f"batch_stats/BatchNorm_{index}/mean", 0),
                (f"batch_stats/BatchNorm_{index}/var", 0),
                (f"params/BatchNorm_{index}/bias", 0),
                (f"params/BatchNorm_{index}/scale", 0),
            ),
            readers=((reader, 2 if index < 7 else 0, 1),),
        )
    assert nodes[9] == ChannelNode(
        64, (("params/Dense_0/kernel", 1),), (("params/Dense_0/bias", 0),), (("params/Dense_1/kernel", 0, 1),)
    )
    assert "output" in nodes[-1].fixed and nodes[-1].writers == (("params/Dense_2/kernel", 1),)
    assert len(nodes) == 12


@pytest.mark.parametrize(("one", "other"), [(1, 5), (2, 6)])
def test_patch_convolutions_give_the_same_nodes(one, other):
    assert build(*NETS[one])[2] == build(*NETS[other])[2]


def test_residual_sums_join_their_writers():
    _, _, nodes = build(*NETS[2])
    names = [[name for name, _ in node.writers] for node in nodes]
    assert [f"params/{name}/kernel" for name in ("Conv_0", "Block_0/Conv_1", "Block_1/Conv_1")] in names
    assert [f"params/Block_{name}/kernel" for name in ("2/Conv_1", "2/shortcut", "3/Conv_1")] in names
    assert ["params/Block_2/Conv_0/kernel"] in names
    last = find_node("Block_7/Conv_1/kernel", nodes)
    assert {name for name, *_ in last.readers} == {"params/Block_7/Conv_0/kernel", "params/Dense_0/kernel"}
    # Input, 4 residual sums, 8 blocks, logits.
    assert len(nodes) == 14 and sum(bool(node.fixed) for node in nodes) == 2


def test_bottlenecks_are_all_found():
    _, _, nodes = build(*NETS[4])
    # 16 blocks with 2 inner groups, 4 sums, the stem, which no sum joins; input and logits.
    assert len(nodes) == 39 and sum(bool(node.fixed) for node in nodes) == 2
    assert find_node("Conv_0/kernel", nodes).writers == (("params/Conv_0/kernel", 3),)


def test_padded_shortcuts_fix_the_sums_alone():
    _, _, nodes = build(*NETS[3])
    fixed = {name for node in nodes if node.fixed for name, _ in node.writers}
    blocks = [f"params/Block_{index}/Conv_1/kernel" for index in range(15)]
    # What is padded, and what it is added to: all three stages.
    assert fixed == {"params/Conv_0/kernel", *blocks, "params/Dense_0/kernel"}
    assert "padded" in find_node("Conv_0/kernel", nodes).fixed
    assert [name for node in nodes if not node.fixed for name, _ in node.writers] == [
        f"params/Block_{index}/Conv_0/kernel" for index in range(15)
    ]


def plain_net(apply, shapes):
    rng = np.random.default_rng(0)
    params = {name: random_leaf(rng, name, shape) for name, shape in shapes.items()}
    images = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
    return params, images, channel_nodes(apply, params, images)


def check_same_function(toy, apply, params, images, nodes):
    run = toy.quick_jit(apply)
    expected = run(params, images)
    reordered = permute(params, random_orders(nodes))
    assert any(not np.array_equal(reordered[name], params[name]) for name in params)
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(run(reordered, images), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("apply", FREE, ids=lambda apply: apply.__name__)
def test_groups_of_plain_functions(apply, toy):
    shapes, expected = FREE[apply]
    params, images, nodes = plain_net(apply, shapes)
    free = {
        "+".join(name for name, _ in node.writers): (list(node.readers), list(node.followers))
        for node in nodes
        if not node.fixed
    }
    assert free == expected
    check_same_function(toy, apply, params, images, nodes)


@pytest.mark.parametrize("apply", FIXED, ids=lambda apply: apply.__name__)
def test_operations_that_need_the_order_fix_it(apply, toy):
    shapes, reason = FIXED[apply]
    params, images, nodes = plain_net(apply, shapes)
    (node,) = [node for node in nodes if ("a", 3) in node.writers]
    assert re.search(reason, node.fixed)
    # The next group is not touched by it.
    assert not find_node("b", nodes).fixed
    check_same_function(toy, apply, params, images, nodes)


def test_a_returned_map_keeps_its_order():
    params, images, _ = plain_net(flattened, FREE[flattened][0])
    nodes = channel_nodes(lambda params, x: (flattened(params, x), conv(x, params["a"])), params, images)
    assert all("output" in node.fixed or "input" in node.fixed for node in nodes)


def test_one_kernel_may_write_two_groups():
    def apply(params, x):
        return jnp.sin(jnp.einsum("nhwc,cde->nde", x, params["a"])).sum(axis=1) @ params["b"]

    params, images, nodes = plain_net(apply, {"a": (3, 4, 6), "b": (6, 5)})
    assert [node.writers for node in nodes if not node.fixed] == [(("a", 1),), (("a", 2),)]
    with pytest.raises(ValueError, match="writes 2 groups"):
        find_node("a", nodes)
    reordered = permute(params, {nodes[1]: np.arange(4)[::-1]})
    np.testing.assert_array_equal(reordered["a"], params["a"][:, ::-1])
    np.testing.assert_allclose(apply(reordered, images), apply(params, images), rtol=1e-4, atol=1e-5)


def test_names_and_shapes_that_are_none():
    _, variables, nodes = build(*NETS[0])
    for name in ("Conv_9/kernel", "BatchNorm_0/scale"):
        with pytest.raises(ValueError, match=f"'{name}' writes no group of channels"):
            find_node(name, nodes)
    for shape in ((32, 32), (32, 32, 0)):
        with pytest.raises(ValueError, match="height, width, channels"):
            channel_nodes(lambda variables, x: x, variables, shape)


def test_names_are_those_of_the_tree():
    _, variables, nodes = build(*NETS[2])
    names = {name for name, _ in named_leaves(variables)}
    entries = [name for node in nodes for name, *_ in (*node.writers, *node.followers, *node.readers)]
    assert set(entries) == names


def test_convolutions_that_run_natively_are_followed_through():
    """`pallas_kernels.dense_conv`, left open, may be a CPU's own kernels: a custom call that has no channels."""
    convolve = functools.partial(models.PatternConv, convolve=pk.pattern_conv, dense=pk.dense_conv)
    narrow = functools.partial(models.NarrowConv, dense=pk.dense_conv)
    found = [build("small", 0.25, (8, 8, 1), conv)[2] for conv in (nn.Conv, convolve, narrow)]
    assert found[0] == found[1] == found[2]
    assert any(not node.fixed for node in found[0])
