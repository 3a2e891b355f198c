"""What exports and promises of zeros are made of: weights that are zero, one copy of them, a net in evaluation."""

import copy
import os
import pickle
import platform
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
        return nn.Dense(5)(nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2)))


SHAPE = (8, 8, 3)
X = np.random.default_rng(0).random((4, *SHAPE), np.float32)
VARIABLES = jax.jit(Net().init)(jax.random.key(1), X)
KEEP = np.random.default_rng(3).random((3, 3, 8, 8)) < 0.3
MASKS = jax.tree.map(lambda _: None, VARIABLES["params"])
MASKS["Conv_1"]["kernel"] = KEEP
LEFT = int((~KEEP).sum())
PENDING = ct.Masks(MASKS, MASKS)
PENDING.pending = True  # as `masks_of` says it between selection and prune


def apply(variables, x):
    return Net().apply(variables, x)


def with_kernel(kernel):
    params = VARIABLES["params"]
    return VARIABLES | {"params": params | {"Conv_1": params["Conv_1"] | {"kernel": kernel}}}


PRUNED = with_kernel(VARIABLES["params"]["Conv_1"]["kernel"] * KEEP)
SETTINGS = {"image_shape": SHAPE, "stablehlo": False}


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_weights_that_are_marked_and_not_zero_are_refused_or_pruned(tmp_path):
    said = f"{LEFT} weights are marked by the masks, but not yet zero .*'params/Conv_1/kernel'.*prune=True"
    with pytest.raises(ValueError, match=said):
        ct.export(tmp_path / "net", apply, VARIABLES, PENDING, **SETTINGS)
    assert not (tmp_path / "net").exists()
    one = PRUNED["params"]["Conv_1"]["kernel"].at[tuple(np.argwhere(~KEEP)[0])].set(1e-8)
    with pytest.raises(ValueError, match="^1 weights"):
        ct.export(tmp_path / "net", apply, with_kernel(one), PENDING, **SETTINGS)
    for name, masks, prune in (("asked", PENDING, True), ("handed in", MASKS, False)):
        ct.export(tmp_path / name, apply, VARIABLES, masks, prune=prune, **SETTINGS)
        close(ct.load(tmp_path / name, apply)(X), apply(PRUNED, X))


def test_a_run_that_ends_between_selection_and_prune(tmp_path):
    params = VARIABLES["params"]
    plan = ct.make_plan(params, {"Conv_1/kernel": 0.5})
    tx = ct.clicktrain(optax.sgd(0.0), plan, select_step=0, prune_step=2, coeff=0.0)
    state = tx.init(params)
    assert not ct.masks_of(state).pending
    for done in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        masks = ct.masks_of(state)
        assert masks.pending == (done < 2)
        if masks.pending:
            with pytest.raises(ValueError, match="the prune is not"):
                ct.export(tmp_path / "net", apply, VARIABLES | {"params": params}, masks, **SETTINGS)
    ct.export(tmp_path / "net", apply, VARIABLES | {"params": params}, masks, **SETTINGS)


