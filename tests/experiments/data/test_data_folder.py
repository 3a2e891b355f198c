"""Folders of images: what they become, and what is wrong with them said by name, nothing written."""

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from experiments.__main__ import main
from experiments.data import DataConfig, DatasetMissing, is_lossy, load, pack, prepare_folder, tfds_source, writing
from experiments.data.decode import decode_image, encoding_of

CLASSES = ("cat", "dog", "Owl 2")


def picture(seed, size=(6, 4), mode="RGB"):
    """Random pixels, width x height."""
    shape = (size[1], size[0]) if mode in ("L", "I;16") else (size[1], size[0], len(mode))
    dtype = np.uint16 if mode == "I;16" else np.uint8
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=dtype))


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    """Three classes, ten train and two test images each, PNG."""
    folder = tmp_path / "images"
    for split, count in (("train", 10), ("test", 2)):
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                picture(100 * (split == "test") + 10 * number + index).save(folder / split / name / f"{index}.png")
    return folder


def loaded(tmp_path, name="own", **options):
    return load(DataConfig(name, str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache"), **options))


def prepare(source, tmp_path, name="own"):
    return prepare_folder(source, name, tmp_path / "tfds")


def as_set(images, labels):
    return sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


def on_disk(part, names):
    return sorted(
        (label, np.asarray(Image.open(file)).tobytes())
        for label, name in enumerate(names)
        for file in (part / name).iterdir()
    )


def test_a_folder_becomes_a_data_set_pixel_for_pixel(source, tmp_path):
    folder, images = prepare(source, tmp_path)
    names = sorted(CLASSES)
    assert folder == tmp_path / "tfds/own/1.0.0" and images.classes == names and images.left_out == []
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["own"]
    data = loaded(tmp_path)
    assert data.train_images.shape == (30, 4, 6, 3) and data.num_classes == 3 and data.encoding == "png"
    assert as_set(data.train_images, data.train_labels) == on_disk(source / "train", names)
    assert as_set(data.eval_images, data.eval_labels) == on_disk(source / "test", names)
    assert "tensorflow" not in sys.modules
    # Without published statistics the train part's own are taken.
    validation = loaded(tmp_path, eval_split="validation")
    np.testing.assert_allclose(data.mean, validation.train_images.mean((0, 1, 2)) / 255, atol=1e-4)


def test_tfds_reads_it_with_names_and_files(source, tmp_path):
    folder, _ = prepare(source, tmp_path)
    reader = writing.import_tfds().builder_from_directory(folder)
    assert reader.info.features["label"].names == sorted(CLASSES)
    record = reader.as_data_source(split="test")[0]
    split, name, file = record["id"].decode().split("/")
    assert split == "test" and sorted(CLASSES)[record["label"]] == name
    np.testing.assert_array_equal(record["image"], np.asarray(Image.open(source / split / name / file)))


def test_same_files_same_data_set_whatever_order_they_were_made_in(source, tmp_path):
    prepare(source, tmp_path)
    again = tmp_path / "again"
    for file in sorted(source.rglob("*.png"), reverse=True):
        (again / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, again / file.relative_to(source))
    prepare(again, tmp_path, "other")
    assert loaded(tmp_path).fingerprint == loaded(tmp_path, "other").fingerprint


def test_numbered_classes_keep_their_numbers(tmp_path):
    names = [str(number) for number in range(11)]
    for split in ("train", "test"):
        for name in names:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.new("L", (3, 3), int(name)).save(tmp_path / "images" / split / name / "one.png")
    _, images = prepare(tmp_path / "images", tmp_path)
    data = loaded(tmp_path, train_examples=11)
    assert images.classes == names and data.train_images.shape == (11, 3, 3, 1)
    assert (data.train_images[:, 0, 0, 0] == data.train_labels).all()


def test_val_serves_where_test_has_no_classes(source, tmp_path):
    shutil.copytree(source / "test", source / "val")
    shutil.rmtree(source / "test/cat")
    with pytest.raises(ValueError, match="cat"):
        prepare(source, tmp_path)
    shutil.rmtree(source / "test")
    (source / "test").mkdir()
    picture(0).save(source / "test/secret.png")
    _, images = prepare(source, tmp_path)
    assert images.left_out == [source / "test"] and len(loaded(tmp_path).eval_labels) == 6


def test_litter_is_passed_over(source, tmp_path):
    for name in (".DS_Store", "Thumbs.db"):
        (source / "train/cat" / name).write_text("litter")
    (source / "train/.cache").mkdir()
    (source / "train/names.txt").write_text("cat dog")
    prepare(source, tmp_path)
    assert len(loaded(tmp_path).train_labels) == 30


def test_an_own_set_is_packed(source, tmp_path):
    prepare(source, tmp_path)
    (path,) = pack(DataConfig("own", str(tmp_path / "tfds")), tmp_path / "own.npz")
    packed = load(DataConfig("own", str(path), cache_dir=str(tmp_path / "cache")))
    assert packed.fingerprint == loaded(tmp_path).fingerprint and packed.encoding == "lossless webp"


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("form", "options", "expected"),
    [
        ("PNG", {}, "png"),
        ("PNG", {"icc_profile": PROFILE}, "png"),
        ("JPEG", {"quality": 100}, "jpeg"),
        ("WEBP", {"lossless": True}, "lossless webp"),
        ("WEBP", {"lossless": True, "icc_profile": PROFILE}, "lossless webp"),
        ("WEBP", {"quality": 100}, "lossy webp"),
        ("WEBP", {"quality": 100, "icc_profile": PROFILE}, "lossy webp"),
        ("BMP", {}, "raw"),
        ("PPM", {}, "raw"),
        ("GIF", {}, "unknown"),
        ("TIFF", {}, "unknown"),
    ],
)
def test_encodings_are_told_from_the_bytes(form, options, expected):
    image = picture(1, (17, 9))
    data = encoded(image, form, **options)
    assert encoding_of([data]) == expected
    assert is_lossy(expected) == is_lossy(f"png+{expected}") == (expected in ("jpeg", "lossy webp", "unknown"))
    if not is_lossy(expected):
        np.testing.assert_array_equal(decode_image(data), np.asarray(image))
    if form == "WEBP" and expected == "lossy webp":
        alpha = encoded(picture(1, (17, 9), "RGBA"), form, **options)
        assert encoding_of([alpha]) == expected
        assert encoding_of([data[:16]]) == encoding_of([b"RIFF" + data[4:8] + b"WAVE" + data[12:]]) == "unknown"


def test_several_encodings_are_all_named(source, tmp_path, capsys):
    (source / "train/cat/0.png").write_bytes(encoded(picture(1), "JPEG"))  # Names of files do not count.
    (source / "test/dog/0.png").write_bytes(encoded(picture(1), "WEBP"))
    arguments = ["prepare-data", "--from", str(source), "--name", "cifar10", "--data.dir", str(tmp_path / "tfds")]
    assert main(arguments) == 0
    assert "jpeg+lossy webp+png is lossy, CIFAR's originals are not" in capsys.readouterr().out
    assert loaded(tmp_path, "cifar10").encoding == "jpeg+lossy webp+png"


def write(data):
    return lambda file: file.write_bytes(data)


def renamed(new):
    return lambda folder: folder.rename(folder.with_name(new))


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


def into_one(part):
    shutil.rmtree(part / "dog")
    shutil.rmtree(part / "Owl 2")


PNG = encoded(picture(3), "PNG")
MISTAKES = {
    "truncated": ("train/cat/3.png", write(PNG[:60]), r"train/cat/3.png \(60 bytes\) cannot be decoded.*replace it"),
    "no bytes": ("train/cat/3.png", write(b""), r"train/cat/3.png \(0 bytes\) is no PNG, JPEG.*move it away"),
    "text": ("train/dog/labels.txt", write(b"a,b"), r"dog/labels.txt \(3 bytes\) is no PNG, JPEG"),
    "GIF": ("test/dog/0.gif", write(encoded(picture(3), "GIF")), "dog/0.gif .* is no PNG.*convert it"),
    "bomb": (
        "train/cat/3.png",
        write(PNG[:16] + b"\x00\x01\x00\x00" * 2 + PNG[24:]),
        "train/cat/3.png .* cannot be decoded",
    ),
    "16 bits": (
        "train/cat/3.png",
        write(encoded(picture(3, mode="I;16"), "PNG")),
        "cat/3.png has pixels of mode 'I;16'.*8 bits",
    ),
    "size": (
        "test/dog/1.png",
        write(encoded(picture(3, (4, 6)), "PNG")),
        "dog/1.png is 4x6 in colour, .*0.png is 6x4 in",
    ),
    "grey": ("test/dog/1.png", write(encoded(picture(3, mode="L"), "PNG")), "dog/1.png is 6x4 grey, .* all grey or"),
    "folder": ("train/cat/more", Path.mkdir, "train/cat/more is no file.*move it"),
    "lost link": ("train/cat/9.png", lambda file: (file.unlink(), file.symlink_to("none")), "cat/9.png is no file"),
    "line break": ("train/cat/a\nb.png", write(PNG), r"cat/a\\nb.png' has a line break.*rename it"),
    "blank": ("train/cat", renamed("cat "), "train/cat ' has .*a blank at its ends"),
    "stray": ("train/stray.png", write(PNG), "train/stray.png is in no class.*move it"),
    "empty class": ("test/dog", emptied, "class dog is empty, .*test/dog holds no images"),
    "train alone": ("test/dog", shutil.rmtree, "train holds classes that .*test does not: dog;"),
    "test alone": ("test/wolf", Path.mkdir, "test holds classes that .*train does not: wolf;"),
    "spelling": ("test/cat", renamed("Cat"), "train holds classes that .*test does not: cat;"),
    "no train": ("train", renamed("training"), "holds test, training, but no train/.*train/CLASS/FILE"),
    "no test": ("test", renamed("testing"), "neither test/ nor val/.*expected train/CLASS/FILE"),
    "flat": ("train", lambda part: [shutil.rmtree(part / name) for name in CLASSES], "train holds no folders"),
    "one class": ("", lambda root: [into_one(root / split) for split in ("train", "test")], "one class, cat; expected"),
    "nothing": ("", shutil.rmtree, "is no folder; expected train/CLASS/FILE"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(mistake, source, tmp_path):
    where, spoil, message = MISTAKES[mistake]
    spoil(source / where)
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path)
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("digits", "embedded"), ("imagenet2012", "memory"), ("../own", "letters"), ("2own", "letter"), ("", "letters")],
)
def test_a_name_that_cannot_be_is_refused(source, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path, name)
    assert not (tmp_path / "tfds").exists()


