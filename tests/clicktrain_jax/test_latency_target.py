"""Time as a target: layers' measured seconds in, masks of a net as fast as was asked out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
from clicktrain_jax import LayerTime, LayerTimes

SHARES = (0.125, 0.25, 0.5, 1.0)
PARAMS = {
    name: {"kernel": jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.float32)} for name in ("Conv_1", "Conv_2", "Conv_3")
}
# Half a second is the net's own: of layers that a plan does not name, and all else.
TIMES = LayerTimes(
    4.5,
    (
        LayerTime("Conv_1/kernel", 2.0, SHARES, (0.25, 0.5, 1.0, 2.0)),
        # Faster only below a quarter.
        LayerTime("Conv_2/kernel", 1.0, SHARES, (0.2, 1.0, 1.5, 3.0)),
        # Never faster.
        LayerTime("Conv_3/kernel", 1.0, SHARES, (1.0, 1.1, 1.2, 1.3)),
    ),
    "a device",
    8,
)


def plan_of(target, **options):
    return ct.make_plan(PARAMS, target=target, target_of="latency", costs=TIMES, **options)


def scores(seed, **scales):
    key = jax.random.key(seed)
    return {
        name: {"kernel": scales.get(name, 1.0) * jax.random.uniform(jax.random.fold_in(key, index), (3, 3, 16, 32))}
        for index, name in enumerate(PARAMS)
    }


def seconds_of(masks):
    """By hand, from the shares that the masks keep; what has no mask is dense."""
    total = 4.5 - sum(time.dense_s for time in TIMES.layers)
    for time in TIMES.layers:
        layer = masks.layers.get(time.name)
        share = 1.0 if layer is None else float(np.mean(layer.kernel))
        total += min(time.dense_s, np.interp(share, time.shares, time.seconds))
    return total


@pytest.mark.parametrize("tile", [(1, 1), (32, 1), (8, 2)])
@pytest.mark.parametrize("ratio", [1.3, 1.6, 1.8])
def test_the_net_is_as_fast_as_asked(ratio, tile):
    plan = plan_of(ratio, tile=tile, floor=False)
    masks = jax.jit(lambda scores: ct.select_masks(scores, plan, ct.patterns.fixed_set(4)))(scores(0))
    # Of whole channels there are 16: one is worth up to 0.4 s in the layer whose time falls late.
    assert seconds_of(masks) == pytest.approx(4.5 / ratio, rel=0.08 if tile[0] == 32 else 0.03)


def test_a_layer_that_gains_nothing_stays_dense():
    plan = plan_of(1.5)
    assert set(plan.by_name()) == {"Conv_1/kernel", "Conv_2/kernel"}
    assert dict(plan.left_out)["Conv_3/kernel"] == "measured: it gains no time, whatever is removed"
    masks = ct.select_masks(scores(1), plan, ct.patterns.fixed_set(4))
    # The first layer alone reaches it: what the second one would lose before it gets faster is worth more.
    assert masks.layers["Conv_2/kernel"].kernel.all()
    # By importance per second: the first layer's kernels matter, so the second one goes.
    masks = ct.select_masks(scores(1, Conv_1=1.0), plan_of(1.25), ct.patterns.fixed_set(4))
    assert seconds_of(masks) == pytest.approx(4.5 / 1.25, rel=0.03)


def test_an_explicit_fraction_counts_with_its_seconds():
    rules = {"Conv_1/kernel": 0.5, "Conv_[23]/kernel": "auto"}
    plan = ct.make_plan(PARAMS, rules, target=1.5, target_of="latency", costs=TIMES)
    masks = ct.select_masks(scores(2), plan, ct.patterns.fixed_set(4))
    assert float(np.mean(masks.layers["Conv_1/kernel"].kernel)) == 0.5
    assert seconds_of(masks) == pytest.approx(4.5 / 1.5, rel=0.03)


def test_out_of_reach_names_the_reachable_speed():
    # Down to one channel of 16, and thus below the least share that was measured: 0.5 + 0.25 + 0.2 + 1.0 seconds.
    with pytest.raises(ValueError, match=r"target=4 over latency is out of reach: the reachable maximum is 2\.30"):
        plan_of(4.0, tile=(32, 1), floor=False)
    plan_of(2.30, tile=(32, 1), floor=False)
    slow = LayerTimes(2.0, (LayerTime("Conv_1/kernel", 1.0, SHARES, (1.0, 1.0, 1.0, 1.0)),))
    with pytest.raises(ValueError, match="no layer gets faster.*the reachable maximum is 1.00"):
        ct.make_plan({"Conv_1": PARAMS["Conv_1"]}, target=2.0, target_of="latency", costs=slow)


def test_the_hull_tells_what_removal_is_worth():
    time = TIMES.of("Conv_2/kernel")
    shares, seconds = time.curve()
    np.testing.assert_allclose(seconds, [0.2, 1.0, 1.0, 1.0])
    shares, seconds = time.hull()
    np.testing.assert_allclose(shares, [0.125, 1.0])
    np.testing.assert_allclose(seconds, [0.2, 1.0], rtol=1e-6)
    # A share that was not measured, and no patterns alone: the layer is dense there.
    np.testing.assert_allclose(LayerTime("a", 1.0, (0.5,), (0.6,)).curve(), [[0.5, 1.0], [0.6, 1.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerTime("a", 1.0, (), ()), "expected as many seconds as shares"),
        (lambda: LayerTime("a", 1.0, (0.5, 0.25), (1.0, 1.0)), "shares that rise"),
        (lambda: LayerTime("a", 1.0, (0.5,), (0.0,)), "positive, finite seconds"),
        (lambda: LayerTimes(0.0, ()), "net_s=0.0: expected"),
        (lambda: ct.make_plan(PARAMS, target=2.0, target_of="latency"), "needs the measured times of the layers"),
        (lambda: ct.make_plan(PARAMS, target=2.0, costs=TIMES), "no other takes them"),
        (
            lambda: ct.make_plan(PARAMS, target=2.0, target_of="latency", costs=LayerTimes(2.0, TIMES.layers[:1])),
            "costs hold no times of 'Conv_2/kernel'",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
