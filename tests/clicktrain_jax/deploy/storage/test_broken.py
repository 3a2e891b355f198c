"""Broken exports: whatever happened to the files, a ValueError that names the file, never a wrong answer."""

import copy
import hashlib
import json
import os
import random
import shutil

import numpy as np
import pytest

from clicktrain_jax.deploy import storage
from clicktrain_jax.deploy.storage.manifest import seal, to_text

FILES = ("manifest.json", "weights.safetensors", "net.stablehlo")


@pytest.fixture(scope="module")
def whole(exports, tmp_path_factory):
    """The folder of a small export that no test changes."""
    folder = tmp_path_factory.mktemp("whole") / "net"
    tree = exports.variables()
    program = np.random.default_rng(0).bytes(300)
    storage.write(folder, tree, exports.masks(tree), facts={"run": "one"}, files={"net.stablehlo": program})
    return folder


@pytest.fixture
def net(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "net")


def refused(folder, file, message=None):
    with pytest.raises(ValueError, match=message) as caught:
        storage.read(folder)
    assert str(folder / file) in str(caught.value)
    return str(caught.value)


def resealed(folder, change):
    """Change the manifest as someone would who makes its digest fit again."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_bytes(to_text(seal(manifest)))


@pytest.mark.parametrize("file", FILES)
def test_any_byte_changed(net, whole, file):
    rng = random.Random(file)
    data = (whole / file).read_bytes()
    for _ in range(150):
        at, value = rng.randrange(len(data)), rng.randrange(256)
        if data[at] != value:
            (net / file).write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            refused(net, file)


@pytest.mark.parametrize("file", FILES)
def test_cut_or_longer(net, whole, file):
    rng = random.Random(file)
    data = (whole / file).read_bytes()
    for length in (0, 1, len(data) - 1, *(rng.randrange(len(data)) for _ in range(40))):
        (net / file).write_bytes(data[:length])
        refused(net, file)
    for more in (b"\n", b" ", b"\0", b"{}", data):
        (net / file).write_bytes(data + more)
        refused(net, file)


@pytest.mark.parametrize("file", FILES)
def test_missing_or_no_file(net, whole, file):
    (net / file).unlink()
    refused(net, file, "is missing")
    (net / file).mkdir()
    refused(net, file, "is not a plain file inside of its folder")
    (net / file).rmdir()
    os.mkfifo(net / file)
    refused(net, file, "is not a plain file inside of its folder")


@pytest.mark.parametrize("file", FILES)
def test_a_link_that_leaves_the_folder(net, whole, file):
    (net / file).unlink()
    (net / file).symlink_to(whole / file)
    refused(net, file, "a link or a folder: refused")
    (net / file).unlink()
    (net / file).symlink_to(file)
    refused(net, file)


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "manifest.json", "the folder does not exist")
    refused(tmp_path, "manifest.json", "is missing")
    (tmp_path / "file").write_text("text")
    refused(tmp_path / "file", "manifest.json", "the folder does not exist")


def test_another_nets_manifest_or_weights(net, exports, tmp_path):
    other = tmp_path / "other"
    tree = exports.variables(seed=1)
    storage.write(other, tree, exports.masks(tree), facts={}, files={"net.stablehlo": b""})
    shutil.copy(other / "manifest.json", net)
    refused(net, "net.stablehlo", "at most 0 are expected")
    shutil.copy(other / "net.stablehlo", net)
    refused(net, "weights.safetensors", "is not the file of this manifest")
    shutil.copy(other / "weights.safetensors", net)
    assert storage.read(net).manifest == storage.read_manifest(other)


@pytest.mark.parametrize("version", [0, 2, "1", True, 1.0, None, []])
def test_a_wrong_version(net, version):
    resealed(net, lambda manifest: manifest.update(version=version))
    refused(net, "manifest.json", "has version .*, this program reads version 1")


@pytest.mark.parametrize(
    "file", ["../secret", "/etc/hostname", "a/b", "a\\b", "..", ".", "", "c:x", "a\0b", "manifest.json"]
)
def test_a_path_outside_of_the_folder(net, file):
    (net.parent / "secret").write_bytes(b"secret")
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    resealed(net, lambda manifest: manifest["files"].update({file: entry}))
    refused(net, "manifest.json", "expected a plain name inside of the folder|lists manifest.json itself")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([2**40, 2**40, 8, 16], "has shape"),
        ([3, 3, 8, 2**31], "declares .* bytes of arrays"),
        ([0, 2**62], "has shape"),
        ([1] * 40, "has shape"),
        ([-3, 3, 8, 16], "has shape"),
        ([3.0, 3, 8, 16], "has shape"),
        ([True, 3, 8, 16], "has shape"),
        ("3388", "has shape"),
        ([3, 3, 8, 17], "its manifest tells of|holds"),
        ([3, 3, 16, 8], "."),
    ],
)
def test_declared_shapes(net, shape, message):
    resealed(net, lambda manifest: manifest["leaves"]["params/Conv_1/kernel"].update(shape=shape))
    with pytest.raises(ValueError, match=message) as caught:
        storage.read(net)
    assert str(net) in str(caught.value)


def test_a_filter_for_many_cannot_ask_for_all_memory(net, tmp_path):
    """One filter stands for all of 2**40: a few bytes that would become many."""
    kernel = np.zeros((1, 1, 4, 4), np.float32)
    storage.write(tmp_path / "bomb", {"w": kernel}, {"w": kernel > 0}, facts={})
    resealed(tmp_path / "bomb", lambda manifest: manifest["leaves"]["w"].update(shape=[1, 1, 4, 2**40]))
    refused(tmp_path / "bomb", "manifest.json", "refused for its weights' file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"format": "x", "format": "x"}', "has a key twice"),
        (b'{"a": {"b": 1, "b": 1}}', "has a key twice"),
        (b'{"a": NaN}', "holds NaN, which is no JSON"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": 1e999}', "."),
        (b'{"a": ' + b"1" * 5000 + b"}", "."),
        (b"[" * 100_000, "."),
        (b'{"a":' * 100_000, "."),
        (b"[]", "is not the manifest of an export"),
        (b"{}", "is not the manifest of an export"),
        (b'{"format": "web app"}', "is not the manifest of an export"),
        (b"null", "is not the manifest of an export"),
        (b"", "is no JSON"),
        (b"\xff\xfe", "is not the ASCII text"),
        (b'{"format": "clicktrain-jax export", "version": 1}', "was changed after it was written"),
    ],
)
def test_a_manifest_that_is_none(net, text, message):
    (net / "manifest.json").write_bytes(text)
    refused(net, "manifest.json", message)


def test_a_manifest_written_in_another_way(net):
    path = net / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    refused(net, "manifest.json", "same content, other text")


ODD = (None, True, False, 0, 1, -1, 2**70, 0.5, "", "a", "float32", "int8", [], [1], {}, {"a": 1}, "params/")


def places(node, path=()):
    """Paths to every value of nested JSON data."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def test_any_field_changed_by_one_who_makes_the_digest_fit(net, whole):
    """A ValueError, or the same arrays: facts and versions are what the manifest says they are."""
    rng = random.Random(0)
    original = json.loads((whole / "manifest.json").read_text())
    expected = storage.read(whole)
    free = ("facts", "software")
    paths = [path for path in places(original) if path[0] not in (*free, "digest")]
    outcomes = {"refused": 0, "read": 0}
    for _ in range(500):
        manifest = copy.deepcopy(original)
        *outer, last = rng.choice(paths)
        node = manifest
        for key in outer:
            node = node[key]
        what = rng.choice(["put", "drop", "add"])
        if what == "put":
            node[last] = copy.deepcopy(rng.choice(ODD))
        elif what == "drop":
            del node[last]
        elif isinstance(node, dict):
            node["new"] = copy.deepcopy(node[last])
        (net / "manifest.json").write_bytes(to_text(seal(manifest)))
        try:
            found = storage.read(net)
        except ValueError as error:
            assert str(net) in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        for name, leaf in expected.variables["params"].items():
            for part, array in leaf.items():
                np.testing.assert_array_equal(found.variables["params"][name][part], array)
    assert outcomes["refused"] > 300


