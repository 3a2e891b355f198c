"""A net in C gives the logits of the loaded net, for every shape of mask."""

import functools

import compiled
import numpy as np
import pytest
from compiled import check, images
from drawn import drawn, drawn_masks, masked

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
    masks = drawn_masks(variables["params"], plan)
    return {**variables, "params": masked(variables["params"], masks)}, masks


def a_net(model, shape, settings):
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


def of_the_zoo(name, width, kind):
    return a_net(models.build(name, num_classes=10, width=width), models.default_image_shape(name), MASKS[kind])


@functools.cache
def small(kind):
    return a_net(models.build("small", num_classes=10, width=2.0), (9, 11, 3), MASKS[kind])


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    """The small net's logits in C for any processor, compiled once for each kind of mask."""
    return functools.cache(lambda kind: check(small(kind), tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind, plainly):
    text = to_c(small(kind))["net.c"].decode()
    assert ("pixels in lanes" in text) == (kind in ("kernel by kernel", "tiles of 4"))
    plainly(kind)


# The plain kind is every mask's, above; the widest vectors are compiled as users compile them.
OTHERS = compiled.instructions()[1:]


@pytest.mark.parametrize("flags", OTHERS, ids=" ".join)
def test_vectors_of_every_kind(flags, tmp_path):
    """Tiles and lanes in one net, whatever registers there are."""
    for kind in ("kernel by kernel", "tiles of 16"):
        check(small(kind), tmp_path / kind, flags=("-O3" if flags == OTHERS[-1] else "-O1", *flags))


@pytest.mark.parametrize("kind", ["kernel by kernel", "tiles of 8", "superset"])
def test_sanitizers(kind, tmp_path):
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *compiled.instructions()[-1])
    check(small(kind), tmp_path, flags=flags)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vgg11", "kernel by kernel"),
        ("resnet32", "kernel by kernel"),
        # Of resnet18 every kind is among the wider ones.
        *(pytest.param(name, "tiles of 8", marks=pytest.mark.slow) for name in ("vgg11", "resnet32")),
    ],
)
def test_our_nets(name, kind, tmp_path):
    check(of_the_zoo(name, 0.125, kind), tmp_path)


def test_bottlenecks_and_overlapping_pools(tmp_path):
    """Blocks with a shortcut of their own, and one without."""
    model = models.ResNet(10, (2, 1), (64, 128), kind="bottleneck", stem="imagenet", width=0.125)
    check(a_net(model, (65, 49, 3), MASKS["kernel by kernel"]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    # Sums of maps are resnet18's alone, so that it has every kind; a map's end is one pixel in vgg13.
    [*(("resnet18", kind) for kind in MASKS), *(("vgg13", kind) for kind in ("kernel by kernel", "tiles of 32"))],
)
def test_wider_nets(name, kind, tmp_path):
    check(of_the_zoo(name, 0.5, kind), tmp_path, flags=("-O2", *compiled.instructions()[-1]))


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
def test_threads_change_no_bit(kind, plainly, tmp_path):
    files = to_c(small(kind))
    assert files == to_c(small(kind))  # nor does another export
    how = {"flags": ("-O1", "-fopenmp"), "emulator": ("env", "OMP_NUM_THREADS=3")}
    np.testing.assert_array_equal(plainly(kind), check(small(kind), tmp_path, files, **how))


def test_weights_beside_the_source(plainly, tmp_path):
    net = small("tiles of 16")
    files = to_c(net, most_in_source=0)
    assert set(files) == {"net.c", "net.h", "net.weights"}
    np.testing.assert_array_equal(check(net, tmp_path, files), plainly("tiles of 16"))
    for changed in (files["net.weights"][:-4], files["net.weights"] + b"0000", b"1234" + files["net.weights"][4:]):
        (tmp_path / "net.weights").write_bytes(changed)
        with pytest.raises(AssertionError, match="3"):
            compiled.call(images(net), tmp_path)
