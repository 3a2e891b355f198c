"""Streamed sets in the training loop: the same run as with the set in memory, whole or interrupted."""

import dataclasses
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from experiments import configs
from experiments.bench.photos import write_photos
from experiments.configs.work import stretched
from experiments.data import DataConfig, Dataset, load
from experiments.records import read_metrics
from experiments.studies import export
from experiments.train import loop
from experiments.train.checkpoints_within import Within
from experiments.train.devices import Devices
from experiments.train.feed import Feed
from experiments.train.state import TrainState
from experiments.train.step import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_dataset):
    """The tiny run's digits in colour, as a folder of PNG files."""
    return tiny.as_files(tmp_path_factory.mktemp("digits"), tiny_dataset, 64)


@pytest.fixture(scope="module")
def config(folder):
    # A crop of all of a square image at its own size is the image.
    data = DataConfig("own", str(folder), image_size=8, least_crop_area=1.0)
    return tiny.changed(name="streamed", data=data)


@pytest.fixture(scope="module")
def streamed(config):
    return load(config.data)


@pytest.fixture(scope="module")
def trainer(config, streamed):
    return Trainer(config, streamed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config, trainer):
    folder = tmp_path_factory.mktemp("streamed") / "run"
    return folder, loop.train(config, folder, trainer=trainer)


def in_memory(streamed):
    def whole(images, indices):
        pairs = [images[index] for index in indices]
        pixels = [np.asarray(Image.open(images.name_of(index))) for index in indices]
        return np.stack(pixels), np.asarray([label for _, label in pairs], np.int32)

    facts = {name: getattr(streamed, name) for name in ("num_classes", "mean", "std", "eval_split", "encoding")}
    train = whole(streamed.train, streamed.train_indices)
    # What is evaluated on is cropped in the same way.
    images, labels = zip(*streamed.eval_batches(64))
    return Dataset("own", *train, np.concatenate(images), np.concatenate(labels), **facts, fingerprint="in memory")


def test_a_streamed_run_is_that_of_the_set_in_memory_bit_by_bit(finished, config, streamed, tmp_path):
    folder, summary = finished
    other = loop.train(config, tmp_path / "run", dataset=in_memory(streamed))
    assert summary["params_sha256"] == other["params_sha256"] and summary["masks_sha256"] == other["masks_sha256"]
    for line, same in zip(read_metrics(folder), read_metrics(tmp_path / "run"), strict=True):
        for key in ("phases", "train_loss", "train_top1", "eval_top1", "training_multiply_adds"):
            assert line[key] == same[key], key
        assert line["eval_loss"] == pytest.approx(same["eval_loss"], rel=1e-6)
    assert (summary["train_examples"], summary["eval_examples"]) == (140, 64)


class Recorded:
    """A source that notes what is read of it."""

    def __init__(self, images):
        self.images, self.read = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        return self.images[index]

    def name_of(self, index):
        return self.images.name_of(index)


def test_an_epoch_reads_every_image_once(trainer, config, streamed, monkeypatch):
    recorded = Recorded(streamed.train)
    monkeypatch.setattr(trainer, "dataset", dataclasses.replace(streamed, train=recorded))
    state = trainer.init(0)
    for epoch in range(2):
        recorded.read.clear()
        state, _ = trainer.run_epoch(state, epoch, 0)
        assert sorted(recorded.read) == list(range(140))


def test_an_interrupted_run_goes_on_to_the_same_end(finished, config, trainer, tmp_path):
    """Stopped in the midst of an epoch: what it did of it is done again from the epoch's begin, all else once."""

    class Stops(Trainer):
        def _run_segment(self, *args):
            *rest, on_step = args

            def step(count):
                self.left -= 1
                if not self.left:
                    signal.raise_signal(signal.SIGTERM)
                on_step(count)

            return super()._run_segment(*rest, step)

    stops = Stops(config, trainer.dataset)
    stops.programs = trainer.programs
    for stops.left in (7, 13):
        with pytest.raises(loop.Interrupted):
            loop.train(config, tmp_path / "run", trainer=stops)
        left = [thread for thread in threading.enumerate() if thread.name.startswith("grain")]
        for thread in left:
            thread.join(10)
        assert not any(thread.is_alive() for thread in left)
    assert len(read_metrics(tmp_path / "run")) == 3
    again = loop.train(config, tmp_path / "run", trainer=trainer)
    assert again["params_sha256"] == finished[1]["params_sha256"]
    assert again["masks_sha256"] == finished[1]["masks_sha256"]


def test_a_run_saved_within_epochs_goes_on_from_there_with_the_same_bits(finished, config, trainer, tmp_path):
    """Stopped in each phase; what follows reads the images that are left alone, and the lines are those of one run."""
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, checkpoint_every_steps=2))
    recorded = Recorded(trainer.dataset.train)
    other = Trainer(config, dataclasses.replace(trainer.dataset, train=recorded))
    other.programs = trainer.programs
    original, read = other._run_segment, []

    def stops(*args):
        def step(count):
            if other.left == 1:
                signal.raise_signal(signal.SIGTERM)
            other.left -= 1
            args[-1](count)

        return original(*args[:-1], step)

    other._run_segment = stops
    # Updates 4 of epoch 0, then, each from a save, 3 of epoch 1 (its selection is the first), and 4 of 3 (its prune).
    for other.left in (4, 6, 12):
        with pytest.raises(loop.Interrupted):
            loop.train(config, tmp_path / "run", trainer=other)
    assert [path.name for path in (tmp_path / "run/within").iterdir()] == ["17"]
    other.left, recorded.read = 0, read
    again = loop.train(config, tmp_path / "run", trainer=other)
    # Two batches of epoch 3 were done, and all of epochs 0 to 2.
    assert len(read) == (140 - 2 * 32) + 140
    assert again["params_sha256"] == finished[1]["params_sha256"]
    assert again["masks_sha256"] == finished[1]["masks_sha256"]
    for line, same in zip(read_metrics(tmp_path / "run"), read_metrics(finished[0]), strict=True):
        assert line.keys() == same.keys()
        for key in line.keys() - {"convolution"}:  # the one was measured, the other is known by then
            assert key.endswith("_seconds") or line[key] == same[key], key
    assert not list((tmp_path / "run/within").iterdir())


