"""`accelerate` on users' own nets, linen and plain functions: the same function as on masked parameters, its
convolutions run by pattern.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn, masked
from flax import nnx
from jax import lax

import clicktrain_jax as ct
from clicktrain_jax.trees import map_named, named_leaves
from tests.clicktrain_jax.deploy.own_nets import X, close, jit, masks_for


class Net(nn.Module):
    """Strides, 1x1, groups, dilation, a bias, a residual, one convolution used twice, BatchNorm and dropout."""

    dtype: object = None

    @nn.compact
    def __call__(self, x, train=False):
        conv = functools.partial(nn.Conv, dtype=self.dtype)
        x = conv(16, (3, 3), name="first")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        y = conv(16, (3, 3), strides=2, padding=1, use_bias=False, name="halve")(x)
        y = nn.relu(y) + conv(16, (1, 1), strides=2, name="shortcut")(x)
        twice = conv(16, (3, 3), name="twice")
        y = twice(nn.relu(twice(y)))
        y = conv(16, (3, 3), feature_group_count=4, name="grouped")(y)
        y = conv(16, (3, 3), kernel_dilation=2, name="dilated")(y)
        y = nn.ConvTranspose(8, (3, 3), strides=(2, 2), name="transposed")(y)
        y = nn.Dropout(0.3, deterministic=not train)(y)
        return nn.Dense(5, name="head")(y.mean((1, 2)))


SPARSE = {"first", "halve", "shortcut", "twice"}
REMOVED = ("first", "halve", "shortcut", "twice", "grouped", "dilated", "transposed")


@functools.cache
def linen():
    model, variables = Net(), drawn(Net(), X.shape[1:])
    # As before training: statistics of nothing, small biases.
    variables["batch_stats"]["norm"] = {"mean": np.zeros(16, np.float32), "var": np.ones(16, np.float32)}
    variables["params"] = map_named(
        lambda name, leaf: np.float32(0.1) * (leaf - 1) if name.endswith("bias") else leaf, variables["params"]
    )
    return model, variables, masks_for(variables["params"], REMOVED)


def apply_linen(variables, x, **options):
    return Net().apply(variables, x, **options)


def how(report):
    """{layer: "dense" or "sparse"}; layers that are called twice must run alike."""
    runs = {}
    for conv in report.convolutions:
        assert runs.setdefault(conv.name.split("/")[-2], conv.runs) == conv.runs
    return runs


def masked_variables(variables, masks):
    return variables | {"params": masked(variables["params"], masks)}


def poisoned(params, masks):
    """Not a number wherever a mask removes."""
    keep = dict(named_leaves(ct.masks.combine(masks)))
    return map_named(
        lambda name, leaf: leaf if keep[name] is None else np.where(keep[name], leaf, np.float32(np.nan)), params
    )


@pytest.mark.parametrize("backend", [None, "xla", "reference"])
def test_an_unmasked_tree_gives_the_masked_result(backend):
    """Nothing of what a mask removes is read, also by layers that stay dense: it may be anything."""
    _, variables, masks = linen()
    wanted = jit(apply_linen)(masked_variables(variables, masks), X)
    fast = ct.accelerate(apply_linen, masks, backend=backend)
    for params in (variables["params"], poisoned(variables["params"], masks)):
        close(jit(fast)(variables | {"params": params}, X), wanted)
    assert np.abs(np.asarray(jit(apply_linen)(variables, X)) - wanted).max() > 1e-2


def test_the_pruned_layers_run_by_pattern_conv():
    _, variables, masks = linen()
    report = ct.accelerate(apply_linen, masks, backend="xla").report(variables, X)
    assert how(report) == {name: "sparse" if name in SPARSE else "dense" for name in REMOVED}
    rows = {conv.name: conv for conv in report.convolutions}
    assert len(report.convolutions) == len(REMOVED) + 1  # one is called twice
    assert rows["halve/kernel"].kernel_shape == (3, 3, 16, 16) and rows["halve/kernel"].image_shape == (2, 9, 8, 16)
    np.testing.assert_allclose(rows["halve/kernel"].retained, 0.5 * 4 / 9)
    assert {rows[f"{name}/kernel"].backend for name in SPARSE} == {"xla"}
    for name, why in (("grouped", "4 groups"), ("dilated", "dilated"), ("transposed", "transposed")):
        assert why in rows[f"{name}/kernel"].why
    text = report.to_text()
    assert len(text.splitlines()) == 1 + len(report.convolutions) and "halve/kernel" in text
    # Shapes are enough.
    shapes = jax.eval_shape(lambda: (variables, X))
    assert ct.accelerate(apply_linen, masks, backend="xla").report(*shapes) == report


def test_no_dense_convolution_is_left_where_a_pattern_runs():
    """With the reference, whose convolutions are of masked kernels, the jaxpr tells which operator was called."""
    _, variables, masks = linen()
    fast = ct.accelerate(apply_linen, masks, backend="reference")
    text = str(jax.make_jaxpr(fast)(variables, X))
    assert text.count("custom_vjp_call[") == len(SPARSE) + 1


def test_gradients_and_statistics():
    """In training, with dropout; those of evaluation are an NNX net's, below."""
    model, variables, masks = linen()
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(3)}}

    def loss(apply, params):
        logits, new = apply({"params": params, "batch_stats": variables["batch_stats"]}, X, **options)
        return jnp.sum(jnp.sin(logits)), (logits, new)

    def dense(params):
        return loss(model.apply, ct.apply_masks(params, masks))

    fast = functools.partial(loss, ct.accelerate(model.apply, masks, backend="xla"))
    got, wanted = (jit(jax.grad(f, has_aux=True))(variables["params"]) for f in (fast, dense))
    close(got, wanted)
    gradient = got[0]["twice"]["kernel"]
    assert not np.any(gradient[~np.asarray(ct.masks.combine(masks)["twice"]["kernel"])]) and np.any(gradient)
    assert np.any(wanted[1][1]["batch_stats"]["norm"]["mean"])


