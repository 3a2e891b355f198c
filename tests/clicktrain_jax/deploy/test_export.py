"""An export gives what the masked net gave: loaded by name, by a user's own code, or from StableHLO alone."""

import pathlib
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn, drawn_like, drawn_masks, masked
from flax import nnx

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.deploy import InferenceNet, PortableNet
from clicktrain_jax.masks import combine
from pallas_kernels import native

SHAPE = (8, 8, 3)
NORMALISE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
NET = {"name": "small", "num_classes": 10, "width": 2.0, "precision": "float32"}


def pruned(params, rules, tile, fraction=0.6):
    masks = drawn_masks(params, ct.make_plan(params, dict.fromkeys(rules, fraction), tile=tile))
    return masked(params, masks), masks


class Case:
    """A small net of the zoo, pruned in tiles, and its logits."""

    def __init__(self, tile=(64, 1)):
        model = models.build("small", num_classes=10, width=2.0)
        variables = drawn(model, SHAPE)
        params, self.masks = pruned(variables["params"], ["Conv_[123]/kernel"], tile)
        self.variables = {"params": params, "batch_stats": variables["batch_stats"]}
        self.apply_fn = lambda variables, images: model.apply(variables, images, train=False)

    def logits(self, images):
        pixels = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
        normalised = (pixels - np.float32(NORMALISE["mean"])) / np.float32(NORMALISE["std"])
        return np.asarray(jax.jit(self.apply_fn)(self.variables, normalised))

    def export(self, path, **options):
        settings = {"image_shape": SHAPE, "normalise": NORMALISE, "net": NET} | options
        return ct.export(path, self.apply_fn, self.variables, self.masks, **settings)


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.fixture(scope="module")
def path(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "small"
    case.export(path, facts={"who": "a test"})
    return path


def images(count, dtype=np.uint8, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    return pixels if dtype == np.uint8 else (pixels / 255).astype(dtype)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path / "cache"))


