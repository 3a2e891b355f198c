"""The packed archive, the cache of decoded arrays and the decoder, on a small set made here."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.data import DataConfig, DatasetMissing, load, load_packed, pack, prepare, tfds_source
from experiments.data.decode import decode_images, encoding_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS directory that holds a cifar10 of 100 + 40 PNG images."""
    directory = tmp_path_factory.mktemp("tfds")
    random = np.random.default_rng(0)
    content = {}
    for split, count in (("train", 100), ("test", 40)):
        rows = random.integers(0, 256, (count, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(count) % 10
        content[split] = rows.tobytes()
    prepare.write("cifar10", directory, content)
    return directory


@pytest.fixture
def config(tfds_dir, tmp_path):
    return DataConfig("cifar10", str(tfds_dir), cache_dir=str(tmp_path / "cache"))


def test_second_load_comes_from_the_cache(config, monkeypatch):
    first = load(config)
    monkeypatch.setattr(tfds_source, "read", None)  # Calling it would fail.
    assert load(config).fingerprint == first.fingerprint
    assert [path.suffix for path in Path(config.cache_dir).iterdir()] == [".npz"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_damaged_cache_is_rebuilt(config, damage):
    first = load(config)
    (entry,) = Path(config.cache_dir).iterdir()
    whole = entry.read_bytes()
    middle = len(whole) // 2
    entry.write_bytes(
        {
            "truncated": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "foreign": b"hello",
            "empty": b"",
        }[damage]
    )
    with pytest.warns(UserWarning, match="is damaged .*; rebuilding it"):
        assert load(config).fingerprint == first.fingerprint
    assert entry.read_bytes() == whole


def test_unwritable_cache_only_warns(config, tmp_path):
    (tmp_path / "file").touch()
    blocked = dataclasses.replace(config, cache_dir=str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="CLICKTRAIN_CACHE"):
        assert len(load(blocked).train_labels) == 100


def test_packed_round_trip(config, tmp_path):
    (path,) = pack(config, tmp_path / "packed.npz")
    direct, raw = load(config), load_packed(path)
    np.testing.assert_array_equal(raw.train_images, direct.train_images)
    np.testing.assert_array_equal(raw.test_labels, direct.eval_labels)
    packed = load(DataConfig("cifar10", str(path), cache_dir=config.cache_dir))
    assert packed.fingerprint == direct.fingerprint
    assert (direct.encoding, packed.encoding) == ("png", "lossless webp")
    assert pack(config, tmp_path / "again.npz")[0].read_bytes() == path.read_bytes()


def test_parts_are_joined(config, tmp_path):
    path = tmp_path / "packed.npz"
    (whole,) = pack(config, path)
    expected = whole.read_bytes()
    parts = pack(config, path, 3)
    assert [part.name for part in parts] == [f"packed.npz.part{number}" for number in range(3)]
    assert b"".join(part.read_bytes() for part in parts) == expected and not path.exists()
    data = DataConfig("cifar10", str(path), cache_dir=str(tmp_path / "other"))
    assert load(data).fingerprint == load(config).fingerprint
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"lies in parts \[0, 2\]; expected all from 0 on"):
        load_packed(path)
    parts[2].unlink()
    with pytest.raises(ValueError, match="cannot be read as a packed data set"):
        load_packed(path)
    with pytest.raises(ValueError, match="parts=0; expected at least 1"):
        pack(config, path, 0)


def test_packed_file_needs_no_tfds(config, tmp_path):
    (path,) = pack(config, tmp_path / "packed.npz")
    script = (
        "import sys\n"
        "for name in ('tensorflow_datasets', 'array_record', 'sklearn', 'tensorflow'):\n"
        "    sys.modules[name] = None\n"  # Importing it raises ImportError.
        "from experiments.data import DataConfig, load\n"
        f"config = DataConfig('cifar10', {str(path)!r}, cache_dir={str(tmp_path / 'c')!r})\n"
        "print(load(config).fingerprint)\n"
        f"config = DataConfig('cifar10', {config.dir!r}, cache_dir={str(tmp_path / 'd')!r})\n"
        "try:\n    load(config)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    fingerprint, message = result.stdout.strip().splitlines()
    assert fingerprint == load(config).fingerprint
    assert "needs tensorflow-datasets" in message


def test_unusable_packed_files_are_refused(config, tmp_path):
    whole = pack(config, tmp_path / "packed.npz")[0].read_bytes()
    middle = len(whole) // 2
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "truncated").write_bytes(whole[:middle])
    (tmp_path / "flipped").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    (tmp_path / "text").write_text("hello")
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    for name in ("foreign.npz", "array.npy", "truncated", "flipped", "text", "pickled.npy"):
        with pytest.raises(ValueError, match="cannot be read as a packed data set.*copy it again"):
            load_packed(tmp_path / name)
    with pytest.raises(DatasetMissing, match="none is no file"):
        load_packed(tmp_path / "none")
    with pytest.raises(ValueError, match="holds 'cifar10'; expected 'cifar100'"):
        load(DataConfig("cifar100", str(tmp_path / "packed.npz"), cache_dir=config.cache_dir))
    with np.load(tmp_path / "packed.npz") as file:
        arrays = dict(file)
    meta = {**json.loads(arrays["meta"].tobytes()), "version": 99}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(tmp_path / "newer.npz", **arrays)
    with pytest.raises(ValueError, match="format .*99.*expected"):
        load_packed(tmp_path / "newer.npz")


def test_pack_refuses(config, tmp_path):
    out = tmp_path / "out.npz"
    with pytest.raises(ValueError, match="'digits' cannot be packed"):
        pack(DataConfig(), out)
    with pytest.raises(ValueError, match="packed whole"):
        pack(dataclasses.replace(config, train_examples=10), out)
    pack(config, out)
    with pytest.raises(ValueError, match="is a file; expected a TFDS directory"):
        pack(DataConfig("cifar10", str(out)), tmp_path / "other.npz")


def test_decode_refuses_and_names_the_image():
    from PIL import Image

    def png(size, mode="RGB"):
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, "png")
        return buffer.getvalue()

    assert decode_images([png((3, 2), "L")]).shape == (1, 2, 3, 1)
    assert decode_images([png((3, 2), "P")]).shape == (1, 2, 3, 3)
    assert encoding_of([png((3, 2)), b"\xff\xd8\xff\xe0rest"]) == "jpeg+png"
    with pytest.raises(ValueError, match="no images"):
        decode_images([])
    with pytest.raises(ValueError, match=r"image 1 is \(3, 3, 3\)"):
        decode_images([png((3, 2)), png((3, 3))])
    with pytest.raises(ValueError, match="image 1 .* cannot be decoded"):
        decode_images([png((3, 2)), png((3, 2))[:40]])
