"""Generated pattern sets: against every possible set on small cases, against greedy, frequency and published ones."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clicktrain_jax import patterns
from clicktrain_jax.patterns import Generated
from clicktrain_jax.patterns.kernels import WIDTH, gather, sample
from clicktrain_jax.patterns.search import exchange, greedy

STATIC = ("num_patterns", "entries", "method", "centre", "complementary", "kernel_size", "names", "max_kernels")
# Programs here run a few times: compiled without optimisation they are ready sooner.
pytestmark = pytest.mark.usefixtures("quick")
generate = jax.jit(patterns.generate, static_argnames=STATIC, compiler_options={"xla_backend_optimization_level": 0})
few_examples = settings(max_examples=8, deadline=None, derandomize=True)


def net(seed=0, shapes=((3, 3, 6, 8), (3, 3, 8, 16)), spread=2.0):
    """Scores of some layers, as uneven as real ones: most of a layer's total in few kernels."""
    rng = np.random.default_rng(seed)
    return {
        f"Conv_{index}": {"kernel": jnp.asarray(np.exp(spread * rng.normal(size=shape)), jnp.float32)}
        for index, shape in enumerate(shapes)
    }


def share(tree, chosen):
    """`patterns.objective` once more, in float64."""
    layers = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    flat = [layer.reshape(-1, layer.shape[2] * layer.shape[3]) for layer in layers if layer.any()]
    keep = np.asarray(chosen).reshape(len(chosen), -1)
    return np.mean([(keep @ layer).max(axis=0).sum() / layer.sum() for layer in flat])


def by_greedy(tree, listed, count):
    chosen = []
    for _ in range(count):
        chosen.append(max(range(len(listed)), key=lambda pick: share(tree, listed[[*chosen, pick]])))
    return listed[chosen]


def texts(chosen):
    return [patterns.to_text(pattern) for pattern in np.asarray(chosen)]


def sane(chosen, count, entries, size=(3, 3)):
    chosen = np.asarray(chosen)
    assert chosen.shape == (count, *size) and chosen.dtype == bool
    assert (chosen.sum(axis=(1, 2)) == entries).all()
    assert len(set(texts(chosen))) == count
    return chosen


def in_order(chosen):
    return texts(chosen) == sorted(texts(chosen), reverse=True)


# candidates


@pytest.mark.parametrize("size, entries", [((3, 3), 4), ((3, 3), 1), ((3, 3), 8), ((2, 2), 2), ((1, 5), 3)])
def test_candidates_are_all_tap_sets_in_order(size, entries):
    listed = patterns.candidates(size, entries)
    taps = math.prod(size)
    expected = [np.isin(range(taps), kept).reshape(size) for kept in itertools.combinations(range(taps), entries)]
    np.testing.assert_array_equal(listed, expected)
    assert listed.dtype == bool and in_order(listed)


def test_candidates_with_the_centre():
    with_centre = [text for text in texts(patterns.candidates((3, 3), 4)) if text[5] == "1"]
    assert texts(patterns.candidates((3, 3), 4, centre=True)) == with_centre
    assert len(with_centre) == 56


# the objective


def test_objective_by_hand():
    first = np.zeros((3, 3, 1, 2))
    first[0, :, 0, 0] = (3, 1, 4)
    first[2, :, 0, 1] = (6, 1, 5)
    scores = {"a": first, "b": 7 * np.ones((3, 3, 2, 1)), "zero": np.zeros((3, 3, 4, 4)), "1x1": np.ones((1, 1, 2, 2))}
    chosen = [patterns.parse("101/000/000"), patterns.parse("000/000/011")]
    # Of a's 20: 7 and 6; of each of b's kernels 2 of 9 taps. The layer of zeros and the 1x1 layer do not count.
    assert patterns.objective(scores, np.stack(chosen)) == pytest.approx((13 / 20 + 2 / 9) / 2, rel=1e-6)
    assert patterns.objective(scores, np.stack(chosen), names=["a"]) == pytest.approx(13 / 20, rel=1e-6)
    assert patterns.objective({"zero": first * 0}, np.stack(chosen)) == 0


