"""TFDS directories: a small one made here, downloads from this machine, and the real CIFAR-10."""

import dataclasses
import hashlib
import io
import json
import os
import socket
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from experiments.data import DataConfig, DatasetMissing, load, prepare, tfds_source
from experiments.data.decode import decode_images

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("CLICKTRAIN_TFDS_DIR") or ROOT.parent / "shared/data/tfds")
needs_cifar10 = pytest.mark.skipif(
    tfds_source.find_prepared("cifar10", SHARED) is None,
    reason=f"no prepared cifar10 in {SHARED}: set CLICKTRAIN_TFDS_DIR",
)


def records(count, seed, keys=(10,)):
    """CIFAR's binary records, uint8 (count, len(keys) + 3072); classes take turns."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = np.stack([np.arange(count) % key for key in keys], 1).astype(np.uint8)
    return np.concatenate([labels, pixels], 1)


CONTENT = {"train": records(100, 0), "test": records(40, 1)}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS directory that holds a cifar10 of 100 + 40 PNG images."""
    directory = tmp_path_factory.mktemp("tfds")
    prepare.write("cifar10", directory, {k: v.tobytes() for k, v in CONTENT.items()})
    return directory


@pytest.fixture
def config(tfds_dir, tmp_path):
    return DataConfig("cifar10", str(tfds_dir), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(prepare, "host_answers", lambda url: False)


def as_set(images, labels):
    """Records as a sorted list of (label, plane bytes): TFDS shuffles what it writes."""
    planes = images.transpose(0, 3, 1, 2)
    return sorted((int(y), x.tobytes()) for x, y in zip(planes, labels, strict=True))


def test_tfds_directory_gives_exactly_what_was_written(config):
    data = load(config)
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.eval_images, data.eval_labels),
    ):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        expected = sorted((int(row[0]), row[1:].tobytes()) for row in CONTENT[split])
        assert as_set(images, labels) == expected
    assert data.encoding == "png" and data.num_classes == 10
    assert data.mean == (0.4914, 0.4822, 0.4465) and "tensorflow" not in sys.modules


def test_validation_is_a_tenth_and_disjoint(config):
    data = load(dataclasses.replace(config, eval_split="validation"))
    assert np.bincount(data.eval_labels).tolist() == [1] * 10
    assert np.bincount(data.train_labels).tolist() == [9] * 10
    train = as_set(data.train_images, data.train_labels)
    held = as_set(data.eval_images, data.eval_labels)
    assert sorted(train + held) == as_set(load(config).train_images, load(config).train_labels)


def test_cifar100_takes_the_fine_label(tmp_path):
    rows = records(200, 2, (20, 100))
    prepare.write("cifar100", tmp_path, {"train": rows.tobytes(), "test": rows[:20].tobytes()})
    data = load(DataConfig("cifar100", str(tmp_path), cache_dir=str(tmp_path / "cache")))
    assert data.num_classes == 100
    expected = sorted((int(row[1]), row[2:].tobytes()) for row in rows)
    assert as_set(data.train_images, data.train_labels) == expected


def test_missing_data_fails_at_once(tmp_path, offline):
    start = time.monotonic()
    with pytest.raises(DatasetMissing, match="cifar10 is not prepared in .*data.dir.*pack"):
        load(DataConfig("cifar10", str(tmp_path / "none")))
    with pytest.raises(DatasetMissing, match="a.npz does not exist"):
        load(DataConfig("cifar10", str(tmp_path / "a.npz")))
    assert time.monotonic() - start < 2
    assert not (tmp_path / "none").exists()


def test_default_directory_comes_from_the_environment(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path / "kept"))
    assert len(load(DataConfig("cifar10")).train_labels) == 100
    assert len(list((tmp_path / "kept").glob("cifar10-*.npz"))) == 1