COPIES = {
    "on the host": jax.device_get,
    "by a tree map": lambda masks: jax.tree.map(jnp.asarray, masks),
    "pickled": lambda masks: pickle.loads(pickle.dumps(masks)),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_pending_masks_are_pending(tmp_path, how):
    copied = COPIES[how](PENDING)
    assert copied.pending and not COPIES[how](ct.Masks(MASKS, MASKS)).pending
    assert jax.tree.structure(copied) == jax.tree.structure(ct.Masks(MASKS, MASKS))
    assert ct.report(VARIABLES["params"], copied).pending
    with pytest.raises(ValueError, match="the prune is not"):
        ct.export(tmp_path / "net", apply, VARIABLES, copied, **SETTINGS)
    assert not jax.jit(lambda masks: masks)(PENDING).pending


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_promise_that_is_not_kept_is_refused(wrap):
    fast = ct.accelerate(wrap(apply), MASKS, pruned=True)
    close(fast(PRUNED, X), apply(PRUNED, X))
    for call in (fast, fast.report):
        with pytest.raises(ValueError, match=f"{LEFT} weights are marked.*leave pruned=True out"):
            call(VARIABLES, X)


def test_training_mode_is_refused(tmp_path):
    def train(variables, x):
        return Net().apply(variables, x, train=True, mutable=["batch_stats"])[0]

    with pytest.raises(ValueError, match="training mode.*train=False"):
        ct.export(tmp_path / "net", train, PRUNED, MASKS, **SETTINGS)

    def centred(variables, x):
        return apply(variables, x - x.mean(0, keepdims=True))

    with pytest.raises(ValueError, match="depends on the images beside it"):
        ct.export(tmp_path / "net", centred, PRUNED, MASKS, **SETTINGS)
    assert not (tmp_path / "net").exists()


def test_an_export_takes_the_copy_that_is_read(tmp_path):
    copies = {"params": VARIABLES["params"], "ema": PRUNED["params"], "batch_stats": VARIABLES["batch_stats"]}

    def averaged(v, x):
        return apply({"params": v["ema"], "batch_stats": v["batch_stats"]}, x)

    ct.export(tmp_path / "net", averaged, copies, MASKS, **SETTINGS)
    net = ct.load(tmp_path / "net", averaged)
    close(net(X), averaged(copies, X))
    assert [row.retained for row in net.report(X).convolutions] == [None, pytest.approx(KEEP.mean())]

    def both(v, x):
        return averaged(v, x) + apply({"params": v["params"], "batch_stats": v["batch_stats"]}, x)

    with pytest.raises(ValueError, match="several places, 'ema', 'params'"):
        ct.export(tmp_path / "both", both, copies, MASKS, **SETTINGS)
    ct.export(tmp_path / "both", both, copies, MASKS, at="ema", **SETTINGS)
    close(ct.load(tmp_path / "both", both)(X), both(copies, X))
    with pytest.raises(ValueError, match="at='nothing'"):
        ct.export(tmp_path / "other", both, copies, MASKS, at="nothing", **SETTINGS)
    with pytest.raises(ValueError, match="is a Net, a module"):
        ct.export(tmp_path / "other", Net(), PRUNED, MASKS, **SETTINGS)


def test_names_with_slashes_want_their_containers(tmp_path):
    flat = {"block/conv/kernel": np.asarray(PRUNED["params"]["Conv_1"]["kernel"])}

    def net(variables, x):
        kernel = variables["block/conv/kernel"]
        x = jnp.concatenate([x, x, x[..., :2]], -1)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.mean((1, 2))

    ct.export(tmp_path / "net", net, flat, {"block/conv/kernel": KEEP}, **SETTINGS)
    with pytest.raises(ValueError, match="KeyError.*give like="):
        ct.load(tmp_path / "net", net)
    close(ct.load(tmp_path / "net", net, like=flat)(X), net(flat, X))


@pytest.mark.parametrize("normalise", [{"mean": 0.5, "std": 0.25}, {"mean": [0.4, 0.5, 0.6], "std": 0.2}])
def test_one_number_normalises_all_channels(tmp_path, normalise):
    ct.export(tmp_path / "net", apply, PRUNED, MASKS, normalise=normalise, **SETTINGS)
    net = ct.load(tmp_path / "net", apply)
    close(net(X), apply(PRUNED, (X - np.float32(normalise["mean"])) / np.float32(normalise["std"])))
    assert str(net.report(X)) == net.report(4).to_text()
    assert re.match(r"InferenceNet\(2 convolutions, 1 with masks, uint8 images 8 x 8 x 3", repr(net))
    assert repr(ct.accelerate(apply, MASKS)).startswith("accelerate(apply, masks of 1 leaves")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "net"
    ct.export(path, apply, PRUNED, MASKS, **SETTINGS)
    return path, ct.load(path, apply)


def test_a_loaded_net_takes_what_an_accelerated_one_takes(loaded):
    _, net = loaded
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    wanted = net.report(len(X))
    assert net.report(PRUNED, X) == net.report(X) == net.report(PRUNED, shapes) == net.report(batch=4) == wanted
    tuned = [net.tuned(PRUNED, X[:1]), net.tuned(X[:1]), net.tuned(batch=1)]
    assert tuned[0].report(1) == tuned[1].report(1) == tuned[2].report(1) and tuned[0].report(1).seconds
    bad = ((PRUNED,), (0,), (True,), (X[0],), (X, PRUNED), ("x",), (PRUNED, X[..., :2]))
    for given in bad:
        for method in (net.report, net.tuned):
            with pytest.raises(ValueError, match=r"expected a number of images, or images \(batch, 8, 8, 3\), alone"):
                method(*given)


def test_what_is_loaded_is_what_was_exported(loaded, tmp_path):
    path, _ = loaded

    def train(variables, x):
        return Net().apply(variables, x, train=True, mutable=["batch_stats"])[0]

    with pytest.raises(ValueError, match="training mode.*train=False"):
        ct.load(path, train)
    with pytest.warns(UserWarning, match="does not answer as the function that was exported"):
        ct.load(path, lambda variables, x: apply(variables, x[:, ::-1] + 0.5))
    # By name the eleventh stands behind the first.
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(3, 3, 3, 3)).astype(np.float32) / 3 for _ in range(12)]
    keep = [rng.random((3, 3, 3, 3)) < 0.7 for _ in kernels]

    def in_turn(variables, x):
        for index, kernel in enumerate(jax.tree.leaves(variables)):
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jnp.sin(x + index)
        return x.mean((1, 2))

    zeroed = [kernel * mask for kernel, mask in zip(kernels, keep)]
    ct.export(tmp_path / "list", in_turn, kernels, keep, **SETTINGS)
    with pytest.warns(UserWarning, match="in another order.*Give like="):
        ct.load(tmp_path / "list", in_turn)
    close(ct.load(tmp_path / "list", in_turn, like=kernels)(X), in_turn(zeroed, X))