def test_objective_of_many_patterns_and_kernels():
    scores, listed = net(shapes=((3, 3, 20, 30),)), patterns.candidates((3, 3), 3)
    assert patterns.objective(scores, listed) == pytest.approx(share(scores, listed), rel=1e-5)


# coverage


@few_examples
@given(
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.3, 1.0, 3.0]),
    count=st.sampled_from([1, 4, 8]),
    centre=st.booleans(),
)
def test_coverage_is_behind_none_of_its_starts(seed, spread, count, centre):
    scores = net(seed, spread=spread)
    chosen = sane(generate(scores, count, centre=centre), count, 4)
    listed = patterns.candidates((3, 3), 4, centre=centre)
    reached = share(scores, chosen) * (1 + 1e-5)
    assert reached >= share(scores, by_greedy(scores, listed, count))
    assert reached >= share(scores, generate(scores, count, method="frequency", centre=centre))
    if count == 4 or (count == 8 and not centre):
        assert reached >= share(scores, patterns.fixed_set(count))
    assert in_order(chosen) and (chosen[:, 1, 1].all() or not centre)


def test_coverage_finds_the_published_set_where_it_is_best():
    published = patterns.fixed_set(8)
    scores = np.where(published.transpose(1, 2, 0)[:, :, None], 1.0, 1e-3)
    assert set(texts(generate({"k": scores}, 8))) == set(texts(published))


@few_examples
@given(
    seed=st.integers(0, 2**16),
    case=st.sampled_from([((2, 2), 2, 2), ((2, 2), 1, 3), ((1, 5), 2, 3), ((3, 3), 1, 3), ((3, 3), 8, 2)]),
)
def test_coverage_against_every_possible_set(seed, case):
    size, entries, count = case
    scores = net(seed, shapes=((*size, 3, 5), (*size, 2, 2)), spread=1.0)
    listed = patterns.candidates(size, entries)
    every = [share(scores, listed[list(picks)]) for picks in itertools.combinations(range(len(listed)), count)]
    chosen = sane(generate(scores, count, entries=entries), count, entries, size)
    reached = share(scores, chosen)
    assert (1 - 1 / math.e) * max(every) <= reached <= max(every) * (1 + 1e-6)
    # No single exchange helps.
    rest = [pattern for pattern in listed if patterns.to_text(pattern) not in texts(chosen)]
    for place, other in itertools.product(range(count), rest):
        changed = chosen.copy()
        changed[place] = other
        assert share(scores, changed) <= reached * (1 + 1e-5)


def test_exchanges_mend_what_greedy_misses():
    # Three items on kernels of weight 1: greedy takes the wide middle one first, and then one of the others.
    retained = np.zeros((3, 1, WIDTH), np.float32)
    retained[0, 0, :3], retained[1, 0, 1:5], retained[2, 0, 3:6] = 1, 1, 1
    clash, usable = np.eye(3, dtype=bool), np.ones(3, bool)
    first = greedy(jnp.asarray(retained), jnp.asarray(clash), jnp.asarray(usable), 2)
    assert first.tolist() == [1, 0]
    assert sorted(exchange(jnp.asarray(retained), jnp.asarray(clash), jnp.asarray(usable), first).tolist()) == [0, 2]
    # Not where the better item clashes with one that stays, or is not usable.
    clash[0, 2] = clash[2, 0] = True
    assert 1 in exchange(jnp.asarray(retained), jnp.asarray(clash), jnp.asarray(usable), first)
    usable[2] = False
    assert 2 not in exchange(jnp.asarray(retained), jnp.eye(3, dtype=bool), jnp.asarray(usable), first)


@pytest.mark.parametrize("max_kernels", [128, 200])
def test_sampled_search_is_close_and_behind_neither_of_its_starts(max_kernels):
    scores = net(3, shapes=((3, 3, 16, 16), (3, 3, 32, 32)))
    chosen = sane(generate(scores, 8, max_kernels=max_kernels), 8, 4)
    assert share(scores, chosen) > 0.98 * share(scores, generate(scores, 8))
    assert share(scores, chosen) >= share(scores, patterns.fixed_set(8)) * (1 - 1e-6)
    assert share(scores, chosen) >= share(scores, generate(scores, 8, method="frequency")) * (1 - 1e-6)