def test_a_prepared_set_is_not_written_over(source, tmp_path):
    folder, _ = prepare(source, tmp_path)
    before = {file: file.read_bytes() for file in tfds_source.files_of(folder)}
    shutil.rmtree(source / "train/cat")
    with pytest.raises(ValueError, match=r"own/1.0.0 is there already: remove it, or give another"):
        prepare(source, tmp_path)
    assert {file: file.read_bytes() for file in tfds_source.files_of(folder)} == before


def test_stopped_midway_nothing_is_left(source, tmp_path, monkeypatch):
    read, reads = Path.read_bytes, []

    def fail_late(self):
        reads.append(self)
        if len(reads) > 40:  # 36 are checked first; this one is being written.
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", fail_late)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path)
    assert len(reads) == 41 and list((tmp_path / "tfds").iterdir()) == []


def test_the_command(source, tmp_path, capsys, monkeypatch):
    directory = str(tmp_path / "tfds")
    shutil.copytree(source / "test", source / "val")
    arguments = ["prepare-data", "--from", str(source), "--name", "own", "--data.dir", directory]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "own/1.0.0: 30 train, 6 test images of 3 classes, 6x4, colour, png" in out
    assert f"{source}/val is left out" in out and f"--data.name own --data.dir {directory}" in out
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    (source / "test/dog/0.png").write_bytes(PNG[:60])
    assert main(arguments[:-2]) == 2
    assert f"error: {source}/test/dog/0.png" in capsys.readouterr().err and not (tmp_path / "default").exists()


def test_a_set_that_is_not_there_is_said_with_what_to_do(tmp_path):
    with pytest.raises(DatasetMissing, match="'own' is no known data set .*prepare-data --from FOLDER --name own"):
        loaded(tmp_path)
    assert not os.path.exists(tmp_path / "tfds")