def test_a_checkpoint_within_an_epoch_that_is_of_no_use_is_left(tmp_path):
    within, metrics = Within(tmp_path / "within"), np.zeros((5, 2), np.float32)
    state = TrainState(np.int32(7), {"kernel": np.ones(2000, np.float32)}, {}, ())
    within.save(state, metrics, {"line": {"epoch": 1}})
    number, (found, _), facts = within.newest(5, lambda facts: (state, metrics))
    assert (number, int(found.step), facts) == (7, 7, {"line": {"epoch": 1}})
    assert within.newest(7, lambda facts: (state, metrics)) is None
    for path in (tmp_path / "within/7/state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="number 7: .*: the run goes on from the epoch's begin"):
        assert within.newest(5, lambda facts: (state, metrics)) is None
    # What comes before the broken one is saved again.
    within.save(state._replace(step=np.int32(6)), metrics, {"line": {"epoch": 1}})
    assert within.newest(5, lambda facts: (state, metrics))[0] == 6
    within.clear()
    assert not list((tmp_path / "within").iterdir())


def test_a_finished_run_is_evaluated_and_exported(finished, tmp_path):
    folder, summary = finished
    found = export.restore(folder)
    assert found.trainer.evaluate(found.state)[1] == summary["final_top1"]
    manifest = export.export_run(folder, tmp_path / "export", is_timed=False, stablehlo=False)
    assert manifest["facts"]["accuracy"]["top1"] == summary["final_top1"]


def test_other_images_are_other_runs(finished, config, folder):
    extra = folder / "train/0/more.png"
    Image.new("RGB", (8, 8)).save(extra)
    try:
        with pytest.raises(ValueError, match="was trained on other images"):
            loop.train(config, finished[0])
    finally:
        extra.unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 141}, "batch_size=141, but own has 140 training images: lower"),
        ({"loop": dataclasses.replace(tiny.CONFIG.loop, epoch_program="scan")}, "streamed: use 'steps'"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(config, streamed, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(dataclasses.replace(config, **changes), streamed)


def test_a_broken_image_stops_the_run_by_name(config, streamed, trainer, folder, monkeypatch, tmp_path):
    class Broken(Recorded):
        def __getitem__(self, index):
            data, label = super().__getitem__(index)
            return data[: 20 if index == 77 else None], label

    monkeypatch.setattr(trainer, "dataset", dataclasses.replace(streamed, train=Broken(streamed.train)))
    with pytest.raises(ValueError, match=rf"{streamed.train.name_of(77)} \(20 bytes\) cannot be decoded"):
        loop.train(config, tmp_path / "run", trainer=trainer)


def test_the_host_is_two_updates_ahead_of_the_device_at_most(monkeypatch):
    """Each update under way holds a batch: as many as a slow device leaves undone would fill it."""
    waited_for = []
    monkeypatch.setattr(jax, "block_until_ready", lambda step: waited_for.append(int(step)))
    dataset = types.SimpleNamespace(train_batches=lambda *_, **__: iter("abcde"))
    trainer = types.SimpleNamespace(
        config=tiny.CONFIG,
        dataset=dataset,
        devices=Devices(),
        steps_per_epoch=5,
        by_batch_size=lambda first, end: [(first, end, 4)],
    )
    taking = Feed(trainer, np.arange(20), 0, 0)
    assert [taking.take(jnp.int32(done)) for done in range(5)] == list("abcde")
    assert waited_for == [0, 1, 2]


def test_threads_must_be_some():
    with pytest.raises(ValueError, match="loop.input_threads=0: expected at least 1"):
        dataclasses.replace(tiny.CONFIG.loop, input_threads=0)


@pytest.mark.slow
def test_the_imagenet_recipe_in_small(tmp_path):
    """Photographs of ImageNet's size through all phases of ResNet-50, an eighth as wide on crops of 64 pixels."""
    config = stretched(configs.get("resnet50-imagenet2012-1024-2.3x"), 6)
    data = dataclasses.replace(config.data, dir=str(write_photos(tmp_path / "photos")), image_size=64)
    config = dataclasses.replace(
        config, data=data, width=0.125, batch_size=4, learning_rate=0.01, warmup_epochs=1, loop=tiny.CONFIG.loop
    )
    summary = loop.train(config, tmp_path / "run")
    assert (summary["train_examples"], summary["eval_examples"]) == (16, 8)
    phases = [line["phases"] for line in read_metrics(tmp_path / "run")]
    assert phases[0] == ["dense"] and ["select", "regularize"] in phases and "pruned" in phases[-1]
    assert summary["conv_compression"] == pytest.approx(2.3, abs=0.15)