def test_a_sample_stands_for_the_whole():
    scores = net(4, shapes=((3, 3, 24, 32), (3, 3, 8, 8), (3, 3, 4, 4)))
    scores["Conv_2"]["kernel"] *= 0
    kernels = gather(jax.tree.leaves(scores))
    drawn, weights = sample(kernels, 300)
    assert drawn.shape == (9, 2, WIDTH)
    # A tap's share of the sample is about that of the whole.
    whole = np.asarray(kernels.scores * kernels.weights, np.float64).sum(axis=(1, 2))
    stand_in = np.asarray(drawn * weights, np.float64).sum(axis=(1, 2))
    assert whole.sum() == pytest.approx(2, rel=1e-5) and stand_in.sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(stand_in, whole / 2, rtol=0.1)
    # Every draw stands for the same score.
    each = np.asarray((drawn * weights).sum(axis=0)).reshape(-1)
    np.testing.assert_allclose(each, [1 / 300] * 300 + [0] * (2 * WIDTH - 300), rtol=1e-5)
    everything = sample(kernels, kernels.number)
    np.testing.assert_array_equal(everything[0], kernels.scores)
    assert np.isfinite(sample(gather([jnp.zeros((3, 3, 4, 4))]), 5)[0]).all()


# frequency


def test_frequency_counts_kernels_and_layers_alike():
    """A small layer's kernels weigh more; ties go to the first candidate; kernels without a score do not vote."""

    def layer(*wanted):
        kernels = np.stack([patterns.parse(text) for text in wanted], axis=-1)[:, :, None]
        return jnp.asarray(kernels * np.linspace(1, 50, len(wanted)), jnp.float32)

    a, b, c, d = "110/110/000", "011/011/000", "000/110/110", "000/011/011"
    scores = {"small": layer(a, a, b), "large": layer(*[c] * 5, *[d] * 3, "000/000/000")}
    # Votes: a 2/3, c 5/8, d 3/8, b 1/3.
    assert texts(generate(scores, 1, method="frequency")) == [a]
    assert texts(generate(scores, 2, method="frequency")) == [a, c]
    assert texts(generate(scores, 3, method="frequency")) == [a, c, d]
    # The fifth has no vote: the first of all candidates.
    assert texts(generate(scores, 5, method="frequency")) == ["111/100/000", a, b, c, d]
    flat = {"k": jnp.ones((3, 3, 2, 2))}
    assert texts(generate(flat, 1, method="frequency")) == ["111/100/000"]
    assert texts(generate(flat, 1, method="frequency", centre=True)) == ["111/010/000"]


@pytest.mark.parametrize("shapes", [((3, 3, 5, 7),), ((5, 5, 3, 4), (5, 5, 4, 8))])
def test_frequency_against_a_count_in_loops(shapes):
    scores = {
        f"Conv_{index}": jnp.asarray(np.random.default_rng(index).random(shape), jnp.float32)
        for index, shape in enumerate(shapes)
    }
    size = shapes[0][:2]
    tally = {}
    for leaf in scores.values():
        for kernel in np.asarray(leaf).reshape(math.prod(size), -1).T:
            kept = tuple(sorted(np.argsort(-kernel, kind="stable")[:2]))
            tally[kept] = tally.get(kept, 0) + 1 / leaf[0, 0].size
    ranking = sorted(tally, key=lambda kept: (-round(tally[kept], 6), kept))[:3]
    chosen = sane(generate(scores, 3, entries=2, method="frequency"), 3, 2, size)
    assert sorted(tuple(np.flatnonzero(pattern)) for pattern in chosen) == sorted(ranking)


# larger kernels


