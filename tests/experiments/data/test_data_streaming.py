"""Streamed sets: what is in a batch follows from seed, epoch and place alone; what is wrong is said by name."""

import dataclasses
import io
import shutil
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from experiments.__main__ import main
from experiments.bench.photos import photo, write_photos
from experiments.data import DataConfig, DatasetMissing, Share, StreamedDataset, load, prepare_folder, writing
from experiments.data.crops import centre_box, random_box, resized_crop
from experiments.data.streaming import READY_BATCHES

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of real-sized photographs, five to train on and two to evaluate on each."""
    return write_photos(tmp_path_factory.mktemp("photos"), classes=3, train=5, test=2)


def config(folder, **changes):
    return DataConfig("own", str(folder), image_size=SIZE, **changes)


def epoch(data, batch=4, seed=0, epoch=0, order=None, **options):
    order = np.random.default_rng([seed, epoch]).permutation(data.train_examples) if order is None else order
    full, tail = divmod(len(order), batch)
    sizes = [batch] * full + [tail] * bool(tail)
    return list(data.train_batches(order, sizes, seed=seed, epoch=epoch, **options))


def same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_an_epoch_has_every_image_once_with_its_label(folder):
    data = load(config(folder))
    assert isinstance(data, StreamedDataset) and (data.train_examples, data.eval_examples) == (15, 6)
    assert data.image_shape == (SIZE, SIZE, 3) and data.num_classes == 3 and data.encoding == "jpeg"
    batches = epoch(data, order=np.arange(15)[::-1])
    assert [images.shape for images, _ in batches] == [(4, SIZE, SIZE, 3)] * 3 + [(3, SIZE, SIZE, 3)]
    assert all(images.dtype == np.uint8 and labels.dtype == np.int32 for images, labels in batches)
    assert np.concatenate([labels for _, labels in batches]).tolist() == [2] * 5 + [1] * 5 + [0] * 5
    assert np.concatenate([labels for _, labels in data.eval_batches(4)]).tolist() == [0, 0, 1, 1, 2, 2]


def test_batches_follow_from_seed_epoch_and_place_alone(folder):
    data = load(config(folder))
    whole = epoch(data)
    same(whole, epoch(load(config(folder)), threads=1))
    same(whole, epoch(data, threads=5))
    order = np.random.default_rng([0, 0]).permutation(15)
    for other in (epoch(data, seed=1, order=order), epoch(data, epoch=1, order=order)):
        assert [labels.tolist() for _, labels in other] == [labels.tolist() for _, labels in whole]
        assert any((images != before).any() for (images, _), (before, _) in zip(other, whole))


def test_a_stopped_epoch_goes_on_where_it_stopped(folder):
    data = load(config(folder))
    whole = epoch(data)
    for done in range(5):
        same(whole[done:], epoch(data, done=done))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_batches(folder, count):
    data = load(config(folder))
    whole = epoch(data, order=np.arange(12))
    shares = [epoch(data, order=np.arange(12), share=Share(index, count)) for index in range(count)]
    for number, (images, labels) in enumerate(whole):
        np.testing.assert_array_equal(images, np.concatenate([share[number][0] for share in shares]))
        np.testing.assert_array_equal(labels, np.concatenate([share[number][1] for share in shares]))


def test_a_batch_that_devices_cannot_divide_is_read_whole(folder):
    """Four devices of two processes: batches of 12 are divided, a last one of 3 lies whole on each device."""
    data = load(config(folder))
    whole, sizes = epoch(data, batch=12, order=np.arange(15)), []

    def put(batch, size):
        sizes.append(size)
        return batch

    for index in range(2):
        first, last = epoch(data, batch=12, order=np.arange(15), share=Share(index, 2, 4), put=put)
        np.testing.assert_array_equal(first[0], whole[0][0][6 * index : 6 * index + 6])
        np.testing.assert_array_equal(last[0], whole[1][0])
    assert sizes == [12, 3] * 2
    (six,) = data.eval_batches(6, share=Share(1, 2, 4))
    assert len(six[1]) == 6


def test_evaluation_crops_do_not_change(folder):
    data = load(config(folder))
    batches = list(data.eval_batches(4, threads=1))
    same(batches, list(data.eval_batches(4)))
    # Pillow's own resize of the shorter side to 256, and the middle 224 of it.
    data = photo(5, (640, 512))
    resized = np.asarray(Image.open(io.BytesIO(data)).resize((320, 256), Image.Resampling.BILINEAR), int)
    found = resized_crop(data, 224, centre_box, draft=False)
    assert np.abs(found - resized[16:-16, 48:-48])[1:-1, 1:-1].max() <= 1


def test_random_boxes_are_inside_and_as_asked():
    random = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(400):
        left, top, right, bottom = random_box(random, 500, 375, 0.25)
        assert 0 <= left < right <= 500 and 0 <= top < bottom <= 375
        areas.append((right - left) * (bottom - top) / (500 * 375))
        aspects.append((right - left) / (bottom - top))
    assert 0.24 < min(areas) < 0.3 and 0.9 < max(areas) <= 1
    assert 0.74 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.35
    # Nothing of the area fits into a strip: its middle, as wide as the aspect allows.
    assert random_box(random, 1000, 10, 1.0) == pytest.approx((500 - 20 / 3, 0, 500 + 20 / 3, 10))
    assert centre_box(256, 512) == (16, 144, 240, 368)


def test_a_draft_shows_the_same_part():
    data = photo(3, (1600, 1200))
    box = (200, 100, 1400, 1100)
    exact, draft = (resized_crop(data, 100, lambda *_: box, draft=draft).astype(int) for draft in (False, True))
    assert (exact != draft).any() and np.abs(exact - draft).mean() < 3
    shifted = resized_crop(data, 100, lambda *_: (240, 100, 1440, 1100), draft=False).astype(int)
    assert np.abs(exact - shifted).mean() > 5


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_become_colour(mode, draft):
    found = resized_crop(photo(1, mode=mode), 24, centre_box, draft=draft).astype(int)
    assert found.shape == (24, 24, 3)
    expected = resized_crop(photo(1), 24, centre_box, draft=False)
    if mode == "L":
        assert (found == found[..., :1]).all()
        expected = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
    assert np.abs(found - expected).mean() < 12


def test_other_forms_are_read_too():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8))
    for image, form in ((picture, "PNG"), (picture.convert("P"), "PNG"), (picture, "WEBP")):
        file = io.BytesIO()
        image.save(file, form)
        assert resized_crop(file.getvalue(), 16, centre_box, draft=True).shape == (16, 16, 3)


@pytest.mark.parametrize("size", [(500, 375), (2300, 2000)])  # the larger one Pillow has in pieces
def test_without_the_native_library_the_same_part_is_shown(size, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1] // 50, size[0] // 50, 3), np.uint8)).resize(
        size
    ).save(file, "PNG")
    box = random_box(np.random.default_rng(1), *size, 0.08)
    found = resized_crop(file.getvalue(), 224, lambda *_: box, draft=True).astype(int)
    monkeypatch.setenv("CLICKTRAIN_NATIVE", "0")
    assert np.abs(resized_crop(file.getvalue(), 224, lambda *_: box, draft=True) - found).max() <= 1


def test_parts_are_fixed_and_disjoint(folder):
    data = load(config(folder, eval_split="validation"))
    assert (data.train_examples, data.eval_examples) == (14, 1) and data.evaluation is data.train
    assert sorted([*data.train_indices, *data.eval_indices]) == list(range(15))
    some = load(config(folder, train_examples=6))
    assert np.bincount(some.train.labels[some.train_indices]).tolist() == [2, 2, 2]
    prints = {load(config(folder, **c)).fingerprint for c in ({}, {"train_examples": 6}, {"eval_split": "validation"})}
    assert len(prints) == 3


def test_the_fingerprint_is_of_names_wherever_they_lie(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    moved = load(config(tmp_path))  # below the set's name
    assert moved.fingerprint == load(config(folder)).fingerprint
    (tmp_path / "own/train/class0/00000.JPEG").rename(tmp_path / "own/train/class0/new.JPEG")
    assert load(config(tmp_path)).fingerprint != moved.fingerprint


def test_no_more_is_held_than_what_is_ready(folder):
    """However slow the reader: what was put and not yet taken is bounded, so memory is flat over an epoch."""
    data = load(config(folder))
    made = threading.Semaphore(0)
    count = 0

    def put(batch, size):
        nonlocal count
        count += 1
        made.release()
        return batch

    batches = data.train_batches(np.arange(15), [1] * 15, seed=0, epoch=0, put=put)
    for taken in range(1, 8):
        next(batches)
        for _ in range(READY_BATCHES):  # the threads go on as far as they may
            made.acquire(timeout=0.3)
        # One more is in the hand of the thread that waits to put it down.
        assert count <= taken + READY_BATCHES + 1
    batches.close()


def test_closing_ends_the_threads(folder):
    before = set(threading.enumerate())
    batches = load(config(folder)).train_batches(np.arange(15), [2] * 7, seed=0, epoch=0)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert not set(threading.enumerate()) - before


@pytest.fixture
def tfds_dir(tmp_path):
    def write(name="own", splits=("train", "test"), labels=2, count=6):
        def examples(split):
            for index in range(count):
                yield (
                    f"{split}{index}",
                    {"id": f"{split}/{index}.JPEG", "image": photo(index, (60, 40 + index)), "label": index % labels},
                )

        writing.write_tfds(
            name,
            "1.0.0",
            tmp_path,
            {split: lambda split=split: examples(split) for split in splits},
            image_shape=(None, None, 3),
            encoding="jpeg",
            labels={"label": labels},
            description="made by a test",
        )
        return tmp_path

    return write


def test_a_tfds_directory_streams_images_of_any_size(tfds_dir):
    data = load(config(tfds_dir()))
    assert (data.train_examples, data.eval_examples, data.num_classes) == (6, 6, 2)
    batches = epoch(data)
    same(batches, epoch(data, threads=1))
    assert sorted(np.concatenate([labels for _, labels in batches])) == [0, 0, 0, 1, 1, 1]
    found = {data.train.name_of(index).rsplit(" ", 1)[1]: data.train[index] for index in range(6)}
    for index in range(6):
        assert found[f"(train/{index}.JPEG)"] == (photo(index, (60, 40 + index)), index % 2)
    assert "tensorflow" not in sys.modules
    more = dataclasses.replace(
        config(tfds_dir("more", count=10), eval_split="validation", train_examples=8), name="more"
    )
    assert (load(more).train_examples, load(more).eval_examples) == (8, 1)


def test_imagenet_is_evaluated_on_its_validation_split(tfds_dir):
    directory = tfds_dir("imagenet2012", splits=("train", "validation", "test"))
    data = load(dataclasses.replace(config(directory), name="imagenet2012"))
    assert "validation of" in data.evaluation.name_of(0)
    directory = tfds_dir("other", splits=("train", "validation"))
    assert "validation of" in load(dataclasses.replace(config(directory), name="other")).evaluation.name_of(0)


def test_missing_splits_and_sets_are_named(tfds_dir, tmp_path):
    with pytest.raises(ValueError, match=r"own/1.0.0 has the splits \['train'\]; expected 'train' and 'test' or 'val"):
        load(config(tfds_dir(splits=("train",))))
    with pytest.raises(DatasetMissing, match="no images of own in .*none.*data.dir"):
        load(config(tmp_path / "none"))
    (tmp_path / "half/train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"half holds train/, but neither test/ nor val/"):
        load(config(tmp_path / "half"))


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "photos")


def test_an_empty_class_is_named(folder, tmp_path):
    broken = copied(folder, tmp_path)
    for file in (broken / "train/class1").iterdir():
        file.unlink()
    (broken / "train/class1/.hidden").write_text("")
    with pytest.raises(ValueError, match="class class1 is empty, .*train/class1 holds no images"):
        load(config(broken))


@pytest.mark.parametrize("kept", [0, 40, 20_000])
def test_a_corrupt_image_is_named(folder, tmp_path, kept):
    broken = copied(folder, tmp_path)
    file = broken / "train/class1/00003.JPEG"
    file.write_bytes(file.read_bytes()[:kept])
    data = load(config(broken))
    with pytest.raises(ValueError, match=rf"train/class1/00003.JPEG \({kept} bytes\) cannot be decoded.*replace it"):
        epoch(data)
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read .*class1/00003.JPEG"):
        epoch(data)


def test_a_label_of_no_class_is_named(folder):
    data = load(config(folder))
    wrong = dataclasses.replace(data, num_classes=2)
    with pytest.raises(ValueError, match=r"val/class2/00000.JPEG has the label 2; expected 0..1"):
        list(wrong.eval_batches(6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size=0; expected at least 1"),
        ({"least_crop_area": 0.0}, "least_crop_area=0.0; expected a share above 0"),
        ({"name": "digits", "dir": None}, "image_size=32, but name='digits' is embedded"),
        ({"train_examples": 16}, "train_examples=16, but the train part has 15"),
    ],
)
def test_bad_fields_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load(dataclasses.replace(config(folder), **changes))


def test_bad_shares_are_refused(folder):
    data = load(config(folder))
    with pytest.raises(ValueError, match="process 2 of 2: expected 0 to 1"):
        Share(2, 2)
    with pytest.raises(ValueError, match="3 devices of 2 processes: expected as many of each"):
        Share(0, 2, 3)
    with pytest.raises(ValueError, match="batches of 16 images, but the order has 15"):
        data.train_batches(np.arange(15), [16], seed=0, epoch=0)


def test_a_folder_of_any_sizes_is_prepared_to_be_streamed(folder, tmp_path, capsys):
    mixed = copied(folder, tmp_path)
    (mixed / "train/class0/00000.JPEG").write_bytes(photo(7, (60, 90)))
    arguments = ["prepare-data", "--from", str(mixed), "--name", "own", "--data.dir", str(tmp_path / "tfds")]
    assert main(arguments) == 2 and "prepare them with --any-size and stream them" in capsys.readouterr().err
    assert main([*arguments, "--any-size"]) == 0
    out = capsys.readouterr().out
    assert "15 train, 6 test images of 3 classes, of any size, jpeg" in out and out.endswith("--data.image-size 224\n")
    data = load(config(tmp_path / "tfds"))
    assert (data.train_examples, data.eval_examples, data.num_classes) == (15, 6, 3)
    prepare_folder(mixed, "imagenet2012", tmp_path / "tfds", any_size=True)
    assert load(dataclasses.replace(config(tmp_path / "tfds"), name="imagenet2012")).eval_examples == 6
    found = sorted(data.train[index] for index in range(15))
    plain = load(config(mixed)).train
    assert found == sorted(plain[index] for index in range(15))
    with pytest.raises(ValueError, match="give image_size to stream them"):
        load(DataConfig("own", str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache")))
    (mixed / "train/class0/words.JPEG").write_text("no image")
    with pytest.raises(ValueError, match=r"words.JPEG \(8 bytes\) is no PNG, JPEG"):
        prepare_folder(mixed, "other", tmp_path / "tfds", any_size=True)
