"""ADMM: exact projections, the update held against plain numpy, and problems that it solves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax.methods import AdmmState, admm, admm_residual
from clicktrain_jax.methods.admm import project_kernels, project_patterns

PATTERNS = ct.patterns.fixed_set(4)
NAME = "Conv_0/kernel"
SETTINGS = {"patterns": PATTERNS, "rho": 0.1, "every": 2}


def one_layer(shape, fraction, **options):
    return ct.make_plan({"Conv_0": {"kernel": jnp.zeros(shape)}}, {NAME: fraction}, **options)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def brute_patterns(values, patterns, filters=1, channels=1):
    """The nearest point by trying every pattern on every tile."""
    nearest = np.zeros_like(values)
    for first_out in range(0, values.shape[3], filters):
        for first_in in range(0, values.shape[2], channels):
            where = np.s_[:, :, first_in : first_in + channels, first_out : first_out + filters]
            candidates = [values[where] * pattern[:, :, None, None] for pattern in patterns]
            distances = [np.square(values[where] - candidate, dtype=np.float64).sum() for candidate in candidates]
            nearest[where] = candidates[int(np.argmin(distances))]
    return nearest


@pytest.mark.parametrize("tile", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("seed", range(2))
def test_pattern_projection_is_the_nearest_point(toy, tile, seed):
    values = normal((3, 3, 4, 5), seed)
    patterns = ct.patterns.fixed_set(12)
    plan = one_layer(values.shape, 0.5, tile=tile, removal_score="retained")
    got = toy.quick_jit(lambda values: project_patterns({NAME: values}, plan, patterns))(values)
    np.testing.assert_array_equal(got[NAME], brute_patterns(values, patterns, *tile))


@pytest.mark.parametrize("score", ["whole", "retained"])
def test_kernel_projection_removes_the_smallest_kernels(toy, score):
    values = normal((3, 3, 6, 5))
    plan = one_layer(values.shape, 0.4, removal_score=score)
    got = toy.quick_jit(lambda values: project_kernels({NAME: values}, plan, PATTERNS))(values)
    norms = np.square(values, dtype=np.float64).sum(axis=(0, 1))
    smallest = np.argsort(norms, axis=None)[:12]
    expected = values.reshape(9, 30).copy()
    expected[:, smallest] = 0
    np.testing.assert_array_equal(got[NAME], expected.reshape(values.shape))


def test_kernel_projection_is_the_nearest_of_all_choices(toy):
    values = normal((3, 3, 2, 3))
    plan = one_layer(values.shape, 0.5)
    got = np.asarray(toy.quick_jit(lambda values: project_kernels({NAME: values}, plan, PATTERNS))(values)[NAME])
    distances = [
        np.square(values.reshape(9, 6)[:, list(gone)], dtype=np.float64).sum()
        for gone in itertools.combinations(range(6), 3)
    ]
    assert np.square(values - got, dtype=np.float64).sum() == pytest.approx(min(distances), rel=1e-6)
    assert (np.abs(got).sum(axis=(0, 1)) == 0).sum() == 3


def test_which_layers_have_which_copy(toy):
    params = toy.params()
    plan = ct.make_plan(params, {"Conv_0/kernel": 0.0, "Conv_1/kernel": 0.55, "Conv_2/kernel": 0.5})
    state = admm(optax.sgd(0.1), plan, **SETTINGS).init(params)
    assert set(state.pattern_copy) == set(state.pattern_dual) == {"Conv_0/kernel", "Conv_1/kernel"}
    assert set(state.kernel_copy) == set(state.kernel_dual) == {"Conv_1/kernel", "Conv_2/kernel"}


def numpy_admm(start, targets, plan_patterns, removed, rho_at, begin, end, every, steps, rate):
    """The loop of method.md, section 8, on one layer: W after each update and (Z, U, Y, V) of it."""
    w = start.astype(np.float64)
    z = u = y = v = np.zeros_like(w)
    history = []
    for step in range(steps):
        grad = w - targets[step]
        if begin <= step < end:
            if step == begin:
                u = v = np.zeros_like(w)
            if (step - begin) % every == 0:
                z, y = brute_patterns(w + u, plan_patterns), w + v
                norms = np.square(y).sum(axis=(0, 1))
                y = y * (norms >= np.sort(norms, axis=None)[removed])
                if step > begin:
                    u, v = u + w - z, v + w - y
            grad = grad + rho_at(step - begin) * ((w - z + u) + (w - y + v))
        w = w - rate * grad
        history.append((w, z, u, y, v))
    return history


@pytest.mark.parametrize("scheduled", [False, True])
def test_every_update_is_that_of_a_plain_loop(toy, scheduled):
    shape, begin, end, every, steps, rate = (3, 3, 4, 4), 3, 12, 2, 14, 0.1
    rho = optax.piecewise_constant_schedule(0.3, {4: 3.0}) if scheduled else 0.3
    rho_at = (lambda since: 0.9 if since >= 4 else 0.3) if scheduled else (lambda since: 0.3)
    start = normal(shape)
    targets = [normal(shape, seed=10 + step) for step in range(steps)]
    expected = numpy_admm(start, targets, PATTERNS, 8, rho_at, begin, end, every, steps, rate)
    tx = admm(
        optax.sgd(rate), one_layer(shape, 0.5), patterns=PATTERNS, rho=rho, every=every, begin_step=begin, end_step=end
    )
    params = {"Conv_0": {"kernel": jnp.asarray(start)}}
    state = tx.init(params)

    @toy.quick_jit
    def train_step(params, state, target):
        grads = {"Conv_0": {"kernel": params["Conv_0"]["kernel"] - target}}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    duals = []
    for step, target in enumerate(targets):
        params, state = train_step(params, state, target)
        got = [params["Conv_0"]["kernel"]] + [by_name[NAME] for by_name in state[1:5]]
        for array, wanted in zip(got, expected[step]):
            np.testing.assert_allclose(array, wanted, atol=2e-5)
        duals.append((np.asarray(state.pattern_dual[NAME]), np.asarray(state.kernel_dual[NAME])))
    assert train_step._cache_size() == 1
    # Zero at the begin, other ones after each renewal (updates 5, 7, 9, 11), and only then.
    for which in (0, 1):
        changed = [step for step in range(1, steps) if np.any(duals[step][which] != duals[step - 1][which])]
        assert changed == [5, 7, 9, 11]
        assert not duals[begin][which].any()
    assert int(state.count) == steps


def test_jit_is_eager(toy):
    shape = (3, 3, 4, 4)
    tx = admm(optax.sgd(0.1, momentum=0.9), one_layer(shape, 0.5), patterns=PATTERNS, rho=0.1, every=1)
    update = toy.quick_jit(tx.update)
    params = {"Conv_0": {"kernel": jnp.asarray(normal(shape))}}
    states = [tx.init(params), tx.init(params)]
    for step in range(2):
        grads = {"Conv_0": {"kernel": jnp.asarray(normal(shape, seed=step))}}
        eager = tx.update(grads, states[0], params)
        jitted = update(grads, states[1], params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, jitted)
        states = [eager[1], jitted[1]]
        params = optax.apply_updates(params, eager[0])


def test_before_the_begin_and_from_the_end_on_nothing_is_touched(toy):
    begin, end = 2, 5
    inner = optax.sgd(0.1, momentum=0.9)
    tx = admm(inner, toy.plan(), **SETTINGS, begin_step=begin, end_step=end)
    history = toy.run(tx, steps=toy.STOP)
    assert history.traces == 1
    update = toy.quick_jit(inner.update)
    for step in range(toy.STOP):
        updates, _ = update(history.grads[step], history.states[step].inner_state, history.params[step])
        plain = optax.apply_updates(history.params[step], updates)
        for layer in ("Conv_0", "Conv_1", "Conv_2", "Dense_0"):
            touched = begin <= step < end and layer in toy.PRUNED
            got, wanted = history.params[step + 1][layer]["kernel"], plain[layer]["kernel"]
            if touched:
                assert np.abs(got - wanted).max() > 1e-5
            else:
                np.testing.assert_allclose(got, wanted, atol=1e-6, err_msg=f"{layer} in update {step}")
    for by_name in history.states[begin][1:5]:
        assert not any(array.any() for array in by_name.values())
    for old, new in zip(history.states[end][1:5], history.states[-1][1:5]):
        jax.tree.map(np.testing.assert_array_equal, old, new)


@pytest.mark.parametrize("active", [False, True])
def test_gradients_of_an_idle_phase_pass_to_the_bit(toy, active):
    """An inner optimizer that hands on what it gets shows what it got."""
    params, grads = toy.params(), toy.params(seed=1)
    tx = admm(optax.identity(), toy.plan(), **SETTINGS, begin_step=0 if active else 1)
    got, _ = toy.quick_jit(tx.update)(grads, tx.init(params), params)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), got, grads)
    assert same["Conv_1"]["bias"] and same["Dense_0"]["kernel"] and same["Conv_0"]["kernel"]
    assert same["Conv_1"]["kernel"] == same["Conv_2"]["kernel"] == (not active)


def test_rho_sees_the_updates_since_the_begin(toy):
    """Gradients of zero: what is left is rho times the pull, here of a pull that stays."""
    shape = (3, 3, 4, 4)
    params = {"Conv_0": {"kernel": jnp.asarray(normal(shape))}}
    tx = admm(
        optax.identity(),
        one_layer(shape, 0.5),
        patterns=PATTERNS,
        rho=lambda since: 1.0 + since,
        every=100,
        begin_step=2,
    )
    update, state = toy.quick_jit(tx.update), tx.init(params)
    norms = []
    for _ in range(5):
        pull, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        norms.append(float(jnp.linalg.norm(pull["Conv_0"]["kernel"])))
    assert norms[:2] == [0, 0]
    np.testing.assert_allclose(np.array(norms[2:]) / norms[2], [1, 2, 3], rtol=1e-6)


def test_dtypes_are_kept_and_extra_arguments_reach_the_inner_optimizer(toy):
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda grad: -0.1 * grad, updates), state + value

    inner = optax.GradientTransformationExtraArgs(lambda _: jnp.float32(0), update)
    history = toy.run(admm(inner, toy.plan(), **SETTINGS), toy.params(jnp.bfloat16), steps=4, value=jnp.float32(3))
    assert float(history.states[-1].inner_state) == 12
    for before, after in ((history.params[0], history.params[-1]), (history.states[0], history.states[-1])):
        assert [leaf.dtype for leaf in jax.tree.leaves(before)] == [leaf.dtype for leaf in jax.tree.leaves(after)]
    # Duals gather small differences: they are wider than the weights.
    assert history.states[-1].pattern_dual["Conv_1/kernel"].dtype == jnp.float32


def test_least_squares_under_the_constraint_is_solved(toy):
    """Three 2x2 kernels, one to go, the others keep two taps each: all 3 * 6 * 6 supports are tried for the answer."""
    rng = np.random.default_rng(3)
    patterns = np.array([np.isin(np.arange(4), pair).reshape(2, 2) for pair in itertools.combinations(range(4), 2)])
    planted = np.zeros((2, 2, 3, 1))
    planted[:, :, 0, 0] = [[1.5, 0], [0, -1.2]]
    planted[:, :, 2, 0] = [[0, 1.4], [1.1, 0]]
    mixing = np.eye(12) + 0.15 * rng.normal(size=(12, 12))
    inputs = rng.normal(size=(200, 12)) @ mixing
    outputs = inputs @ planted.ravel() + 0.5 * rng.normal(size=200)
    best = (np.inf, None)
    for gone in range(3):
        for pair in itertools.product(patterns, repeat=2):
            support = np.zeros(planted.shape, bool)
            for kernel, pattern in zip([k for k in range(3) if k != gone], pair):
                support[:, :, kernel, 0] = pattern
            solved = np.zeros(12)
            solved[support.ravel()] = np.linalg.lstsq(inputs[:, support.ravel()], outputs, rcond=None)[0]
            best = min(best, (np.square(inputs @ solved - outputs).sum(), tuple(solved)))
    x, y = jnp.asarray(inputs, jnp.float32), jnp.asarray(outputs, jnp.float32)
    dense = np.linalg.lstsq(inputs, outputs, rcond=None)[0].reshape(planted.shape)
    params = {"Conv_0": {"kernel": jnp.asarray(dense, jnp.float32)}}
    tx = admm(optax.sgd(0.05), one_layer(planted.shape, 0.3), patterns=patterns, rho=2.0, every=20)

    def loss(params):
        return 0.5 * jnp.mean(jnp.square(x @ params["Conv_0"]["kernel"].ravel() - y))

    @toy.quick_jit
    def solve(params, state):
        def step(_, carry):
            updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        return jax.lax.fori_loop(0, 4000, step, (params, state))

    solved, state = solve(params, tx.init(params))
    np.testing.assert_allclose(np.asarray(solved["Conv_0"]["kernel"]).ravel(), best[1], atol=2e-3)
    assert max(admm_residual(state, solved).values()) < 2e-3


def test_the_residual_falls_while_a_small_net_is_trained(toy):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(48, 6, 6, 4)), jnp.float32)
    labels = (images[..., :2].mean(axis=(1, 2)) > 0).sum(axis=-1)
    params = {
        "Conv_0": {"kernel": jnp.asarray(0.3 * rng.normal(size=(3, 3, 4, 8)), jnp.float32)},
        "Dense_0": {"kernel": jnp.asarray(0.3 * rng.normal(size=(8, 3)), jnp.float32)},
    }
    begin, last = 100, 300

    def loss(params):
        features = jax.lax.conv_general_dilated(
            images, params["Conv_0"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        logits = jax.nn.relu(features).mean(axis=(1, 2)) @ params["Dense_0"]["kernel"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    plan = ct.make_plan(params, {NAME: 0.5})
    tx = admm(optax.sgd(0.1, momentum=0.9), plan, patterns=PATTERNS, rho=0.2, every=10, begin_step=begin)
    step = toy.quick_jit(lambda params, state: tx.update(jax.grad(loss)(params), state, params))
    state, residuals, losses = tx.init(params), [], []
    for index in range(last + 1):
        updates, state = step(params, state)
        if index >= begin and index % 100 == 0:
            # The state may stand in a chain's.
            residuals.append(admm_residual((state, optax.EmptyState()), params))
            losses.append(float(loss(params)))
        params = optax.apply_updates(params, updates)
    for kind in ("pattern", "kernel"):
        values = [residual[kind] for residual in residuals]
        assert values[0] > 0.3
        assert values[-1] < 0.1 * values[0]
    # And the net is still trained: on its constraint it does better than it did, free, at the begin.
    assert losses[-1] < losses[0]


def test_residual_is_a_relative_norm():
    params = {"Conv_0": {"kernel": jnp.full((3, 3, 2, 2), 2.0)}}
    tx = admm(optax.sgd(0.0), one_layer((3, 3, 2, 2), 0.25), **SETTINGS)
    _, state = tx.update(params, tx.init(params), params)
    # 5 of 9 taps and 1 of 4 kernels are away; all weights are alike.
    assert admm_residual(state, params) == pytest.approx({"pattern": (5 / 9) ** 0.5, "kernel": 0.5})
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert admm_residual(tx.init(zeros), zeros) == {"pattern": 0.0, "kernel": 0.0}


def test_restored_dictionaries_are_read():
    params = {"Conv_0": {"kernel": jnp.asarray(normal((3, 3, 2, 2)))}}
    tx = admm(optax.sgd(0.0), one_layer((3, 3, 2, 2), 0.25), **SETTINGS)
    _, state = tx.update(params, tx.init(params), params)
    assert admm_residual({"0": state._asdict()}, params) == admm_residual(state, params)
    with pytest.raises(ValueError, match="one of admm.* found 0"):
        admm_residual(optax.sgd(0.1).init(params), params)
    with pytest.raises(ValueError, match="missing"):
        admm_residual(state, {"other": params["Conv_0"]})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rho": 0.0}, "rho=0.0"),
        ({"rho": -1}, "rho=-1"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"rho": "1e-3"}, "rho='1e-3'"),
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"begin_step": -1}, "begin_step=-1"),
        ({"begin_step": 5, "end_step": 5}, "end_step=5: expected more than begin_step=5"),
        ({"patterns": np.ones((2, 5, 5), bool)}, "patterns of 5x5 taps"),
        ({"patterns": ct.patterns.Generated(8)}, "a set that stands"),
    ],
)
def test_wrong_arguments_are_refused(toy, change, message):
    with pytest.raises(ValueError, match=message):
        admm(optax.sgd(0.1), toy.plan(), **{**SETTINGS, **change})


def test_wrong_trees_are_refused(toy):
    params = toy.params()
    tx = admm(optax.sgd(0.1), toy.plan(), **SETTINGS)
    with pytest.raises(ValueError, match="another tree"):
        tx.init({"kernel": params["Conv_1"]["kernel"]})
    state = tx.init(params)
    assert isinstance(state, AdmmState)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="'Conv_1/kernel' is in the plan, but it has no gradient"):
        tx.update({**params, "Conv_1": {"kernel": None, "bias": params["Conv_1"]["bias"]}}, state, params)