def test_masks_are_read_alike_everywhere(tmp_path):
    """Of 0 and 1 too; other numbers, and other shapes, are refused."""

    def with_mask(mask):
        return MASKS | {"Conv_1": MASKS["Conv_1"] | {"kernel": mask}}

    for dtype in (np.int32, np.float32):
        masks = with_mask(KEEP.astype(dtype))
        close(ct.accelerate(apply, masks)(VARIABLES, X), apply(PRUNED, X))
        ct.export(tmp_path / "net", apply, VARIABLES, masks, **SETTINGS)
        net = ct.load(tmp_path / "net", apply)
        close(net(X), apply(PRUNED, X))
        assert net.report(1).convolutions[1].retained == pytest.approx(KEEP.mean())
    soft, whole = with_mask(0.5 * KEEP), with_mask(KEEP[0, 0])
    for call in (
        lambda masks: ct.accelerate(apply, masks),
        lambda masks: ct.export(tmp_path / "other", apply, PRUNED, masks, **SETTINGS),
        lambda masks: ct.report(PRUNED["params"], masks),
    ):
        with pytest.raises(ValueError, match="the mask of 'Conv_1/kernel' has dtype float64, expected bool"):
            call(soft)
    with pytest.raises(ValueError, match=r"'params/Conv_1/kernel' has shape \(3, 3, 8, 8\), its mask \(8, 8\)"):
        ct.export(tmp_path / "other", apply, PRUNED, whole, **SETTINGS)


def test_what_is_printed_is_short(loaded):
    _, net = loaded
    plan = ct.make_plan(VARIABLES["params"], {"Conv_1/kernel": 0.5})
    report = net.report(1)
    for thing in (plan, ct.Masks(MASKS, MASKS), ct.report(PRUNED["params"], MASKS), net, report):
        assert 20 < len(repr(thing)) < 400 and "array" not in repr(thing).lower()
    assert repr(report).startswith("AccelerateReport(2 convolutions, ")
    assert repr(plan).splitlines()[1].startswith("Conv_1/kernel")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library does not fill what is freed")
def test_a_net_of_16_bits_is_exported_whatever_freed_memory_holds(tmp_path):
    """XLA of jax 0.12 fuses 16-bit operations on CPUs into programs that read memory nobody has written."""
    code = (
        "import pathlib, sys; from experiments.bench import drawn; "
        "drawn.export(pathlib.Path(sys.argv[1]), 'vgg13', 4.0, (16, 1), width=0.25, precision='bfloat16')"
    )
    settings = os.environ | {"MALLOC_PERTURB_": "85", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=settings, check=True, timeout=600)
