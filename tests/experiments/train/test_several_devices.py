"""A batch divided over devices: the run of one device."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny

from experiments.train.devices import devices_of

HERE = pathlib.Path(__file__).parent


def emulated(script, *arguments, devices=8):
    """What a script says on so many devices: a process of its own, as jax fixes their number when it starts."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = f"{HERE.parents[2]}{os.pathsep}{HERE.parent}"
    settings = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    if "whole_batches" not in arguments:  # one run is compiled as users' are, on the newest jax
        settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # else what is fused, and so rounded, differs by program
    command = [sys.executable, "-W", "error", str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_two_devices_train_as_one():
    assert "the same run on 2\n" in emulated("several_devices.py", "whole_batches", 2, devices=2)


@pytest.mark.slow
def test_two_and_eight_devices_train_as_one():
    # Two divide the last batch of an epoch; eight cannot: it lies whole on each.
    assert "the same run on 2 8\n" in emulated("several_devices.py", "plain", 2, 8)


@pytest.mark.slow
def test_a_divided_stream_trains_as_on_one_device():
    # Eight cannot divide that of an evaluation either.
    assert "the same stream on 2 8\n" in emulated("several_devices.py", "streamed", 2, 8)


@pytest.mark.slow
def test_compiled_loops_on_two_devices_train_as_on_one():
    assert "the same loops on 2\n" in emulated("several_devices.py", "scan", 2, devices=2)


@pytest.mark.slow
def test_shards_summed_in_their_order_give_equal_bits_on_any_number_of_devices():
    said = emulated("several_devices.py", "ordered", 2, 8)
    assert "the same bits on 1 2 8\n" in said
    assert "the same bits where the devices change\n" in said


@pytest.mark.slow
def test_compact_gradients_give_the_same_bits_for_fewer_bytes():
    assert "the same bits by compact gradients on 2 4\n" in emulated("several_devices.py", "compact", 2, 4, devices=4)


@pytest.mark.parametrize("fields", [dict(shards=1), dict(shards=2, method=None)])
def test_compact_gradients_without_what_they_need_are_refused(fields):
    how = dataclasses.replace(tiny.CONFIG.loop, compact_gradients=True)
    with pytest.raises(ValueError, match="loop.compact_gradients with shards=., .* expected shards"):
        tiny.changed(loop=how, **fields)


@pytest.mark.slow
def test_a_stream_stopped_within_epochs_goes_on_with_the_same_bits_on_other_devices():
    assert "the same bits within epochs on 1 2\n" in emulated("several_devices.py", "within", 2, devices=2)


@pytest.mark.parametrize(
    ("fields", "devices", "message"),
    [
        (dict(batch_size=30), 4, "batch_size=30 cannot be divided over 4 devices: choose .* --loop.devices 3"),
        (dict(batch_size=24, accumulate=4), 4, "batch_size / accumulate=6 cannot be divided over 4 devices"),
        (dict(shards=2), 4, "shards=2 cannot be divided over 4 devices: choose .* --loop.devices 2"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(fields, devices, message, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * devices)
    with pytest.raises(ValueError, match=message):
        devices_of(tiny.changed(**fields))


def test_more_devices_than_there_are_are_refused():
    asked = tiny.changed(loop=dataclasses.replace(tiny.CONFIG.loop, devices=99))
    with pytest.raises(ValueError, match="loop.devices=99: jax sees"):
        devices_of(asked)
    with pytest.raises(ValueError, match="loop.devices=0: expected at least 1"):
        dataclasses.replace(tiny.CONFIG.loop, devices=0)
