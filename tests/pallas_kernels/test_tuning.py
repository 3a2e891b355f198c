"""Cache, timing and choice: what is broken, wrong or foreign is passed over, and two processes do not lose entries."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tuning import Cache, Timing, autotune, cache_folder, device_kind, recall, time_together

FACTS = {"kind": "forward", "shape": (3, 3, 64, 64), "batch": 8, "removed": 0.5}


@pytest.fixture
def cache(tmp_path):
    return Cache("NVIDIA H200", tmp_path / "not yet there")


def test_entries_come_back_by_their_facts(cache):
    assert cache.get(FACTS) is None
    cache.put(FACTS, {"winner": "a"})
    cache.put({**FACTS, "batch": 16}, {"winner": "b"})
    same = Cache("NVIDIA H200", cache.path.parent)
    assert same.get(dict(reversed(FACTS.items()))) == {"winner": "a"}
    assert same.get({**FACTS, "batch": 16}) == {"winner": "b"}
    assert same.get({**FACTS, "batch": 32}) is None
    assert Cache("NVIDIA H100", cache.path.parent).get(FACTS) is None
    cache.put(FACTS, {"winner": "c"})
    assert same.get(FACTS) == {"winner": "c"}


def test_the_file_says_device_and_versions(cache):
    cache.put(FACTS, {"winner": "a"})
    content = json.loads(cache.path.read_text())
    assert content["device_kind"] == "NVIDIA H200" and cache.path.name == "nvidia-h200.json"
    (versions,) = content["versions"]
    assert f"jax {jax.__version__}," in versions and "jaxlib" in versions


def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    assert Cache("x").path == tmp_path / "x.json"
    monkeypatch.delenv("CLICKTRAIN_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(cache_folder()) == "/home/somebody/.cache/clicktrain-jax"


def test_a_cpu_is_told_apart_by_its_cores():
    assert device_kind(jax.devices("cpu")[0]).startswith("cpu ") and "cores" in device_kind(jax.devices("cpu")[0])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{half",
        "[]",
        '{"format": 99, "device_kind": "NVIDIA H200", "versions": {}}',
        '{"format": 1, "device_kind": "another", "versions": {}}',
        '{"format": 1, "device_kind": "NVIDIA H200", "versions": {"jax 1": 3}}',
        '{"format": 1, "device_kind": "NVIDIA H200"}',
        b"\xff\xfe\x00",
    ],
)
def test_a_broken_file_is_passed_over_and_gives_way(cache, text):
    cache.path.parent.mkdir()
    cache.path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match="is not used"):
        assert cache.get(FACTS) is None
    cache.put(FACTS, {"winner": "a"})
    assert cache.get(FACTS) == {"winner": "a"}


def test_other_versions_are_passed_over_with_a_warning_and_kept(cache):
    cache.put(FACTS, {"winner": "a"})
    cache.versions = "jax 99, jaxlib 99"
    with pytest.warns(UserWarning, match=f"measured with jax {jax.__version__}.*not with jax 99"):
        assert cache.get(FACTS) is None
    cache.put(FACTS, {"winner": "b"})
    assert cache.get(FACTS) == {"winner": "b"}
    assert Cache("NVIDIA H200", cache.path.parent).get(FACTS) == {"winner": "a"}


def test_a_strange_entry_is_none(cache):
    cache.put(FACTS, {"winner": "a"})
    cache.path.write_text(cache.path.read_text().replace('{\n    "winner": "a"\n   }', '"a"'))
    assert '"a"' in cache.path.read_text() and "winner" not in cache.path.read_text()
    assert cache.get(FACTS) is None


def test_where_nothing_can_be_written_there_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache("NVIDIA H200", tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="could not be kept"):
        cache.put(FACTS, {"winner": "a"})


@pytest.mark.parametrize("bad", [{"x": np.float32(1)}, {"x": float("nan")}, {"x": {1, 2}}])
def test_facts_and_entries_that_are_not_plain_data_are_refused(cache, bad):
    with pytest.raises(ValueError, match="plain data"):
        cache.get(bad)
    with pytest.raises(ValueError, match="plain data"):
        cache.put(FACTS, bad)
    assert not cache.path.exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(cache, monkeypatch):
    cache.put(FACTS, {"winner": "a"})

    def fails(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", fails)
        with pytest.warns(UserWarning, match="disk full"):
            cache.put(FACTS, {"winner": "b"})
    assert cache.get(FACTS) == {"winner": "a"}
    assert {path.suffix for path in cache.path.parent.iterdir()} == {".json", ".lock"}


WRITER = """
import sys
from pallas_kernels.tuning.cache import Cache
cache = Cache("NVIDIA H200", sys.argv[1])
for index in range(40):
    cache.put({"writer": sys.argv[2], "index": index}, {"winner": "x"})
    cache.get({"writer": "another", "index": index})