def test_each_file_is_written_once_and_none_is_read(case, tmp_path, monkeypatch):
    written, write = [], pathlib.Path.write_bytes

    def counted(path, data):
        written.append(path.name)
        return write(path, data)

    def refused(path):
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(pathlib.Path, "write_bytes", counted)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_bytes", refused)
        manifest = case.export(tmp_path / "net", dtype="int8", stablehlo=False)
    assert sorted(written) == ["manifest.json", "weights.safetensors"]
    assert ct.load(tmp_path / "net").manifest == manifest


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("count", [1, 5])
def test_a_net_of_the_zoo_needs_no_code(case, path, dtype, count):
    net = ct.load(path)
    assert isinstance(net, InferenceNet)
    found = net(images(count, dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, case.logits(images(count, dtype)), atol=1e-4)
    assert net.manifest["facts"]["who"] == "a test"


def test_layers_run_by_their_patterns(path):
    rows = {row.name: row for row in ct.load(path).report(1).convolutions}
    assert [row.runs for row in rows.values()] == ["dense", "sparse", "sparse", "sparse"]
    assert rows["params/Conv_0/kernel"].why == "nothing of it is removed"
    assert rows["params/Conv_3/kernel"].retained == pytest.approx(0.4 * 4 / 9, abs=0.02)


def test_every_way_gives_the_same(case, path):
    net = ct.load(path)
    expected = case.logits(images(3))
    names = [row.name for row in net.report(3).convolutions if row.retained is not None]
    assert len(names) == 3
    for run in ("dense", "NHWC", "HWNC"):
        forced = net.with_choice(3, dict.fromkeys(names, run))
        np.testing.assert_allclose(forced(images(3)), expected, atol=1e-4)
        assert {row.layout or row.runs for row in forced.report(3).convolutions if row.retained} == {run}
    np.testing.assert_allclose(net.dense(3)(images(3)), expected, atol=1e-4)
    np.testing.assert_allclose(ct.load(path, backend="reference")(images(3)), expected, atol=1e-4)


def test_the_layout_inside_changes_nothing_outside(case, path, monkeypatch):
    if native.is_fast():
        net = ct.load(path, layout="HWNC")
        np.testing.assert_allclose(net(images(3)), case.logits(images(3)), atol=1e-4)
        assert {(row.backend, row.layout) for row in net.report(3).convolutions[1:]} == {("cpu", "NHWC")}
    monkeypatch.setenv(native.ENVIRONMENT, "0")
    net = ct.load(path, layout="HWNC")
    np.testing.assert_allclose(net(images(3)), case.logits(images(3)), atol=1e-4)
    assert {row.layout for row in net.report(3).convolutions if row.runs == "sparse"} == {"HWNC"}
    with pytest.raises(ValueError, match="an apply_fn has its own"):
        ct.load(path, case.apply_fn, layout="HWNC")


def test_what_was_measured_is_found_by_the_next_process(case, path, monkeypatch):
    from clicktrain_jax.deploy import whole_net

    monkeypatch.setenv(native.ENVIRONMENT, "0")  # or HWNC is not tried
    calls = []

    def timer(compiled):
        def seconds(choices):
            calls.append(len(choices))
            for choice in choices.values():
                compiled(dict(choice))()
            # HWNC is the fastest, whatever this machine says.
            return {name: 1.0 if "HWNC" in choice.values() else 2.0 for name, choice in choices.items()}

        return seconds

    monkeypatch.setattr(whole_net, "_timer", timer)
    tuned = ct.load(path).tuned(2)
    measured = len(calls)
    again = ct.load(path)
    for net in (tuned, again, again.tuned(2)):
        report = net.report(2)
        assert {row.layout for row in report.convolutions if row.runs == "sparse"} == {"HWNC"}
        assert report.seconds["chosen"] == 1.0
        np.testing.assert_allclose(net(images(2)), case.logits(images(2)), atol=1e-4)
    assert len(calls) == measured > 0
    assert again.report(1).seconds is None


def test_stablehlo_in_a_process_with_jax_alone(case, path, tmp_path):
    np.save(tmp_path / "images.npy", images(3))
    np.save(tmp_path / "logits.npy", case.logits(images(3)))
    program = f"""
        import sys
        import jax, jax.export, numpy as np
        with open({str(path / "net.stablehlo")!r}, "rb") as file:
            net = jax.export.deserialize(bytearray(file.read()))
        images, logits = (np.load({str(tmp_path)!r} + name) for name in ("/images.npy", "/logits.npy"))
        for count in (1, 3):
            np.testing.assert_allclose(net.call(images[:count]), logits[:count], atol=1e-4)
        assert not {{"flax", "clicktrain_jax", "pallas_kernels", "safetensors"}} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=tmp_path)


def test_stablehlo_tells_nothing_of_this_machine(path):
    data = (path / "net.stablehlo").read_bytes()
    assert b"clicktrain" not in data
    assert str(path.parent).encode() not in data


def test_a_users_linen_net(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for features in (64, 128):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            return nn.Dense(5)(x.mean((1, 2)))

    model = Net()
    variables = drawn(model, SHAPE)
    params, masks = pruned(variables["params"], ["Conv_1/kernel"], (64, 1))
    variables = {"params": params, "batch_stats": variables["batch_stats"]}

    def apply_fn(variables, x):
        return model.apply(variables, x, train=False)

    ct.export(tmp_path / "own", apply_fn, variables, masks, image_shape=SHAPE)
    check_own(tmp_path / "own", apply_fn, variables)


def test_a_users_nnx_net(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(3, 64, (3, 3), rngs=rngs)
            self.second = nnx.Conv(64, 128, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(128, rngs=rngs)
            self.head = nnx.Linear(128, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.second(nnx.relu(self.first(x))))).mean((1, 2)))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    model = nnx.merge(graph, drawn_like(state))
    params, masks = pruned(nnx.state(model, nnx.Param), ["second/kernel"], (64, 1))
    nnx.update(model, params)
    model.eval()
    graph, state = nnx.split(model)

    def apply_fn(state, x):
        return nnx.merge(graph, state)(x)

    ct.export(tmp_path / "own", apply_fn, state, masks, image_shape=SHAPE)
    check_own(tmp_path / "own", apply_fn, state, like=jax.eval_shape(lambda: state))


def check_own(path, apply_fn, variables, like=None):
    x = images(3, np.float32)
    expected = jax.jit(apply_fn)(variables, x)
    net = ct.load(path, apply_fn, like)
    assert isinstance(net, InferenceNet)
    np.testing.assert_allclose(net(x), expected, atol=1e-4)
    assert "sparse" in {row.runs for row in net.report(3).convolutions}
    portable = ct.load(path)
    assert isinstance(portable, PortableNet)
    np.testing.assert_allclose(portable(x), expected, atol=1e-4)
    with pytest.raises(ValueError, match="expected float32"):
        portable(images(3))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01), ("int8", 0.2)])
def test_rounded_weights_are_those_of_every_form(case, tmp_path, dtype, tolerance):
    case.export(tmp_path / "out", dtype=dtype)
    net = ct.load(tmp_path / "out")
    found = np.asarray(net(images(4)))
    assert 0 < np.abs(found - case.logits(images(4))).max() < tolerance
    stablehlo = jax.export.deserialize(bytearray((tmp_path / "out" / "net.stablehlo").read_bytes()))
    np.testing.assert_allclose(stablehlo.call(images(4)), found, atol=1e-4)


def test_single_kernels_are_small_and_correct(tmp_path, monkeypatch):
    case = Case(tile=(1, 1))
    case.export(tmp_path / "out")
    net = ct.load(tmp_path / "out")
    np.testing.assert_allclose(net(images(2)), case.logits(images(2)), atol=1e-4)
    by_pattern = "sparse" if native.is_fast() else "dense"
    assert [row.runs for row in net.report(2).convolutions] == ["dense", *3 * [by_pattern]]
    monkeypatch.setenv(native.ENVIRONMENT, "0")
    net = ct.load(tmp_path / "out")
    np.testing.assert_allclose(net(images(2)), case.logits(images(2)), atol=1e-4)
    assert {row.runs for row in net.report(2).convolutions} == {"dense"}


def test_a_dense_net_can_be_exported_too(case, tmp_path):
    ct.export(tmp_path / "out", case.apply_fn, case.variables, None, image_shape=SHAPE, normalise=NORMALISE, net=NET)
    np.testing.assert_allclose(ct.load(tmp_path / "out")(images(2)), case.logits(images(2)), atol=1e-4)


def test_masks_of_an_export_are_the_runs(case, path):
    from clicktrain_jax.deploy import storage

    stored = storage.read(path, like=case.variables)
    jax.tree.map(np.testing.assert_array_equal, combine(stored.masks), combine(case.masks))
    jax.tree.map(np.testing.assert_array_equal, stored.variables, case.variables)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 8, 8), np.uint8), r"shape \(2, 8, 8\)"),
        (np.zeros((2, 9, 8, 3), np.uint8), "expected .batch, 8, 8, 3"),
        (np.zeros((0, 8, 8, 3), np.uint8), "batch 1 or more"),
        (np.zeros((2, 8, 8, 3), np.int32), "int32"),
        (np.full((2, 8, 8, 3), 255.0, np.float32), "divide 0..255"),
        (np.full((2, 8, 8, 3), -1.0, np.float32), "do not normalise"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), "nan"),
        ([[1.0]], "shape"),
    ],
)
def test_bad_images_are_refused(path, bad, message):
    with pytest.raises(ValueError, match=message):
        ct.load(path)(bad)


def test_bad_arguments_are_refused(case, path, tmp_path):
    with pytest.raises(ValueError, match="normalise"):
        case.export(tmp_path / "out", normalise={"mean": [0.5], "std": [0.0]})
    for normalise in (0.5, "mean", ["mean", "std"], {"mean": 0.5}, {"mean": "half", "std": 1.0}):
        with pytest.raises(ValueError, match="normalise=.*: expected {'mean'"):
            case.export(tmp_path / "out", normalise=normalise)
    with pytest.raises(ValueError, match="3 channels, normalise has 2"):
        case.export(tmp_path / "out", normalise={"mean": [0.5, 0.5], "std": [1.0, 1.0]})
    with pytest.raises(ValueError, match="belongs to another tree"):
        ct.export(tmp_path / "out", case.apply_fn, {"params": {}}, case.masks, image_shape=SHAPE)
    with pytest.raises(ValueError, match="choice"):
        ct.load(path).with_choice(1, {"params/Conv_0/kernel": "NHWC"})
    with pytest.raises(ValueError, match="unknown net 'nothing'"):
        case.export(tmp_path / "out", net={**NET, "name": "nothing"})
    with pytest.raises(ValueError, match="cannot be built"):
        case.export(tmp_path / "out", net={"name": "small"})
    with pytest.raises(ValueError, match="not those of the net"):
        case.export(tmp_path / "out", net={**NET, "num_classes": 7})
    assert not (tmp_path / "out").exists()
    case.export(tmp_path / "out", net=None, stablehlo=False)
    with pytest.raises(ValueError, match="give load its apply_fn"):
        ct.load(tmp_path / "out")


@pytest.mark.parametrize("layout", ["NHWC", "HWNC"])
def test_deep_bfloat16_nets_are_finite_and_close(tmp_path, layout):
    # On CPUs some versions of XLA give NaN for such nets, unless they are asked not to fuse.
    shape, normalise = (32, 32, 3), {"mean": [0.5] * 3, "std": [0.25] * 3}
    model = models.build("vgg13", num_classes=10, width=0.25)
    variables = drawn(model, shape)
    params, masks = pruned(variables["params"], ["Conv_[5-9]/kernel"], (16, 1))
    variables = {"params": params, "batch_stats": variables["batch_stats"]}
    net = {"name": "vgg13", "num_classes": 10, "width": 0.25, "precision": "bfloat16"}
    options = {"image_shape": shape, "normalise": normalise, "net": net, "stablehlo": False}
    ct.export(tmp_path / "out", lambda v, x: model.apply(v, x, train=False), variables, masks, **options)
    pixels = np.random.default_rng(0).random((2, *shape), np.float32)
    wanted = np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, (pixels - 0.5) / 0.25))
    loaded = ct.load(tmp_path / "out", layout=layout)
    for form in (loaded, loaded.dense(2)):
        assert np.abs(np.asarray(form(pixels)) - wanted).max() < 0.05 * np.abs(wanted).max()
