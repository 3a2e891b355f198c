"""Measured seconds of layers: which calls are timed, and what becomes of the figures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

import clicktrain_jax as ct
from clicktrain_jax import models

SHARES = (0.25, 1.0)


@pytest.fixture(scope="module")
def net():
    model = models.build("small", num_classes=10, width=0.25)
    shape = models.default_image_shape("small")
    variables = drawn(model, shape)
    plan = ct.make_plan(variables["params"], target=4.0, tile=(8, 1), floor=False)
    apply_fn = functools.partial(model.apply, train=False)
    return apply_fn, variables, jnp.zeros((2, *shape)), plan


class Clock:
    """Every call runs, and takes as long as it is told: a call 0.1 s, a layer alone 1.1 s, nets 5 s less 2 a share."""

    def __init__(self):
        self.calls = []

    def __call__(self, functions):
        for function in functions.values():
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(function()))
        self.calls.append(list(functions))
        if None in functions:
            return {share: 5.0 if share is None else 3.0 * share + 1.0 for share in functions}
        return {key: 0.1 if key == ("call",) else 1.1 for key in functions}


def test_layers_are_scaled_to_what_whole_nets_take(net):
    *arguments, plan = net
    clock = Clock()
    times = ct.layer_times(*arguments, plan, shares=SHARES, timer=clock)
    names = [layer.name for layer in plan.layers]
    assert [layer.name for layer in times.layers] == names and times.net_s == 5.0 and times.batch == 2
    assert len(clock.calls) == 2 and clock.calls[1] == [None, *SHARES]
    rest = 5.0 - len(names)
    for place, share in enumerate(SHARES):
        total = rest + sum(layer.seconds[place] for layer in times.layers)
        assert total == pytest.approx(max(3.0 * share + 1.0, 1.05 * rest), rel=0.06)
    assert times.rest(names) == pytest.approx(rest)
    for layer in times.layers:
        assert layer.dense_s == pytest.approx(1.0) and layer.shares[-1] == 1.0
        # What the masks keep, not what was asked: a layer has few units.
        assert layer.shares[0] == pytest.approx(0.25, abs=0.13)
    # And the table is what a plan takes.
    assert (
        ct.make_plan(
            arguments[1]["params"], target=2.0, target_of="latency", costs=times, tile=(8, 1), floor=False
        ).target.of
        == "latency"
    )


def test_a_table_is_measured_once(net, monkeypatch, tmp_path):
    from clicktrain_jax.deploy import timing as module

    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    clock = Clock()
    monkeypatch.setattr(module, "_time", clock)
    *arguments, plan = net
    first = ct.layer_times(*arguments, plan, shares=SHARES)
    assert ct.layer_times(*arguments, plan, shares=SHARES) == first and len(clock.calls) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"shares": ()}, "shares=\\(\\)"), ({"shares": (0.0, 1.0)}, "each in \\(0, 1\\]"), ({"images": 3}, "images have")],
)
def test_bad_input(net, change, message):
    apply_fn, variables, images, plan = net
    images = change.pop("images", images)
    with pytest.raises(ValueError, match=message):
        ct.layer_times(apply_fn, variables, images, plan, **change)