def test_weights_changed_by_one_who_makes_all_digests_fit(net, whole):
    """A ValueError, or arrays of the same shapes: nothing else can be known."""
    rng = random.Random(1)
    data = (whole / "weights.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    outcomes = {"refused": 0, "read": 0}
    for attempt in range(300):
        changed = bytearray(data)
        # The header is where most can go wrong.
        at = rng.randrange(header if attempt % 2 else len(data))
        changed[at] = rng.randrange(256)
        if attempt % 10 == 0:
            del changed[rng.randrange(len(changed)) :]
        (net / "weights.safetensors").write_bytes(changed)
        entry = {"bytes": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
        resealed(net, lambda manifest, entry=entry: manifest["files"].update({"weights.safetensors": entry}))
        try:
            found = storage.read(net)
        except ValueError as error:
            assert str(net / "weights.safetensors") in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert found.variables["params"]["Conv_1"]["kernel"].shape == (3, 3, 8, 16)
    assert min(outcomes.values()) > 20


def test_masks_that_are_not_those_of_the_manifest(net):
    resealed(net, lambda manifest: manifest["masks"].update(sha256="0" * 64))
    refused(net, "weights.safetensors", "holds masks that are not those of its manifest")


def test_a_random_key_that_is_none(net):
    key = {"dtype": "uint32", "stored": "uint32", "shape": [2], "key": "no such implementation"}
    storage.write(net, {"key": np.zeros(2, np.uint32)}, None, facts={})
    resealed(net, lambda manifest: manifest["leaves"].update(key=key))
    refused(net, "weights.safetensors", "is no random key of 'no such implementation'")
