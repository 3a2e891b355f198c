"""A net in C gives the logits of the loaded net, for every shape of mask."""

import functools

import compiled
import jax
import numpy as np
import pytest
from compiled import check, images
from drawn import drawn

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.deploy.c_net import to_c
from clicktrain_jax.deploy.load import inference_net

MASKS = {
    "dense": None,
    "tiles of 64": {"tile": (64, 1)},
    "tiles of 32": {"tile": (32, 1)},
    "tiles of 16": {"tile": (16, 1)},
    "tiles of 8": {"tile": (8, 1)},
    "tiles of 4": {"tile": (4, 1)},
    "kernel by kernel": {"tile": (1, 1)},
    "blocks": {"tile": (16, 16)},
    "superset": {"tile": (32, 1), "superset": 6},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path / "cache"))


def pruned(variables, settings, removed=0.5):
    rules = {"Conv_0/kernel": None, ".*(Conv_[0-9]+|shortcut)/kernel": removed}
    plan = ct.make_plan(variables["params"], rules, **settings)
    rng = np.random.default_rng(0)
    scores = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), variables["params"])
    masks = ct.select_masks(scores, plan, ct.patterns.fixed_set(4))
    return jax.tree.map(np.asarray, {**variables, "params": ct.apply_masks(variables["params"], masks)}), masks


def a_net(name, width, settings, shape=None):
    model = models.build(name, num_classes=10, width=width)
    shape = shape or models.default_image_shape(name)
    variables, masks = drawn(model, shape), None
    if settings is not None:
        variables, masks = pruned(variables, settings)
    count = shape[-1]
    return inference_net(
        lambda variables, x: model.apply(variables, x, train=False),
        variables,
        masks,
        image_shape=shape,
        normalise={"mean": [0.4, 0.5, 0.6][:count], "std": [0.2, 0.25, 0.3][:count]},
    )


@functools.cache
def small(kind, shape=(9, 11, 3)):
    return a_net("small", 2.0, MASKS[kind], shape)


@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind, tmp_path):
    text = to_c(small(kind))["net.c"].decode()
    assert ("pixels in lanes" in text) == (kind in ("kernel by kernel", "tiles of 4"))
    check(small(kind), tmp_path)


@pytest.mark.parametrize("flags", compiled.instructions(), ids=lambda flags: " ".join(flags) or "plain")
def test_vectors_of_every_kind(flags, tmp_path):
    """Tiles and lanes in one net, whatever registers there are."""
    for kind in ("kernel by kernel", "tiles of 16"):
        check(small(kind), tmp_path / kind, flags=("-O1", *flags))


@pytest.mark.parametrize("kind", ["kernel by kernel", "tiles of 8", "superset"])
def test_sanitizers(kind, tmp_path):
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *compiled.instructions()[-1])
    check(small(kind), tmp_path, flags=flags)


def test_the_widest_vectors_optimised(tmp_path):
    check(small("kernel by kernel"), tmp_path, flags=("-O3", *compiled.instructions()[-1]))


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet32"])
@pytest.mark.parametrize("kind", ["kernel by kernel", pytest.param("tiles of 8", marks=pytest.mark.slow)])
def test_our_nets(name, kind, tmp_path):
    check(a_net(name, 0.125, MASKS[kind]), tmp_path)


def test_bottlenecks_and_overlapping_pools(tmp_path):
    check(a_net("resnet50", 0.125, MASKS["kernel by kernel"], (65, 49, 3)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["vgg13", "resnet18"])
def test_wider_nets(name, kind, tmp_path):
    check(a_net(name, 0.5, MASKS[kind]), tmp_path, flags=("-O2", *compiled.instructions()[-1]))


@pytest.mark.slow
def test_clang(tmp_path):
    compiled.needs("clang")
    for kind in MASKS:
        check(small(kind), tmp_path / kind, compiler="clang", flags=("-O3", *compiled.instructions()[-1]))
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    check(small("kernel by kernel"), tmp_path / "sanitized", compiler="clang", flags=flags)


@pytest.mark.slow
def test_aarch64(tmp_path):
    compiled.needs("aarch64-linux-gnu-gcc", "qemu-aarch64")
    for kind in MASKS:
        check(
            small(kind),
            tmp_path / kind,
            compiler="aarch64-linux-gnu-gcc",
            flags=("-O2", "-static"),
            emulator=("qemu-aarch64",),
        )


@pytest.mark.parametrize("kind", ["kernel by kernel", "tiles of 16"])
def test_threads_change_no_bit(kind, tmp_path):
    files = to_c(small(kind))
    assert files == to_c(small(kind))  # nor does another export
    alone = check(small(kind), tmp_path / "alone", files)
    how = {"flags": ("-O1", "-fopenmp"), "emulator": ("env", "OMP_NUM_THREADS=3")}
    threads = check(small(kind), tmp_path / "threads", files, **how)
    np.testing.assert_array_equal(alone, threads)


def test_weights_beside_the_source(tmp_path):
    files = to_c(small("tiles of 16"), most_in_source=0)
    assert set(files) == {"net.c", "net.h", "net.weights"}
    found = check(small("tiles of 16"), tmp_path / "apart", files)
    np.testing.assert_array_equal(found, check(small("tiles of 16"), tmp_path / "within"))
    for changed in (files["net.weights"][:-4], files["net.weights"] + b"0000", b"1234" + files["net.weights"][4:]):
        with pytest.raises(AssertionError, match="3"):
            compiled.run({**files, "net.weights": changed}, images(small("tiles of 16")), tmp_path / "changed")
