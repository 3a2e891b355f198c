"""The choice on the whole net: what is measured decides and is remembered. Times here are made up, or not looked at."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn_masks, masked

import clicktrain_jax as ct
import pallas_kernels.tuning
from clicktrain_jax.deploy import whole_net
from pallas_kernels import native

WAYS = {("a", "b"): ("dense", "NHWC", "HWNC"), ("c",): ("dense", "NHWC", "HWNC"), ("d",): ("dense", "HWNC")}


def fake_timer(costs, extra=lambda choice: 0.0):
    """A net's time is the sum of its layers' and what their neighbourhood adds; remembers what it was asked."""
    asked = []

    def timer(choices):
        asked.append(dict(choices))
        return {
            label: sum(costs[layer][run] for layer, run in choice.items()) + extra(choice)
            for label, choice in choices.items()
        }

    timer.asked = asked
    return timer


def costs(**layers):
    return {name: dict(zip(("dense", "NHWC", "HWNC"), times)) for name, times in layers.items()}


def test_each_group_runs_as_is_best_for_the_net():
    timer = fake_timer(costs(a=(4.0, 1.0, 2.0), b=(4.0, 1.0, 2.0), c=(1.0, 3.0, 1.5), d=(2.0, 9.0, 1.0)))
    choice, seconds = whole_net.search(WAYS, timer)
    assert choice == {"a": "NHWC", "b": "NHWC", "c": "dense", "d": "HWNC"}
    assert seconds == {
        "all dense": 11.0, "all by pattern, NHWC": 6.0, "all by pattern, HWNC": 6.5, "chosen": 4.0
    }  # fmt: skip
    # The last comparison is of the dense net with what is chosen, side by side.
    assert list(timer.asked[-1]) == ["all dense", "chosen"] and timer.asked[-1]["chosen"] == choice


def test_layers_that_gain_alone_but_not_in_the_net_stay_dense():
    """A change of layout between neighbours costs more than the layers gain."""
    layers = costs(a=(2.0, 1.8, 1.9), b=(2.0, 1.8, 1.9), c=(2.0, 1.8, 1.9), d=(2.0, 9.0, 1.9))
    timer = fake_timer(layers, lambda choice: 3.0 * (set(choice.values()) != {"dense"}))
    choice, seconds = whole_net.search(WAYS, timer)
    assert set(choice.values()) == {"dense"} and seconds["chosen"] == seconds["all dense"] == 8.0


def test_two_changes_that_do_not_add_up():
    """Each of two flips gains alone; the second one is tried with the first in place, and dropped."""
    layers = costs(a=(2.0, 1.0, 9.0), b=(2.0, 1.0, 9.0), c=(2.0, 5.0, 9.0), d=(2.0, 0.0, 9.0))
    ways = {(name,): ("dense", "NHWC") for name in "abcd"}
    both = fake_timer(layers, lambda choice: 1.5 * (choice["a"] == choice["b"] == "NHWC"))
    choice, _ = whole_net.search(ways, both)
    assert choice["c"] == "dense" and choice["d"] == "NHWC" and {choice["a"], choice["b"]} == {"dense", "NHWC"}


def test_the_faster_dense_net_is_what_patterns_must_beat():
    ways = {("a",): ("dense", "dense cpu", "NHWC"), ("whole",): ("dense", "dense cpu")}
    times = {"a": {"dense": 9.0, "dense cpu": 2.0, "NHWC": 2.5}, "whole": {"dense": 1.0, "dense cpu": 0.2}}
    timer = fake_timer(times)
    choice, seconds = whole_net.search(ways, timer)
    assert choice == {"a": "dense cpu", "whole": "dense cpu"}
    assert seconds["all dense"] == 10.0 and seconds["all dense, native"] == seconds["chosen"] == 2.2
    times["a"]["NHWC"] = 0.5
    choice, seconds = whole_net.search(ways, timer)
    assert choice == {"a": "NHWC", "whole": "dense cpu"} and seconds["chosen"] == 0.7
    # XLA's convolutions, far behind for the net, were tried for none of its layers.
    assert not any("whole dense" in label for asked in timer.asked for label in asked)


def test_noise_does_not_decide():
    timer = fake_timer(costs(a=(1.0, 0.996, 1.0), b=(1.0, 0.996, 1.0), c=(1.0, 0.996, 1.0), d=(1.0, 1.0, 0.996)))
    assert set(whole_net.search(WAYS, timer)[0].values()) == {"dense"}


def test_programs_to_compile_are_limited():
    ways = {(f"layer {index}",): ("dense", "NHWC", "HWNC") for index in range(100)}
    timer = fake_timer({names[0]: {"dense": 1.0, "NHWC": 1.5, "HWNC": 1.4} for names in ways})
    whole_net.search(ways, timer)
    assert len({tuple(choice.values()) for asked in timer.asked for choice in asked.values()}) <= 20


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for index in range(3):
            x = nn.relu(nn.Conv(8, (3, 3), name=f"Conv_{index}")(x))
        return x.mean((1, 2))


@functools.cache
def net():
    model, x = Net(), np.random.default_rng(1).normal(size=(2, 6, 6, 8)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    plan = ct.make_plan(params, {"Conv_[01]/kernel": 0.5}, tile=(4, 1))
    return model, params, x, drawn_masks(params, plan)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Times in place of the clock's: by pattern in NHWC is fastest. Each comparison is noted."""
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    made_up = {"all dense": 3.0, "all dense, native": 2.5, "chosen": 1.0}
    made_up |= {"all by pattern, NHWC": 1.0, "all by pattern, HWNC": 2.0}
    noted = []

    def time_together(functions, **_):
        results = {label: function() for label, function in functions.items()}
        noted.append({label: jax.tree.map(np.asarray, result) for label, result in results.items()})
        return {label: pallas_kernels.tuning.Timing(made_up.get(label, 1.0), 0.0, 0.0, 1, 1) for label in functions}

    monkeypatch.setattr(pallas_kernels.tuning, "time_together", time_together)
    return noted


