"""The reference's own masks, bit for bit, and its lasso sums: a small committed file, and the full ones when found."""

import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct

pytestmark = pytest.mark.usefixtures("optimised")

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SHARED = pathlib.Path(os.environ.get("CLICKTRAIN_GOLDEN_DIR", ROOT.parent / "shared" / "golden"))


SOURCES = [f"{size}:{case}" for size in ("small", "full") for case in ("a_vgg_p4", "b_vgg_p12", "c_res_p4")]


@pytest.fixture(scope="module", params=SOURCES)
def golden(request):
    size, case = request.param.split(":")
    if size == "small":
        with np.load(HERE / "golden_small.npz") as arrays:
            return {key.removeprefix(f"{case}:"): arrays[key] for key in arrays if key.startswith(f"{case}:")}
    path = SHARED / f"{case}.npz"
    if not path.exists():
        pytest.skip(f"full golden file {path} is not here; CLICKTRAIN_GOLDEN_DIR names its folder")
    with np.load(path) as arrays:
        return dict(arrays)


def tree(golden, key, dtype=None):
    """The arrays ``key/<layer>`` as a parameter tree in HWIO, None where a layer has none."""
    return {
        str(name): jnp.asarray(golden[f"{key}/{name}"].transpose(2, 3, 1, 0), dtype)
        if f"{key}/{name}" in golden
        else None
        for name in golden["names"]
    }


def setting(golden):
    params, grads = tree(golden, "w_before_e1b0"), tree(golden, "g_select")
    rules = {re.escape(str(name)): int(ratio) / 100 for name, ratio in zip(golden["names"], golden["ratios"])}
    return params, grads, ct.make_plan(params, rules), ct.patterns.fixed_set(int(golden["num_patterns"]))


def golden_masks(golden):
    return ct.Masks(pattern=tree(golden, "pmask", bool), kernel=tree(golden, "kmask", bool))


def assert_same_masks(got, golden):
    expected = golden_masks(golden)
    for kind in ct.Masks._fields:
        for name, mask in getattr(expected, kind).items():
            if mask is None:
                assert getattr(got, kind)[name] is None, (kind, name)
            else:
                np.testing.assert_array_equal(getattr(got, kind)[name], mask, err_msg=f"{kind} {name}")


def eager(params, grads, plan, patterns):
    return ct.select_masks(ct.importance.taylor(params, grads), plan, patterns)


def jitted_selection(params, grads, plan, patterns):
    scores = ct.importance.taylor(params, grads)
    return jax.jit(ct.select_masks, static_argnums=1)(scores, plan, patterns)


def jitted_together(params, grads, plan, patterns):
    return jax.jit(lambda p, g: ct.select_masks(ct.importance.taylor(p, g), plan, patterns))(params, grads)


def the_transform(params, grads, plan, patterns):
    tx = ct.clicktrain(optax.sgd(0.05), plan, select_step=0, prune_step=2, coeff=0.0, patterns=patterns)
    return ct.masks_of(jax.jit(tx.update)(grads, tx.init(params), params)[1])


# Each way compiles anew, so they are spread over the files; the combined jit, where the compiler has the most
# freedom, runs on every full one. The small file alone still covers the other three.
WAYS = [
    ("small:a_vgg_p4", the_transform),
    ("small:b_vgg_p12", jitted_together),
    ("small:c_res_p4", eager),
    ("full:a_vgg_p4", jitted_selection),
    ("full:c_res_p4", the_transform),
    *[(source, jitted_together) for source in SOURCES[3:]],
]


@pytest.mark.parametrize(
    ("golden", "select"), WAYS, indirect=["golden"], ids=[f"{source}-{way.__name__}" for source, way in WAYS]
)
def test_masks_are_those_of_the_reference(golden, select):
    assert_same_masks(select(*setting(golden)), golden)


def test_counts_are_those_of_the_reference(golden, oracle):
    *_, plan, _ = setting(golden)
    layers, kernel_masks = plan.by_name(), golden_masks(golden).kernel
    for name, ratio in zip(golden["names"], golden["ratios"]):
        _, _, cin, cout = layers[name].shape
        removed = oracle.removed_count(int(ratio), cin * cout)
        assert layers[name].num_removed == removed == int((~kernel_masks[name][0, 0]).sum())


def test_lasso_sums(golden):
    sums = ct.group_lasso(tree(golden, "w_before_e1b1"), golden_masks(golden))
    expected = float(golden["group_lasso_pattern"]), float(golden["group_lasso_kernel"])
    np.testing.assert_allclose([float(value) for value in sums], expected, rtol=1e-5)


def test_final_weights_are_zero_exactly_where_masked(golden):
    final, masks = tree(golden, "w_final"), golden_masks(golden)
    applied = ct.apply_masks(jax.tree.map(jnp.ones_like, final), masks)
    for name, weight in final.items():
        np.testing.assert_array_equal(weight != 0, applied[name] != 0, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(final, masks), final)


def test_compression(golden):
    report = ct.report(tree(golden, "w_final"), golden_masks(golden))
    assert report.pruned_layers_compression == pytest.approx(float(golden["compression_listed_layers"]), rel=1e-12)
    assert report.conv_compression == report.pruned_layers_compression


def test_small_file_holds_whole_layers_only():
    with np.load(HERE / "golden_small.npz") as arrays:
        shapes = {arrays[key].shape for key in arrays if ":w_final/" in key}
    assert shapes == {(24, 16, 3, 3), (12, 12, 3, 3), (12, 16, 1, 1), (48, 12, 1, 1), (12, 48, 1, 1)}
