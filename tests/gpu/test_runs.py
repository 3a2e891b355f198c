"""Runs on a GPU: the two programs of an epoch, equal bits, resuming. Bits are equal with deterministic programs alone:
`make test-gpu` asks XLA for them."""

import dataclasses

import numpy as np
import pytest

from experiments import configs
from experiments.data import Dataset
from experiments.train.loop import train
from experiments.train.step import Trainer


@pytest.fixture(scope="module")
def config(small):
    """All phases in five epochs of the small net, scores of several updates and a second selection among them."""
    config = configs.get("digits-clicktrain")
    method = dataclasses.replace(
        config.method, select_epoch=1, reselect_epoch=2, prune_epoch=3, importance_steps=3, patterns="coverage"
    )
    return dataclasses.replace(
        config,
        epochs=5,
        width=0.125 if small else 1.0,
        batch_size=32,
        mixup_epoch=4,
        method=method,
        loop=dataclasses.replace(config.loop, progress=False, checkpoint_every_epochs=1),
    )


@pytest.fixture(scope="module")
def images(small):
    rng = np.random.default_rng(0)
    count = 100 if small else 1000
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    held_out = images[:500], labels[:500]
    return Dataset("random", images, labels, *held_out, 10, (0.5,) * 3, (0.25,) * 3, "test", "raw", f"random{count}")


def _trainer(config, images, program):
    return Trainer(dataclasses.replace(config, loop=dataclasses.replace(config.loop, epoch_program=program)), images)


@pytest.fixture(scope="module")
def one_loop(config, images):
    return _trainer(config, images, "scan")


def test_one_compiled_loop_an_epoch_trains_as_one_call_an_update_and_equal_seeds_give_equal_bits(
    config, images, one_loop, tmp_path
):
    ends, digests = {}, []
    for program, runs, trainer in (("scan", 2, one_loop), ("steps", 1, _trainer(config, images, "steps"))):
        asked = trainer.config
        for run in range(runs):
            summary = train(asked, tmp_path / f"{program}{run}", trainer=trainer)
            digests.append(summary["params_sha256"])
            ends[program] = summary["final_loss"]
    assert digests[0] == digests[1]
    # The two programs may sum in other orders; 5 epochs let that grow.
    np.testing.assert_allclose(ends["scan"], ends["steps"], rtol=0.05)


def test_a_run_that_is_resumed_ends_with_the_bits_of_one_that_was_not_stopped(
    config, images, one_loop, small, tmp_path
):
    # On a GPU programs of their own: a compiler that tunes could choose differently.
    config, programs = (one_loop.config, {"trainer": one_loop}) if small else (config, {"dataset": images})
    train(config, tmp_path / "stopped", **programs, on_epoch=lambda told: told["epoch"] == 2)
    resumed = train(config, tmp_path / "stopped", **programs)
    whole = train(config, tmp_path / "whole", **programs)
    assert resumed["params_sha256"] == whole["params_sha256"]