def test_bare_params_keywords_vmap_and_a_jitted_function():
    model, variables, masks = linen()
    wanted = jit(apply_linen)(masked_variables(variables, masks), X)

    @functools.partial(jax.jit, static_argnames="train")
    def bare(x, *, params, train):
        return model.apply({"params": params, "batch_stats": variables["batch_stats"]}, x, train=train)

    fast = ct.accelerate(bare, masks, backend="xla")
    close(fast(X, params=variables["params"], train=False), wanted)
    assert how(fast.report(X, params=variables["params"], train=False))["halve"] == "sparse"
    # A static argument goes by name through an outer jit, as with the function itself.
    outer = jax.jit(fast, static_argnames="train")
    close(outer(X, params=variables["params"], train=False), wanted)

    each = jax.vmap(ct.accelerate(apply_linen, masks, backend="xla"), in_axes=(None, 0))
    close(jit(each)(variables, jnp.stack([X, X])), jnp.stack([wanted, wanted]))


def test_half_precision_casts_and_scales_are_seen_through():
    """Kernels come to their convolutions cast, transposed, scaled, masked by the net itself, and in other layouts."""
    rng = np.random.default_rng(0)
    shapes = {"cast": (3, 3, 3, 8), "scaled": (3, 3, 8, 8), "masked": (3, 3, 8, 8), "oihw": (3, 3, 8, 8)}
    params = {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    masks = masks_for(params, shapes)
    keep = ct.masks.combine(masks)

    def net(tree, x):
        params = tree["nets"]["one"]
        conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
        nhwc = ("NHWC", "HWIO", "NHWC")
        y = conv(x.astype(jnp.bfloat16), params["cast"]["kernel"].astype(jnp.bfloat16), dimension_numbers=nhwc)
        y = jax.nn.relu(y).astype(jnp.float32)
        y = conv(y, 0.5 * params["scaled"]["kernel"] / jnp.arange(1.0, 9.0), dimension_numbers=nhwc)
        y = conv(y, jnp.where(keep["masked"]["kernel"], params["masked"]["kernel"], 0), dimension_numbers=nhwc)
        kernel = params["oihw"]["kernel"].transpose(3, 2, 0, 1)
        y = conv(y.transpose(0, 3, 1, 2), kernel, dimension_numbers=("NCHW", "OIHW", "NHWC"))
        return conv(y.transpose(1, 2, 0, 3), kernel, dimension_numbers=("HWNC", "OIHW", "HWNC"))

    def call(params):
        return {"nets": {"one": params, "two": jnp.ones(3)}}, X

    fast = ct.accelerate(net, masks, backend="xla")
    report = fast.report(*call(params))
    assert [conv.runs for conv in report.convolutions] == 5 * ["sparse"]
    assert [conv.layout for conv in report.convolutions] == 4 * ["NHWC"] + ["HWNC"]
    wanted = jit(net)(*call(masked(params, masks)))
    close(jit(fast)(*call(poisoned(params, masks))), wanted, 1e-2)
    full = {**params, "cast": {"kernel": jnp.zeros((3, 3, 3, 8))}}
    assert np.abs(jit(fast)(*call(full))).max() == 0  # what is compared is made by these kernels


def test_a_kernel_that_is_computed_from_a_parameter_is_computed_from_the_masked_one():
    """Weight standardisation: zeros do not stay zeros, so the convolution stays dense, of the masked leaf."""
    rng = np.random.default_rng(0)
    shapes = {"Conv_0": (3, 3, 3, 8), "Conv_1": (3, 3, 8, 8)}
    params = {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    masks = masks_for(params, ("Conv_0", "Conv_1"))

    def net(params, x):
        for name in ("Conv_0", "Conv_1"):
            kernel = params[name]["kernel"]
            norm = jnp.sqrt(jnp.sum(jnp.square(kernel), (0, 1, 2)))
            kernel = kernel / norm if name == "Conv_0" else (kernel - 0.1) / norm
            x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x

    fast = ct.accelerate(net, masks, backend="xla")
    with pytest.warns(UserWarning, match="'Conv_1/kernel' is pruned, but a convolution's kernel is computed from it"):
        got = jit(fast)(poisoned(params, masks), X)
    close(got, jit(net)(masked(params, masks), X))
    with pytest.warns(UserWarning, match="'Conv_1/kernel' is pruned"):
        sparse, dense = fast.report(params, X).convolutions
    assert (sparse.runs, dense.runs, dense.name, dense.retained) == ("sparse", "dense", "Conv_1/kernel", None)
    assert "computed from 'Conv_1/kernel'" in dense.why


class Computed(nn.Module):
    """A plain convolution before one whose kernel is made in some way."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="plain")(x))
        if self.kind == "spectral":
            return nn.SpectralNorm(nn.Conv(8, (3, 3), name="made"))(x, update_stats=False)
        if self.kind == "standardised":
            return nn.WeightNorm(nn.Conv(8, (3, 3), name="made"))(x)
        return nn.ConvTranspose(8, (3, 3), (2, 2), transpose_kernel=True, name="made")(x)


@pytest.mark.parametrize(("kind", "runs"), [("spectral", "sparse"), ("standardised", "sparse"), ("flipped", "dense")])
def test_what_keeps_zeros_is_followed_and_the_rest_of_the_net_runs_by_pattern(kind, runs):
    """Divided by a norm, reshaped and flipped a kernel still has its zeros."""
    model = Computed(kind)
    x = np.random.default_rng(1).normal(size=(2, 9, 8, 8)).astype(np.float32)
    variables = jit(model.init)(jax.random.key(0), x)
    masks = masks_for(variables["params"], ("plain", "made"))
    fast = ct.accelerate(model.apply, masks, backend="xla")
    rows = {row.name.split("/")[-2]: row for row in fast.report(variables, x).convolutions}
    assert [rows[name].runs for name in ("plain", "made")] == ["sparse", runs]
    assert rows["made"].retained == pytest.approx(0.5 * 4 / 9)
    wanted = jit(model.apply)(masked_variables(variables, masks), x)
    close(jit(fast)(variables | {"params": poisoned(variables["params"], masks)}, x), wanted)
    if kind == "flipped":
        assert "transposed" in rows["made"].why


def test_calls_are_walked_into_and_loops_are_left():
    rng = np.random.default_rng(0)
    names = ("jitted", "remat", "jvp", "vjp", "scanned", "branch")
    params = {name: {"kernel": (rng.normal(size=(3, 3, 3, 3)) / 4).astype(np.float32)} for name in names}
    masks = masks_for(params, names)

    def conv(x, kernel):
        return jnp.sin(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))

    with_jvp = jax.custom_jvp(conv)
    with_vjp = jax.custom_vjp(conv)
    # Rules that are not the derivative: an accelerated net must keep to them.
    with_jvp.defjvp(lambda p, t: (conv(*p), 3 * jax.jvp(conv, p, t)[1]))
    with_vjp.defvjp(lambda *p: (conv(*p), p), lambda p, g: tuple(2 * leaf for leaf in jax.vjp(conv, *p)[1](g)))

    def net(params, x):
        kernel = {name: leaf["kernel"] for name, leaf in params.items()}
        x = jax.jit(conv)(x, kernel["jitted"])
        x = jax.checkpoint(conv)(x, kernel["remat"])
        x = with_vjp(with_jvp(x, kernel["jvp"]), kernel["vjp"])
        x, _ = lax.scan(lambda x, _: (conv(x, kernel["scanned"]), None), x, length=2)
        return lax.cond(x.sum() > 1e9, lambda x: x, lambda x: conv(x, kernel["branch"]), x)

    def gradients(net):
        return jit(jax.value_and_grad(lambda params, x: jnp.sum(net(params, x) ** 2), (0, 1)))

    fast = ct.accelerate(net, masks, backend="xla")
    runs = {conv.name.split("/")[0]: conv for conv in fast.report(params, X).convolutions}
    assert [runs[name].runs for name in names] == [*4 * ["sparse"], "dense", "dense"]
    assert "'scan'" in runs["scanned"].why and "'cond'" in runs["branch"].why
    close(jit(fast)(poisoned(params, masks), X), jit(net)(masked(params, masks), X))
    dense = gradients(lambda params, x: net(ct.apply_masks(params, masks), x))
    close(gradients(fast)(params, X), dense(params, X))


def test_what_cannot_be_accelerated_stays_dense_and_says_why():
    params = {"volume": {"kernel": jnp.ones((1, 1, 2, 2, 2))}, "line": {"kernel": jnp.ones((3, 3, 3, 4))}}
    params |= {"wide": {"kernel": jnp.ones((3, 3, 4, 4))}, "kept": {"kernel": jnp.ones((3, 3, 4, 4))}}
    keep = map_named(lambda name, leaf: np.arange(leaf.size).reshape(leaf.shape) % 3 > 0, params)
    keep["kept"]["kernel"][:] = True

    def net(params, x):
        conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
        nhwc = ("NHWC", "HWIO", "NHWC")
        x = conv(x, params["line"]["kernel"], padding=((1, -1), (1, 1)), dimension_numbers=nhwc)
        half = x.astype(jnp.bfloat16), params["wide"]["kernel"].astype(jnp.bfloat16)
        x = conv(*half, dimension_numbers=nhwc, preferred_element_type=jnp.float32)
        x = conv(x, params["kept"]["kernel"], dimension_numbers=nhwc)
        return lax.conv_general_dilated(x[:, None], params["volume"]["kernel"], (1, 1, 1), "SAME")

    fast = ct.accelerate(net, keep)
    why = {conv.name.split("/")[0]: conv.why for conv in fast.report(params, jnp.ones((1, 6, 6, 3))).convolutions}
    for name, reason in {"line": "cuts", "wide": "bfloat16.*float32", "kept": "nothing", "volume": "3-dim"}.items():
        assert re.search(reason, why[name]), why[name]


def test_a_promise_of_zeros_leaves_dense_layers_alone():
    _, variables, masks = linen()
    pruned = masked_variables(variables, masks)
    fast = ct.accelerate(apply_linen, masks, pruned=True)
    close(jit(fast)(pruned, X), jit(apply_linen)(pruned, X))
    dense = fast.with_choice(dict.fromkeys([f"{name}/kernel" for name in SPARSE], "dense"))
    assert set(how(dense.report(pruned, X)).values()) == {"dense"}
    assert str(jax.make_jaxpr(dense)(pruned, X)).count("select_n") == str(jax.make_jaxpr(apply_linen)(pruned, X)).count(
        "select_n"
    )


@pytest.mark.parametrize("layout", ["NHWC", "HWNC"])
def test_a_choice_of_layout(layout):
    _, variables, masks = linen()
    choice = {"twice/kernel": layout, "halve/kernel": layout, "first/kernel": "dense"}
    fast = ct.accelerate(apply_linen, masks).with_choice(choice)
    rows = {conv.name: conv for conv in fast.report(variables, X).convolutions}
    assert [rows[f"{name}/kernel"].layout for name in ("twice", "halve", "first")] == [layout, layout, ""]
    close(jit(fast)(variables, X), jit(apply_linen)(masked_variables(variables, masks), X))
    with pytest.raises(ValueError, match="'first/kernel': 'CHWN'; expected"):
        fast.with_choice({"first/kernel": "CHWN"})


def test_bad_input():
    model, variables, masks = linen()
    call = variables, X

    def refused(message, function, *args):
        with pytest.raises(ValueError, match=message):
            function(*args)

    wrong = ct.masks.combine(masks) | {"ninth": {"kernel": np.zeros((3, 3, 16, 16), bool)}}
    found = r"'ninth/kernel' .* meets no convolution \(no argument has it\).*found: first/kernel \(3, 3, 3, 16\)"
    refused(found, ct.accelerate(apply_linen, wrong), *call)
    # Closed over, parameters have no names.
    refused("passed in a call, not closed over", ct.accelerate(lambda x: apply_linen(variables, x), masks), X)
    refused("no leaf has a mask", ct.accelerate, apply_linen, {"kernel": None})
    refused(
        "'kernel' has dtype float32", ct.accelerate, apply_linen, {"kernel": np.full((3, 3, 1, 1), 0.5, np.float32)}
    )
    refused("call accelerate outside jit", jax.jit(lambda mask: ct.accelerate(apply_linen, {"k": mask})), True)
    refused("is a Linear, a module.*lambda model, x", ct.accelerate, nnx.Linear(1, 1, rngs=nnx.Rngs(0)), masks)
    refused("is a Net, a module.*model.apply", ct.accelerate, model, masks)
    refused("is a dict, .*its apply function", ct.accelerate, variables, masks)
    bound = jax.tree_util.Partial(apply_linen, variables)
    refused("is a Partial, .*parameters inside", ct.accelerate, bound, masks)
    with pytest.raises(ValueError, match="mosaic_gpu"):
        jax.eval_shape(ct.accelerate(apply_linen, masks, backend="mosaic_gpu"), *call)
