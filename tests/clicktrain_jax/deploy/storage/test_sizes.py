"""What an export's bytes are spent on, and the compression that the issue asks for."""

import numpy as np
import pytest

from clicktrain_jax import models
from clicktrain_jax.deploy import storage
from clicktrain_jax.deploy.storage.containers import split
from clicktrain_jax.masks import Masks


def test_sizes_by_hand(exports, tmp_path):
    tree = exports.variables()
    masks = exports.masks(tree)
    manifest = storage.write(tmp_path / "net", tree, masks, facts={}, dtype="int8", files={"extra": b"12"})
    sizes = storage.sizes(manifest)
    one = sizes.leaves["params/Conv_0/kernel"]
    assert one == storage.Bytes(weights=216, kept=216, values=216, indices=0, scales=4 * 8)
    assert one.dense_float32 == 4 * 216 and one.stored == 216 + 32
    pruned = sizes.leaves["params/Conv_1/kernel"]
    kernels = pruned.kept // 4
    assert (pruned.weights, pruned.values, pruned.scales) == (1152, pruned.kept, 64)
    assert pruned.indices == 5 + 8 * 16 // 8 + -(-2 * kernels // 8)
    assert sizes.leaves["params/Conv_1/bias"] == storage.Bytes(16, 16, 64, 0, 0)
    assert sizes.leaves["step"] == storage.Bytes(1, 1, 4, 0, 0)
    convolutions = [leaf for name, leaf in sizes.leaves.items() if "Conv" in name and "kernel" in name]
    assert sizes.convolutions == storage.Bytes(*(sum(column) for column in zip(*convolutions)))
    found = {path.name: path.stat().st_size for path in (tmp_path / "net").iterdir()}
    assert sizes.files == found and sizes.files["extra"] == 2
    assert sizes.headers == found["manifest.json"] + found["weights.safetensors"] - sum(
        leaf.stored for leaf in sizes.leaves.values()
    )
    whole = sizes.convolutions.stored + sizes.headers
    assert sizes.convolution_ratio == pytest.approx(4 * sizes.convolutions.weights / whole)


def test_sizes_want_a_whole_manifest(exports, tmp_path):
    manifest = storage.write(tmp_path / "net", exports.variables(), None, facts={})
    assert storage.sizes(manifest).convolutions.indices == 0
    with pytest.raises(ValueError, match="was changed after it was written"):
        storage.sizes(manifest | {"facts": {"a": 1}})


def patterns_of(count):
    """Patterns of four taps of nine, the first ``count`` in the order of combinations."""
    every = [taps for taps in range(512) if taps.bit_count() == 4]
    return (np.array(every[:count])[:, None] >> np.arange(9)) & 1 == 1


def pruned_vgg13(num_patterns, tile, removed=0.72):
    """VGG-13 of full width with random weights and choices: 4 taps of 9 stay, the first convolution is dense."""
    rng = np.random.default_rng(0)
    shapes = models.abstract_variables(models.build("vgg13", num_classes=10), (32, 32, 3))
    variables = {"params": {}, "batch_stats": {}}
    masks = {}
    for group, layers in shapes.items():
        for layer, leaves in layers.items():
            variables[group][layer] = {name: rng.random(leaf.shape, np.float32) for name, leaf in leaves.items()}
            masks[layer] = dict.fromkeys(leaves) if group == "params" else masks.get(layer)
    patterns = patterns_of(num_patterns)
    for layer, leaves in variables["params"].items():
        shape = leaves["kernel"].shape if layer.startswith("Conv_") else ()
        if shape and shape[2] > 3:
            grid = (shape[2] // tile[1], shape[3] // tile[0])
            stays = rng.permutation(grid[0] * grid[1]) >= removed * grid[0] * grid[1]
            keep = patterns[rng.integers(0, num_patterns, grid)] & stays.reshape(*grid, 1)
            keep = np.moveaxis(keep, -1, 0).repeat(tile[1], axis=1).repeat(tile[0], axis=2)
            order = rng.permutation(shape[3])  # tiles of filters in any order
            masks[layer]["kernel"] = keep[:, :, order].reshape(shape)
    return variables, masks


@pytest.mark.parametrize(
    ("num_patterns", "tile", "dtype", "least", "index_share"),
    [
        (4, (1, 1), "float32", 7.5, 0.045),
        (12, (1, 1), "float32", 7.4, 0.06),
        pytest.param(126, (1, 1), "float32", 7.2, 0.08, marks=pytest.mark.slow),
        (4, (64, 1), "float32", 7.9, 0.003),
        pytest.param(4, (1, 1), "bfloat16", 14.4, 0.09, marks=pytest.mark.slow),
        (4, (1, 1), "int8", 26, 0.16),
    ],
)
def test_vgg13_at_eight_times(tmp_path, num_patterns, tile, dtype, least, index_share):
    """The issue asks for 6.5; headers and manifest are counted whole."""
    variables, masks = pruned_vgg13(num_patterns, tile)
    manifest = storage.write(tmp_path / "net", variables, masks, facts={}, dtype=dtype)
    sizes = storage.sizes(manifest)
    kept = sizes.convolutions.weights / sizes.convolutions.kept
    assert kept == pytest.approx(8.0, abs=0.1)
    assert sizes.convolution_ratio > least > 6.5
    assert sizes.convolutions.indices < index_share * sizes.convolutions.stored
    assert sizes.headers < 16_000
    found = storage.read(tmp_path / "net")
    keep, back = masks["Conv_9"]["kernel"], found.masks
    np.testing.assert_array_equal(back.pattern["Conv_9"]["kernel"] & back.kernel["Conv_9"]["kernel"], keep)
    if dtype == "float32":
        kernel = variables["params"]["Conv_9"]["kernel"]
        np.testing.assert_array_equal(found.variables["params"]["Conv_9"]["kernel"], np.where(keep, kernel, 0))


def test_generated_sets_of_their_own_in_every_layer(tmp_path):
    """Tables of patterns stand with their layer."""
    rng = np.random.default_rng(0)
    tree, masks = {}, {}
    for layer in range(3):
        patterns = patterns_of(126)[rng.permutation(126)[:8]]
        shape = (3, 3, 64, 64)
        tree[f"c{layer}"] = rng.random(shape, np.float32)
        keep = patterns[rng.integers(0, 8, shape[2:])] & (rng.random((*shape[2:], 1)) > 0.7)
        masks[f"c{layer}"] = np.moveaxis(keep, -1, 0).reshape(shape)
    pairs = {name: split(keep) for name, keep in masks.items()}
    both = Masks(*({name: getattr(pair, part) for name, pair in pairs.items()} for part in Masks._fields))
    manifest = storage.write(tmp_path / "net", tree, both, facts={})
    assert [leaf["mask"]["patterns"] for leaf in manifest["leaves"].values()] == [8, 8, 8]
    assert storage.sizes(manifest).convolutions.indices < 3 * (64 * 64 * (1 + 0.32 * 3) / 8 + 10)