def test_silent_host_is_given_up_in_time(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:  # Connects, and never says a word.
        start = time.monotonic()
        assert not prepare.host_answers(f"http://127.0.0.1:{server.getsockname()[1]}/", 0.3)
        assert time.monotonic() - start < 2


def test_hanging_name_lookup_is_given_up_in_time(monkeypatch):
    release = threading.Event()

    def hang(*args, **kwargs):
        release.wait(20)
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    assert not prepare.host_answers("http://no-such-host.invalid/", 0.3)
    assert time.monotonic() - start < 2
    release.set()


@pytest.fixture
def served_archive(monkeypatch):
    """cifar10's source, replaced by a small archive on this machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        parts = np.split(CONTENT["train"], 5)
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        for name, rows in zip(names, [*parts, CONTENT["test"]], strict=True):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = rows.nbytes
            tar.addfile(member, io.BytesIO(rows.tobytes()))
    archive = buffer.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(archive)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        source = prepare.SOURCES["cifar10"]
        fields = {**vars(source), "sha256": hashlib.sha256(archive).hexdigest()}
        fields["url"] = f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"
        monkeypatch.setitem(prepare.SOURCES, "cifar10", prepare.Source(**fields))
        yield fields
        server.shutdown()
        thread.join()


def test_download_and_preparation(served_archive, config, tmp_path):
    data = load(DataConfig("cifar10", str(tmp_path / "new"), cache_dir=str(tmp_path / "cache")))
    assert data.fingerprint == load(config).fingerprint  # Writing is deterministic.
    assert tfds_source.find_prepared("cifar10", tmp_path / "new") is not None


def test_wrong_download_is_refused(served_archive, tmp_path, monkeypatch):
    fields = {**served_archive, "sha256": "0" * 64}
    monkeypatch.setitem(prepare.SOURCES, "cifar10", prepare.Source(**fields))
    with pytest.raises(DatasetMissing, match="downloading it from .* failed .*expected 0000"):
        load(DataConfig("cifar10", str(tmp_path / "new"), cache_dir=str(tmp_path)))
    assert not (tmp_path / "new").exists()


def copy_of(folder, directory):
    target = directory / "cifar10" / folder.name
    target.mkdir(parents=True)
    for file in tfds_source.files_of(folder):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_other_file_format_is_refused(tfds_dir, tmp_path):
    folder = copy_of(tfds_dir / "cifar10/3.0.2", tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="'tfrecord' form; expected 'array_record'"):
        load(DataConfig("cifar10", str(tmp_path), cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize("pattern", ["*test*", "features.json"])
def test_damaged_directory_is_refused(tfds_dir, tmp_path, pattern):
    folder = copy_of(tfds_dir / "cifar10/3.0.2", tmp_path)
    (damaged,) = folder.glob(pattern)
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match="prepare cifar10 again in array_record form"):
        load(DataConfig("cifar10", str(tmp_path), cache_dir=str(tmp_path / "cache")))


def test_newest_prepared_version_is_taken(tmp_path):
    for version in ("3.0.2", "3.0.10", "3.1.0.incompleteABC", "4.0.0"):
        (tmp_path / "cifar10" / version).mkdir(parents=True)
        (tmp_path / "cifar10" / version / "dataset_info.json").touch()
        if version != "4.0.0":
            (tmp_path / "cifar10" / version / "features.json").touch()
    assert tfds_source.find_prepared("cifar10", tmp_path).name == "3.0.10"
    assert tfds_source.find_prepared("cifar100", tmp_path) is None


def test_changed_source_is_read_anew(tfds_dir, tmp_path):
    folder = copy_of(tfds_dir / "cifar10/3.0.2", tmp_path)
    config = DataConfig("cifar10", str(tmp_path), cache_dir=str(tmp_path / "cache"))
    load(config)
    os.utime(folder / "features.json", (1, 1))
    load(config)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@needs_cifar10
def test_real_cifar10(tmp_path):
    config = DataConfig("cifar10", str(SHARED), cache_dir=str(tmp_path))
    test = load(config)
    validation = load(dataclasses.replace(config, eval_split="validation"))
    assert test.train_images.shape == (50_000, 32, 32, 3) and len(test.eval_labels) == 10_000
    assert np.bincount(test.train_labels).tolist() == [5000] * 10
    assert np.bincount(validation.train_labels).tolist() == [4500] * 10
    assert np.bincount(validation.eval_labels).tolist() == [500] * 10
    whole = np.concatenate([validation.train_images, validation.eval_images])
    digest = lambda images: sorted(hash(image.tobytes()) for image in images)  # noqa: E731
    assert digest(whole) == digest(test.train_images)
    slim = load(dataclasses.replace(config, train_examples=1000))
    assert np.bincount(slim.train_labels).tolist() == [100] * 10


@needs_cifar10
def test_real_cifar10_decodes_as_tfds_does():
    folder = tfds_source.find_prepared("cifar10", SHARED)
    tfds = prepare.import_tfds()
    source = tfds.builder_from_directory(folder).as_data_source(split="test")
    encoded = tfds_source.read_encoded(folder).splits["test"]
    ours = decode_images(encoded.images[:300])
    for index in range(300):
        record = source[index]
        np.testing.assert_array_equal(ours[index], record["image"])
        assert encoded.labels[index] == record["label"]