def test_5x5_kernels_are_given_what_they_rank_top():
    rng = np.random.default_rng(0)
    planted = np.zeros((3, 25), bool)
    planted[0, [0, 1, 5, 6]] = planted[1, [12, 13, 17, 18]] = planted[2, [4, 9, 14, 19]] = True
    kernels = planted[rng.integers(0, 3, 40)] + 0.1 * rng.random((40, 25))
    scores = {"k": jnp.asarray(kernels.T.reshape(5, 5, 4, 10), jnp.float32), "other": jnp.ones((3, 3, 2, 2))}
    for method in ("coverage", "frequency"):
        chosen = sane(generate(scores, 3, method=method, kernel_size=(5, 5)), 3, 4, (5, 5))
        assert {tuple(pattern) for pattern in chosen.reshape(3, 25)} == {tuple(pattern) for pattern in planted}
    # More patterns than the kernels have different top sets.
    more = sane(generate(scores, 9, kernel_size=(5, 5)), 9, 4, (5, 5))
    assert set(texts(planted.reshape(3, 5, 5))) <= set(texts(more)) and in_order(more)
    centred = sane(generate(scores, 2, kernel_size=(5, 5), centre=True, entries=3), 2, 3, (5, 5))
    assert centred[:, 2, 2].all()


# complementary pairs


@few_examples
@given(seed=st.integers(0, 2**16), case=st.sampled_from([(2, 4), (8, 4), (4, 3)]))
def test_complementary_patterns_come_in_disjoint_pairs(seed, case):
    count, entries = case
    scores = net(seed)
    chosen = sane(generate(scores, count, entries=entries, complementary=True), count, entries)
    assert not (chosen[0::2] & chosen[1::2]).any()
    assert in_order(chosen[0::2])
    if count == 2:
        listed = patterns.candidates((3, 3), entries)
        pairs = [pair for pair in itertools.combinations(listed, 2) if not (pair[0] & pair[1]).any()]
        assert share(scores, chosen) >= max(share(scores, pair) for pair in pairs) * (1 - 1e-6)


def test_complementary_pairs_of_a_net_without_scores():
    chosen = sane(generate(jax.tree.map(jnp.zeros_like, net()), 70, complementary=True), 70, 4)
    assert not (chosen[0::2] & chosen[1::2]).any()


# all kinds


@pytest.mark.parametrize("method", ["coverage", "frequency"])
@pytest.mark.parametrize("entries, count", [(1, 9), (1, 4), (8, 9), (8, 2), (4, 126)])
def test_any_number_of_entries(method, entries, count):
    chosen = sane(generate(net(shapes=((3, 3, 4, 6),)), count, entries=entries, method=method), count, entries)
    assert in_order(chosen)


@pytest.mark.parametrize("method", ["coverage", "frequency"])
def test_a_layer_of_zeros_changes_nothing(method):
    scores = net()
    with_zeros = {**scores, "Conv_9": jnp.zeros((3, 3, 30, 30))}
    np.testing.assert_array_equal(generate(scores, 8, method=method), generate(with_zeros, 8, method=method))
    nothing = sane(generate({"k": jnp.zeros((3, 3, 5, 5))}, 12, method=method), 12, 4)
    assert in_order(nothing)


def test_layers_count_alike_whatever_their_scale():
    scores = net()
    scaled = {**scores, "Conv_0": {"kernel": scores["Conv_0"]["kernel"] * 2.0**20}}
    np.testing.assert_array_equal(generate(scores, 4), generate(scaled, 4))


@pytest.mark.parametrize("options", [{}, {"method": "frequency"}, {"complementary": True}, {"max_kernels": 150}])
def test_outside_jit_inside_jit_and_in_other_containers(options):
    scores = net(7)
    expected = generate(scores, 4, **options)
    np.testing.assert_array_equal(patterns.generate(scores, 4, **options), expected)
    listed = [np.asarray(leaf) for leaf in jax.tree.leaves(scores)]
    np.testing.assert_array_equal(patterns.generate([None, *listed, np.ones(4)], 4, **options), expected)


# Generated


