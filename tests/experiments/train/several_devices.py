"""A run's first epochs on 1, 2, 4 and 8 emulated devices: the same masks, nearly the same losses, one program each.

A program of its own, as the number of devices is fixed when jax starts; the counts to try are its arguments.
"""

import collections
import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import tiny

import clicktrain_jax as ct
from experiments.bench.collectives import reduced
from experiments.configs import LoopConfig, PruneConfig, TrainConfig
from experiments.data import DataConfig, load
from experiments.train import loop
from experiments.train.checkpoints import digest
from experiments.train.checkpoints_within import Within
from experiments.train.devices import devices_of
from experiments.train.step import Trainer

# Two updates of 32 images and one of 6 an epoch, which 2 devices divide and 8 do not.
CONFIG = TrainConfig(
    name="several",
    net="small",
    width=0.125,
    data=DataConfig("digits", train_examples=70),
    epochs=3,
    batch_size=32,
    crop_padding=1,
    mixup_epoch=2,
    method=PruneConfig(fractions=(0.5,), coeff=1e-3, select_epoch=1, prune_epoch=2),
)


def run(devices, dataset, ordered=False, epoch_program="steps", compact=False, **fields):
    way = dict(pruned_convolution="pattern", epoch_program=epoch_program, compact_gradients=compact)
    how = LoopConfig(devices=devices, ordered=ordered, progress=False, **way)
    config = dataclasses.replace(CONFIG, loop=how, **fields)
    trainer = Trainer(config, dataset, devices=devices_of(config))
    state, losses = trainer.init(0), []
    for epoch in range(config.epochs):
        state, metrics = trainer.run_epoch(state, epoch, 0)
        losses.append(metrics[:, 0])
    evaluated = trainer.evaluate(state)
    assert trainer.pruned.choice.way == "pattern"
    # One program for each kind of update and size of batch.
    kinds = collections.Counter(key[:3] for key in trainer.programs._futures)
    assert set(kinds.values()) == {1}, kinds
    for leaf in jax.tree.leaves(state):
        parts = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(parts) == devices and all(part.tobytes() == parts[0].tobytes() for part in parts)
    return trainer, jax.device_get(state), np.concatenate(losses), evaluated


def check_scan(counts, dataset):
    """Epochs as compiled loops; the last one is pruned from its first update, and so a loop by pattern."""
    _, one, losses, _ = run(1, dataset, epoch_program="scan", epochs=4)
    for count in counts:
        _, state, found, _ = run(count, dataset, epoch_program="scan", epochs=4)
        same_masks(one, state)
        np.testing.assert_allclose(found, losses, rtol=2e-5)
    print("the same loops on", *counts)


def same_masks(one, two):
    jax.tree.map(np.testing.assert_array_equal, one.opt_state.masks, two.opt_state.masks)


def check_plain(counts, dataset, **fields):
    _, one, losses, evaluated = run(1, dataset, **fields)
    for count in counts:
        trainer, state, found, also = run(count, dataset, **fields)
        same_masks(one, state)
        np.testing.assert_allclose(found, losses, rtol=2e-5)
        np.testing.assert_allclose(also, evaluated, rtol=1e-4)
        program = trainer.programs._futures["gradient", 32, "dense", *trainer._shapes_key({}, None)].result().as_text()
        # Each device convolves its own images.
        assert f"f32[{32 // count},8,8,8]" in program and "f32[32,8,8,8]" not in program
    print("the same run on", *counts)


def check_whole_batches(counts, dataset):
    """Without mixtures, whose sampler takes longer to compile than the net."""
    check_plain(counts, dataset, partial_batch="drop", mixup_epoch=None)