def test_what_was_measured_is_used_reported_and_remembered(measured, tmp_path, monkeypatch):
    model, params, x, masks = net()

    def apply(params, x, scale=1.0):
        return scale * model.apply({"params": params}, x)

    fast = ct.accelerate(apply, masks)
    tuned = fast.tuned(params, x, scale=2.0)
    assert measured  # all that is timed computes the same, dense or not, whatever the parameters hold elsewhere
    wanted = apply(masked(params, masks), x, scale=2.0)
    for comparison in measured:
        for result in comparison.values():
            np.testing.assert_allclose(result[0], wanted, rtol=1e-4, atol=1e-5)
    report = tuned.report(params, x)
    assert [conv.runs for conv in report.convolutions] == ["sparse", "sparse", "dense"]
    assert "measured on the whole net" in report.convolutions[0].why
    assert report.seconds["all dense"] == 3.0 and report.seconds["chosen"] == 1.0
    assert report.device == pallas_kernels.tuning.device_kind() and report.device in report.to_text()
    np.testing.assert_allclose(jax.jit(tuned)(params, x), wanted / 2, rtol=1e-4, atol=1e-5)
    assert fast.report(params, x).seconds is None  # the first one is as it was

    assert list(tmp_path.glob("*.json"))
    measured.clear()
    again = ct.accelerate(apply, masks).tuned(params, x, scale=2.0)
    assert not measured and again.report(params, x) == report
    ct.accelerate(apply, masks).tuned(params, x[:1], scale=2.0)  # another shape is another question
    assert measured
    # And so are other kernels.
    monkeypatch.setattr(native.build, "sources", lambda: "another state")
    measured.clear()
    ct.accelerate(apply, masks).tuned(params, x, scale=2.0)
    assert bool(measured) == native.is_fast()


def test_a_training_step_is_what_is_timed_when_asked(measured):
    model, params, x, masks = net()

    def step(apply):
        return jax.grad(lambda params, x: jnp.sum(jnp.sin(apply({"params": params}, x))))

    fast = ct.accelerate(model.apply, masks)

    def within(apply):
        return lambda variables, x: step(apply)(variables["params"], x)

    tuned = fast.tuned({"params": params}, x, within=within)
    sizes = sorted(leaf.shape for leaf in jax.tree.leaves(params))
    assert all(sorted(leaf.shape for leaf in result) == sizes for one in measured for result in one.values())
    got = jax.jit(step(tuned))(params, x)
    wanted = jax.jit(step(lambda variables, x: model.apply({"params": ct.apply_masks(variables["params"], masks)}, x)))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted(params, x))):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_net_is_measured_for_real(monkeypatch, tmp_path):
    """With the real clock, whatever it says: the choice is one of all, and the function the same."""
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    model, params, x, masks = net()
    tuned = ct.accelerate(model.apply, masks).tuned({"params": params}, x)
    report = tuned.report({"params": params}, x)
    others = {"all dense, native"} if native.is_fast() else {"all by pattern, HWNC"}
    assert {"all dense", "all by pattern, NHWC", "chosen"} | others == report.seconds.keys()
    assert all(seconds > 0 for seconds in report.seconds.values())
    wanted = model.apply({"params": masked(params, masks)}, x)
    np.testing.assert_allclose(tuned({"params": params}, x), wanted, rtol=1e-4, atol=1e-5)