def test_sets_of_a_net():
    scores = {name: node["kernel"] for name, node in net(shapes=((3, 3, 4, 4), (3, 3, 4, 8), (3, 3, 8, 4))).items()}
    scores |= {"1x1": jnp.ones((1, 1, 4, 4)), "5x5": jnp.asarray(np.random.default_rng(0).random((5, 5, 3, 4)))}
    entries = {"Conv_0": 4, "Conv_1": 4, "Conv_2": 3, "1x1": 4, "5x5": 4}
    make = partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})

    @make
    def sets(generated, entries, scores):
        return generated.sets(scores, dict(entries))

    together = sets(Generated(4), tuple(entries.items()), scores)
    assert set(together) == {"Conv_0", "Conv_1", "Conv_2", "5x5"}
    np.testing.assert_array_equal(together["Conv_0"], together["Conv_1"])
    alike = {name: scores[name] for name in ("Conv_0", "Conv_1")}
    np.testing.assert_array_equal(together["Conv_0"], generate(alike, 4))
    sane(together["Conv_2"], 4, 3)
    sane(together["5x5"], 4, 4, (5, 5))
    apart = sets(Generated(4, "frequency", per_layer=True), (("Conv_0", 4), ("Conv_1", 4)), scores)
    for name in ("Conv_0", "Conv_1"):
        np.testing.assert_array_equal(apart[name], generate({name: scores[name]}, 4, method="frequency"))
    assert texts(apart["Conv_0"]) != texts(apart["Conv_1"])
    with pytest.raises(ValueError, match="no scores for 'Conv_7'"):
        Generated(4).sets(scores, {"Conv_7": 4})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"num_patterns": 0}, "num_patterns=0"),
        ({"num_patterns": 256}, "num_patterns=256"),
        ({"num_patterns": True}, "num_patterns=True"),
        ({"num_patterns": 4, "method": "best"}, "method='best'"),
        ({"num_patterns": 4, "centre": 1}, "centre=1"),
        ({"num_patterns": 3, "complementary": True}, "pairs"),
        ({"num_patterns": 4, "complementary": True, "centre": True}, "centre"),
        ({"num_patterns": 4, "complementary": True, "method": "frequency"}, "coverage"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        Generated(**options)


@pytest.mark.parametrize(
    "count, options, said",
    [
        (0, {}, "num_patterns=0"),
        (127, {}, "there are 126 patterns of 4 of 3x3 taps"),
        (57, {"centre": True}, "there are 56 .* with the centre"),
        (4, {"entries": 0}, "entries=0: expected 1 to 8"),
        (4, {"entries": 9}, "entries=9"),
        (4, {"entries": 2.0}, "entries=2.0"),
        (4, {"method": "random"}, "method='random'"),
        (4, {"max_kernels": 0}, "max_kernels=0"),
        (4, {"names": ["Conv_5/kernel"]}, "no leaf 'Conv_5/kernel'"),
        (4, {"names": []}, "nothing to go by"),
        (4, {"kernel_size": (5, 5)}, r"kernel_size=\(5, 5\)"),
        (4, {"kernel_size": 3}, "kernel_size=3: expected"),
        (4, {"entries": 5, "complementary": True}, "no pairs of disjoint"),
        (72, {"complementary": True}, "up to 70 complementary"),
        (5, {"complementary": True}, "pairs"),
    ],
)
def test_bad_input(count, options, said):
    with pytest.raises(ValueError, match=said):
        patterns.generate(net(), count, **options)


def test_bad_scores():
    with pytest.raises(ValueError, match="several sizes"):
        patterns.generate({"a": jnp.ones((3, 3, 2, 2)), "b": jnp.ones((5, 5, 2, 2))}, 4)
    with pytest.raises(ValueError, match="no centre tap"):
        patterns.generate({"a": jnp.ones((2, 2, 2, 2))}, 1, entries=2, centre=True)
    with pytest.raises(ValueError, match="nothing to go by"):
        patterns.generate({"a": jnp.ones((1, 1, 2, 2)), "b": jnp.ones((3, 2))}, 4)
    for value in (jnp.nan, jnp.inf, -1.0):
        with pytest.raises(ValueError, match="'a' hold NaN, infinite or negative"):
            patterns.generate({"a": jnp.ones((3, 3, 2, 2)).at[0, 0, 0, 0].set(value)}, 4)
    with pytest.raises(ValueError, match="up to 9 taps"):
        patterns.candidates((5, 5), 4)
    with pytest.raises(ValueError, match="patterns of 3x3 taps"):
        patterns.objective(net(), patterns.fixed_set(4), kernel_size=(5, 5))
