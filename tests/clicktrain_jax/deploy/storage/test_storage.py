"""Exports written and read: what comes back, in which containers, and what happens to the folder."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import clicktrain_jax as ct
from clicktrain_jax.deploy import storage
from clicktrain_jax.masks import combine
from clicktrain_jax.trees import map_named, named_leaves


def masked(tree, keep):
    """A tree's leaves by name, zero where a mask by name removes."""
    return {
        name: leaf if keep.get(name) is None else np.where(keep[name], leaf, np.zeros((), leaf.dtype))
        for name, leaf in named_leaves(tree)
    }


def assert_same_bits(found, expected):
    found = dict(named_leaves(found))
    assert set(found) == set(expected)
    for name, leaf in expected.items():
        assert found[name].dtype == np.asarray(leaf).dtype and found[name].shape == np.shape(leaf), name
        assert np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes(), name


def by_name(tree, prefix=""):
    return {prefix + name: leaf for name, leaf in named_leaves(tree)}


def few_of(tree, name, seed):
    """A mask of one leaf of a tree, in its containers; None at the others."""
    rng = np.random.default_rng(seed)
    return map_named(lambda own, leaf: rng.random(leaf.shape) < 0.5 if own == name else None, tree)


@pytest.fixture
def net(exports):
    tree = exports.variables()
    return tree, exports.masks(tree)


def test_a_net_comes_back_bit_for_bit(net, tmp_path):
    tree, masks = net
    manifest = storage.write(tmp_path / "net", tree, masks, facts={"accuracy": 0.5, "shape": (8, 8, 1)})
    found = storage.read(tmp_path / "net")
    assert found.manifest == manifest and manifest["facts"] == {"accuracy": 0.5, "shape": [8, 8, 1]}
    assert jax.tree.structure(found.variables) == jax.tree.structure(tree)
    assert_same_bits(found.variables, masked(tree, by_name(combine(masks), "params/")))
    for given, back in zip(masks, found.masks):
        assert by_name(back).keys() == by_name(given).keys()
    for name, kernel in named_leaves(masks.kernel):
        np.testing.assert_array_equal(by_name(found.masks.kernel)[name], kernel)
    pattern, kernel = masks.pattern["Conv_1"]["kernel"], masks.kernel["Conv_1"]["kernel"]
    np.testing.assert_array_equal(found.masks.pattern["Conv_1"]["kernel"], pattern | ~kernel)
    assert found.masks.pattern["Conv_2"]["kernel"] is None and found.masks.kernel["Conv_0"]["kernel"] is None


def test_what_comes_back_is_written_again_to_the_same_bytes(net, tmp_path):
    tree, masks = net
    storage.write(tmp_path / "one", tree, masks, facts={})
    found = storage.read(tmp_path / "one")
    storage.write(tmp_path / "two", found.variables, found.masks, facts={})
    for name in ("manifest.json", "weights.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_masked_is_zero_whatever_it_was(net, tmp_path):
    tree, masks = net
    keep = np.asarray(combine(masks)["Conv_1"]["kernel"])
    tree["params"]["Conv_1"]["kernel"] = np.where(keep, tree["params"]["Conv_1"]["kernel"], np.float32(np.nan))
    storage.write(tmp_path / "net", tree, masks, facts={}, dtype="int8")
    kernel = storage.read(tmp_path / "net").variables["params"]["Conv_1"]["kernel"]
    assert np.isfinite(kernel).all() and not kernel[~keep].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_narrow_exports_keep_masks_vectors_and_dtypes(net, tmp_path, dtype):
    tree, masks = net
    whole = storage.write(tmp_path / "whole", tree, masks, facts={})
    manifest = storage.write(tmp_path / "net", tree, masks, facts={}, dtype=dtype)
    found = storage.read(tmp_path / "net")
    assert manifest["dtype"] == dtype
    assert manifest["masks"] == whole["masks"] == found.manifest["masks"]
    expected = masked(tree, by_name(combine(masks), "params/"))
    for name, leaf in named_leaves(found.variables):
        assert leaf.dtype == expected[name].dtype
        if leaf.ndim < 2:
            np.testing.assert_array_equal(leaf, expected[name])
        else:
            assert manifest["leaves"][name]["stored"] == dtype
            np.testing.assert_allclose(leaf, expected[name], rtol=2**-8, atol=0.02 if dtype == "int8" else 1e-6)
    keep = np.asarray(combine(masks)["Conv_1"]["kernel"])
    assert not found.variables["params"]["Conv_1"]["kernel"][~keep].any()


def test_one_boolean_tree_is_enough(net, tmp_path):
    tree, masks = net
    keep = combine(masks)
    storage.write(tmp_path / "net", tree, keep, facts={})
    found = storage.read(tmp_path / "net")
    for name, mask in named_leaves(combine(found.masks)):
        np.testing.assert_array_equal(mask, by_name(keep)[name])
    np.testing.assert_array_equal(found.masks.kernel["Conv_1"]["kernel"], masks.kernel["Conv_1"]["kernel"])


def test_no_masks(net, tmp_path):
    tree, _ = net
    storage.write(tmp_path / "net", tree, None, facts={})
    found = storage.read(tmp_path / "net")
    assert found.masks is None and found.manifest["masks"] is None
    assert_same_bits(found.variables, dict(named_leaves(tree)))


def test_linen_with_its_own_containers(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)).mean((1, 2)))

    like = jax.eval_shape(Net().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 8), jnp.float32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), like)
    masks = ct.Masks(*(few_of(variables["params"], "Conv_0/kernel", seed) for seed in range(2)))
    storage.write(tmp_path / "net", variables, masks, facts={})
    found = storage.read(tmp_path / "net", like=like)
    assert jax.tree.structure(found.variables) == jax.tree.structure(variables)
    assert_same_bits(found.variables, masked(variables, by_name(combine(masks), "params/")))
    assert_same_bits(ct.apply_masks(variables["params"], found.masks), dict(named_leaves(found.variables["params"])))