"""


def test_two_processes_lose_nothing(tmp_path):
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, str(tmp_path), name], stderr=subprocess.PIPE)
        for name in ("one", "two")
    ]
    said = [process.communicate(timeout=120)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    cache = Cache("NVIDIA H200", tmp_path)
    assert all(cache.get({"writer": name, "index": i}) for name in ("one", "two") for i in range(40))


class Clock:
    """Time that passes only as the functions say."""

    def __init__(self):
        self.now_s = 0.0
        self.calls = []

    def __call__(self):
        return self.now_s

    def function(self, name, durations_s):
        remaining = iter(durations_s)
        last = None

        def run():
            nonlocal last
            last = next(remaining, last)
            self.now_s += last
            self.calls.append(name)
            return jnp.zeros(())

        return run


def test_median_and_percentiles_of_one_call():
    clock = Clock()
    functions = {"a": clock.function("a", [9.0, 3.0, 3.0, 7.0, 1.0, 2.0, 3.0, 4.0, 5.0])}
    timing = time_together(functions, rounds=5, warmup=2, clock=clock)["a"]
    assert timing == Timing(median_s=3.0, low_s=pytest.approx(1.8), high_s=pytest.approx(4.2), samples=5, calls=1)


def test_functions_are_interleaved_and_take_turns_to_begin():
    clock = Clock()
    time_together({name: clock.function(name, [1.0]) for name in "abc"}, rounds=3, warmup=1, clock=clock)
    assert "".join(clock.calls) == "abc" + "aabbcc" + "abc" + "bca" + "cab"


def test_short_calls_are_timed_in_runs():
    clock = Clock()
    functions = {"short": clock.function("short", [0.25]), "long": clock.function("long", [4.0])}
    timings = time_together(functions, rounds=2, warmup=1, sample_s=2.0, clock=clock)
    assert (timings["short"].calls, timings["long"].calls) == (8, 1)
    assert (timings["short"].median_s, timings["long"].median_s) == (0.25, 4.0)


def test_a_cold_first_call_makes_no_samples_shorter():
    clock = Clock()
    functions = {"cold": clock.function("cold", [9.0, 1.0, 0.25]), "warm": clock.function("warm", [0.25])}
    timings = time_together(functions, rounds=2, warmup=1, sample_s=2.0, clock=clock)
    assert timings["warm"].calls == 8 and timings["cold"].calls == 8


def test_a_clock_that_does_not_move_is_no_division_by_zero():
    timings = time_together({"a": lambda: jnp.zeros(())}, rounds=2, clock=lambda: 0.0)
    assert timings["a"].median_s == 0 and timings["a"].calls == 1000


def test_the_budget_ends_the_rounds_but_three():
    clock = Clock()
    timings = time_together({"a": clock.function("a", [1.0])}, rounds=50, warmup=1, budget_s=5.5, clock=clock)
    assert timings["a"].samples == 6
    timings = time_together({"a": clock.function("a", [10.0])}, rounds=50, warmup=1, budget_s=5.5, clock=clock)
    assert timings["a"].samples == 3


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"warmup": 0}])
def test_nothing_to_time_is_refused(bad):
    with pytest.raises(ValueError, match="at least one"):
        time_together({"a": lambda: 0}, **bad)
    with pytest.raises(ValueError, match="at least one function"):
        time_together({})


def test_results_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(tree))
    time_together({"a": lambda: "result"}, rounds=3, warmup=1, clock=iter(range(100)).__next__)
    assert waited == ["result"] * 6


def timer_of(**medians_s):
    """A timer that knows; every name it is asked for must be there."""

    def timer(functions, rounds, budget_s):
        return {name: Timing(medians_s[name], 0.0, 0.0, rounds, 1) for name in functions}

    return timer


RIGHT = {"y": np.asarray([1.0, -2.0], np.float32)}


def right():
    return {"y": jnp.asarray([1.0, -2.0001])}


def failing():
    raise NotImplementedError("no such instruction\nmore")


@pytest.mark.parametrize(
    ("medians_s", "winner"),
    [
        ({"a": 3.0, "b": 1.0, "c": 2.0}, "b"),
        ({"a": 1.01, "b": 1.0, "c": 2.0}, "a"),  # within the margin: the preferred one stays
        ({"a": 1.04, "b": 1.01, "c": 1.0}, "b"),
    ],
)
def test_the_fastest_wins_unless_an_earlier_one_is_as_fast(cache, medians_s, winner):
    candidates = dict.fromkeys("abc", right)
    choice = autotune(candidates, RIGHT, FACTS, tolerance=1e-3, cache=cache, timer=timer_of(**medians_s))
    assert (choice.winner, choice.remembered, choice.dropped) == (winner, False, {})
    assert choice.timings.keys() == set("abc")
    assert recall(FACTS, candidates, cache).winner == winner


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (failing, "NotImplementedError: no such instruction$"),
        (lambda: {"y": jnp.asarray([1.0, -2.1])}, "wrong by 0.05 of the largest value, 0.001 is allowed"),
        (lambda: {"y": jnp.asarray([1.0, jnp.nan])}, "wrong by nan"),
        (lambda: {"y": jnp.asarray([jnp.inf, -2.0])}, "wrong by inf"),
        (lambda: {"y": jnp.ones((2, 1))}, r"shape \(2, 1\), not \(2,\)"),
        (lambda: jnp.ones(2), "it returns PyTreeDef"),
    ],
)
def test_a_wrong_or_failing_candidate_is_never_timed(cache, bad, reason):
    # The timer would fail on the name "bad".
    with pytest.warns(UserWarning, match="'bad' .* is left out"):
        choice = autotune(
            {"bad": bad, "good": right}, RIGHT, FACTS, tolerance=1e-3, cache=cache, timer=timer_of(good=1.0)
        )
    assert choice.winner == "good" and list(choice.timings) == ["good"] and list(choice.dropped) == ["bad"]
    assert re.search(reason, choice.dropped["bad"])


def test_when_all_fail_the_reasons_are_named(cache):
    with pytest.raises(RuntimeError, match="bad: NotImplementedError: no such instruction"):
        autotune({"bad": failing}, RIGHT, FACTS, tolerance=1e-3, cache=cache)
    assert not cache.path.exists()


def test_a_remembered_choice_runs_nothing(cache):
    cache.put(FACTS, {"winner": "b"})
    choice = autotune({"a": failing, "b": failing}, RIGHT, FACTS, tolerance=1e-3, cache=cache, timer=None)
    assert (choice.winner, choice.remembered) == ("b", True)


@pytest.mark.parametrize("entry", [{"winner": "gone"}, {"winner": ["a"]}, {}])
def test_a_remembered_choice_that_is_no_candidate_is_measured_anew(cache, entry):
    cache.put(FACTS, entry)
    choice = autotune({"a": right}, RIGHT, FACTS, tolerance=1e-3, cache=cache, timer=timer_of(a=1.0))
    assert (choice.winner, choice.remembered) == ("a", False)
    assert cache.get(FACTS)["winner"] == "a"


def test_without_a_cache_and_with_the_real_timer():
    candidates = {"sum": lambda: jnp.arange(10.0).sum(), "wrong": lambda: jnp.float32(44)}
    with pytest.warns(UserWarning, match="'wrong'"):
        choice = autotune(candidates, np.float32(45), FACTS, tolerance=1e-6, rounds=3)
    assert choice.winner == "sum" and choice.timings["sum"].samples == 3


def test_no_candidates_are_refused():
    with pytest.raises(ValueError, match="at least one candidate"):
        autotune({}, RIGHT, FACTS, tolerance=1e-3)