def check_ordered(counts, dataset):
    """As many shards as the last count, summed in their order: the same bits, also where a run changes devices."""
    runs = [run(count, dataset, shards=counts[-1], ordered=True)[1:] for count in (1, *counts)]
    for other in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, runs[0][:2], other[:2])
        # Evaluated in batches that the devices divide: sums of other numbers of images.
        np.testing.assert_allclose(other[2], runs[0][2], rtol=1e-6)
    print("the same bits on 1", *counts)
    with tempfile.TemporaryDirectory() as folder:
        # An epoch each, from the other's checkpoint.
        for count in (counts[-1], counts[-1] // 4 or 1, counts[-1]):
            fields = {"devices": count, "ordered": True, "pruned_convolution": "pattern", "progress": False}
            config = dataclasses.replace(CONFIG, shards=counts[-1], loop=LoopConfig(**fields))
            summary = loop.train(config, Path(folder) / "run", dataset=dataset, on_epoch=lambda line: True)
    assert summary["params_sha256"] == digest(runs[0][0].params)
    print("the same bits where the devices change")


def check_streamed(counts, dataset):
    """The same digits as files, decoded while they are trained on."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.as_files(Path(folder), dataset, 30)
        # The last batch of 12 is divided over 2 and 4 devices, and lies whole on each of 8.
        fields = {"data": DataConfig("own", folder, image_size=8)}
        files = load(fields["data"])
        _, one, losses, evaluated = run(1, files, **fields)
        for count in counts:
            _, state, found, also = run(count, files, **fields)
            same_masks(one, state)
            np.testing.assert_allclose(found, losses, rtol=2e-5)
            np.testing.assert_allclose(also, evaluated, rtol=1e-4)
    print("the same stream on", *counts)


def check_compact(counts, dataset):
    """From the prune on the devices send each other less, for the same bits; by steps, in loops, in parts."""

    def sent(trainer):
        """Bytes of an update's all-reduces, by program."""
        programs = {key: future.result() for key, future in trainer.programs._futures.items()}
        return {reduced(one.as_text())[0] for key, one in programs.items() if key[:3] == ("gradient", 32, "pattern")}

    few, many = counts
    for count, fields in ((many, {}), (few, {"accumulate": 2}), (few, {"epoch_program": "scan"})):
        # What chance decides of images is decided before gradients.
        fields |= {"shards": count, "epochs": 4, "partial_batch": "drop", "crop_padding": 0, "mixup_epoch": None}
        whole, *one = run(count, dataset, **fields)
        compact, *other = run(count, dataset, compact=True, **fields)
        jax.tree.map(np.testing.assert_array_equal, one, other)
        if not compact.scan:
            state = one[0]
            bytes = ct.reduction.num_bytes(
                state.params, ct.reduction.retained(state.params, ct.masks_of(state.opt_state))
            )
            ((dense,), less) = sent(whole), sent(compact)
            # With accumulate the parts are written out, each with its sum.
            assert less == {dense - fields.get("accumulate", 1) * (bytes.dense - bytes.compact)}
            assert bytes.pruned_compact < bytes.pruned_dense / 3
    print("the same bits by compact gradients on", *counts)


def check_within(counts, dataset):
    """A streamed run that is stopped after the second of three updates of each epoch, and goes on on other devices."""

    class Stopped(Exception):
        pass

    def save(self, *args):
        original(self, *args)
        raise Stopped

    def train(name, count, **fields):
        how = dict(devices=count, ordered=True, pruned_convolution="pattern", progress=False)
        config = dataclasses.replace(CONFIG, shards=counts[-1], data=data, loop=LoopConfig(**how, **fields))
        return loop.train(config, Path(folder) / name, dataset=files)

    original, Within.save = Within.save, save
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig("own", str(tiny.as_files(Path(folder) / "files", dataset, 30)), image_size=8)
        files = load(data)
        whole, stops = train("whole", 1), 0
        for count in itertools.cycle((1, *counts)):
            try:
                summary = train("stopped", count, checkpoint_every_steps=2)
                break
            except Stopped:
                stops += 1
    assert stops == CONFIG.epochs
    assert all(summary[key] == whole[key] for key in ("params_sha256", "masks_sha256"))
    print("the same bits within epochs on 1", *counts)


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    check = globals()[f"check_{what}"]
    check([int(number) for number in numbers], load(CONFIG.data))