@pytest.mark.parametrize("covered", ["parameters", "everything"])
def test_nnx_state_with_random_keys_and_counters(tmp_path, covered):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(8, 16, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    state = nnx.state(Net(nnx.Rngs(0)))
    part = nnx.state(Net(nnx.Rngs(0)), nnx.Param) if covered == "parameters" else state
    kernel = state["conv"]["kernel"][...]
    masks = ct.Masks(*(few_of(part, "conv/kernel", seed) for seed in range(2)))
    storage.write(tmp_path / "net", state, masks, facts={})
    found = storage.read(tmp_path / "net", like=nnx.state(Net(nnx.Rngs(1))))
    keep = dict(named_leaves(combine(masks)))["conv/kernel"]
    assert isinstance(found.variables, nnx.State)
    leaves = dict(named_leaves(found.variables))
    np.testing.assert_array_equal(leaves["conv/kernel"], jnp.where(keep, kernel, 0))
    given = dict(named_leaves(state))["dropout/rngs/key"]
    assert leaves["dropout/rngs/key"].dtype == given.dtype
    assert (jax.random.key_data(leaves["dropout/rngs/key"]) == jax.random.key_data(given)).all()
    model = Net(nnx.Rngs(2))
    nnx.update(model, found.variables)
    np.testing.assert_array_equal(model.conv.kernel[...], leaves["conv/kernel"])
    back = dict(named_leaves(combine(found.masks)))
    np.testing.assert_array_equal(back["conv/kernel"], keep)
    assert set(back) == {name for name, _ in named_leaves(part)}


def test_lists_tuples_and_none(tmp_path):
    tree = [(np.ones((3, 3, 2, 2), np.float32), None), {"b": np.arange(3)}]
    keep = [(np.arange(36).reshape(3, 3, 2, 2) % 3 == 0, None), {"b": None}]
    storage.write(tmp_path / "net", tree, keep, facts={})
    plain = storage.read(tmp_path / "net")
    assert set(plain.variables) == {"0", "1"} and plain.variables["0"]["1"] is None
    found = storage.read(tmp_path / "net", like=tree)
    assert jax.tree.structure(found.variables) == jax.tree.structure(tree)
    assert jax.tree.structure(combine(found.masks)) == jax.tree.structure(keep)
    np.testing.assert_array_equal(found.variables[0][0], np.where(keep[0][0], 1, 0))


def test_a_tree_that_is_one_array(tmp_path):
    kernel = np.ones((3, 3, 4, 4), np.float32)
    keep = np.random.default_rng(0).random(kernel.shape) < 0.5
    storage.write(tmp_path / "net", kernel, keep, facts={})
    found = storage.read(tmp_path / "net")
    np.testing.assert_array_equal(found.variables, np.where(keep, kernel, 0))
    np.testing.assert_array_equal(combine(found.masks), keep)


def test_dtypes_and_sizes_of_all_kinds(tmp_path):
    tree = {
        "half": jnp.ones((2, 3), jnp.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float64(2.5),
        "größe": np.array([True, False]),
        "count": np.uint64(2**63),
        "python": 3,
        "byte": np.full((2, 2), -5, np.int8),
    }
    for dtype in ("float32", "int8"):
        storage.write(tmp_path / "net", tree, None, facts={}, dtype=dtype)
        found = storage.read(tmp_path / "net", like=tree).variables
        for name in set(tree) - {"half"}:
            np.testing.assert_array_equal(found[name], tree[name])
        np.testing.assert_allclose(found["half"].astype(np.float32), 1.0)
        assert found["half"].dtype == jnp.bfloat16 and found["byte"].dtype == np.int8


def test_masked_leaves_of_no_size(tmp_path):
    tree = {"a": np.zeros((3, 3, 0, 4), np.float32), "b": np.zeros((0,), np.float32), "c": np.float32(2)}
    keep = {name: np.zeros(np.shape(leaf), bool) for name, leaf in tree.items()}
    for dtype in ("float32", "int8"):
        storage.write(tmp_path / "net", tree, keep, facts={}, dtype=dtype)
        found = storage.read(tmp_path / "net")
        assert found.variables["a"].shape == (3, 3, 0, 4) and found.variables["b"].shape == (0,)
        assert found.variables["c"] == 0 and found.variables["c"].shape == ()
        np.testing.assert_array_equal(combine(found.masks)["c"], False)


def test_like_of_another_net_is_refused(net, tmp_path):
    tree, masks = net
    storage.write(tmp_path / "net", tree, masks, facts={})
    other = jax.tree.map(lambda leaf: leaf, tree)
    other["params"]["Dense_0"]["kernel"] = np.zeros((8, 100), np.float32)
    with pytest.raises(ValueError, match=r"like: 'params/Dense_0/kernel' has shape \(8, 100\)"):
        storage.read(tmp_path / "net", like=other)
    other["params"]["Dense_0"]["kernel"] = jax.ShapeDtypeStruct((8, 10), jnp.bfloat16)
    with pytest.raises(ValueError, match="like: 'params/Dense_0/kernel' has dtype bfloat16"):
        storage.read(tmp_path / "net", like=other)
    other["params"]["Dense_0"]["kernel"] = None
    with pytest.raises(ValueError, match="like: 'params/Dense_0/kernel' is None"):
        storage.read(tmp_path / "net", like=other)
    del other["params"]["Dense_0"]
    with pytest.raises(ValueError, match="like: belongs to another tree"):
        storage.read(tmp_path / "net", like=other)


def test_masks_of_another_net_are_refused(net, exports, tmp_path):
    tree, masks = net
    with pytest.raises(ValueError, match="'params/Conv_1/kernel' has shape"):
        storage.write(tmp_path / "net", tree, exports.masks(exports.variables(cin=16)), facts={})
    with pytest.raises(ValueError, match="masks: belongs to another tree"):
        storage.write(tmp_path / "net", tree, {"Conv_9": {"kernel": np.ones(3, bool)}}, facts={})
    with pytest.raises(ValueError, match="has dtype float32, expected bool"):
        storage.write(tmp_path / "net", tree, {"Conv_1": {"kernel": tree["params"]["Conv_1"]["kernel"]}}, facts={})
    with pytest.raises(ValueError, match="masks.kernel"):
        storage.write(tmp_path / "net", tree, masks._replace(kernel=masks.kernel["Conv_1"]), facts={})
    with pytest.raises(ValueError, match="masks have no leaves"):
        storage.write(tmp_path / "net", tree, {}, facts={})
    twice = {"a": {"w": np.ones(2)}, "b": {"w": np.ones(2)}}
    with pytest.raises(ValueError, match="masks fit the variables below 'a/' and 'b/'"):
        storage.write(tmp_path / "net", twice, {"w": np.ones(2, bool)}, facts={})
    with pytest.raises(ValueError, match="there is a mask for 'n', and the leaf is None"):
        storage.write(tmp_path / "net", {"n": None}, {"n": np.True_}, facts={})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float8"}, "dtype='float8': expected one of"),
        ({"facts": None}, "facts=None: expected a dictionary"),
        ({"facts": {"a": [1, float("nan")]}}, r"facts\['a'\]\[1\] is nan"),
        ({"facts": {"a": np.float32(1)}}, r"facts\['a'\] is"),
        ({"facts": {"a": {1: 2}}}, r"facts\['a'\] has the key 1: expected text"),
        ({"files": {"../net.onnx": b""}}, "expected a plain name inside of the folder"),
        ({"files": {"net.onnx": "path"}}, "files: 'net.onnx' is a str, expected its bytes"),
        ({"files": {"..": b""}}, "expected a plain name inside of the folder"),
        ({"files": {"manifest.json": b""}}, "'manifest.json' is a name that an export keeps for itself"),
        ({"variables": {"a": {"b": np.ones(1)}, "a/b": np.ones(1)}}, "two leaves are both called 'a/b'"),
        ({"variables": {"a": np.ones(1), "a/b": np.ones(1)}}, "'a/b' lies inside of the leaf 'a'"),
        ({"variables": {"__metadata__": np.ones(1)}}, "cannot be called '__metadata__'"),
        ({"variables": {"a\n": np.ones(1)}}, "is not printable"),
        ({"variables": {"a": np.ones((1, 1)), "a#scale": np.ones(1)}, "dtype": "int8"}, "both be stored as"),
        ({"variables": {"a": np.array(["text"])}}, "'a' has dtype <U4"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing_behind(tmp_path, change, message):
    given = {"variables": {"w": np.ones(2)}, "masks": None, "facts": {}} | change
    with pytest.raises(ValueError, match=message):
        storage.write(tmp_path / "net", **given)
    assert not any(tmp_path.iterdir())


def test_further_files_are_listed_and_read(net, tmp_path):
    tree, masks = net
    manifest = storage.write(tmp_path / "net", tree, masks, facts={}, files={"net.stablehlo": b"program"})
    assert set(manifest["files"]) == {"net.stablehlo", "weights.safetensors"}
    assert storage.read_file(tmp_path / "net", "net.stablehlo") == b"program"
    assert storage.read_manifest(tmp_path / "net") == manifest
    with pytest.raises(ValueError, match="lists no 'net.onnx'"):
        storage.read_file(tmp_path / "net", "net.onnx")
    (tmp_path / "net" / "net.stablehlo").write_bytes(b"programs")
    for reader in (storage.read, lambda folder: storage.read_file(folder, "net.stablehlo")):
        with pytest.raises(ValueError, match="net.stablehlo: has 8 bytes, at most 7"):
            reader(tmp_path / "net")


def test_an_earlier_export_is_replaced_and_nothing_else_is(net, tmp_path):
    tree, masks = net
    folder = tmp_path / "some" / "where"
    storage.write(folder, tree, masks, facts={"n": 1}, files={"extra": b"1"})
    (folder / "report.html").write_text("a page about it")
    storage.write(folder, tree, None, facts={"n": 2})
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "weights.safetensors"]
    assert storage.read(folder).manifest["facts"] == {"n": 2}
    assert [path.name for path in folder.parent.iterdir()] == ["where"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds 'notes.txt' beside an export"):
        storage.write(folder, tree, masks, facts={})
    assert (folder / "notes.txt").read_text() == "mine" and storage.read(folder).masks is None


def test_a_folder_that_is_no_export_is_left_alone(net, tmp_path):
    tree, masks = net
    mine = tmp_path / "mine"
    mine.mkdir()
    storage.write(mine, tree, masks, facts={})  # an empty folder will do
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no export and not empty"):
        storage.write(other, tree, masks, facts={})
    (other / "manifest.json").write_text(json.dumps({"format": "web app"}))
    with pytest.raises(ValueError, match="holds something else or a broken export"):
        storage.write(other, tree, masks, facts={})
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        storage.write(other / "notes.txt", tree, masks, facts={})
    assert (other / "notes.txt").read_text() == "mine"


def test_a_write_that_fails_leaves_the_earlier_export(net, tmp_path, monkeypatch):
    tree, masks = net
    storage.write(tmp_path / "net", tree, masks, facts={"n": 1})
    rename = type(tmp_path).rename

    def fail(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        storage.write(tmp_path / "net", tree, masks, facts={"n": 2})
    monkeypatch.undo()
    assert storage.read(tmp_path / "net").manifest["facts"] == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
