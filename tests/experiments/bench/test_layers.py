"""The benchmark of the CPU's kernels: references by hand, other libraries judged and timed in turns, tables."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.bench import conv_engines, conv_ways
from experiments.bench import layers as bench_layers
from experiments.bench.conv_engines import ConvEngine
from experiments.bench.worker import Process
from experiments.report import benchmarks, layers
from pallas_kernels.pattern_conv import cases

CASES = tuple(
    cases.Case(f"net-n2-5x4-16-tile{filters}-{name}", (5, 4), 2, 16, 16, tile=(filters, 1), removed=removed)
    for filters, name, removed in ((16, "5.6x", 0.6), (1, "2.25x", 0.0))
)
# Speaks the protocol; answers what it was told to.
FAKE = """
import json, sys, pathlib, numpy as np
print(json.dumps({"version": "torch 0"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "sample":
        answer = {"seconds": 1e-9, "calls": asked["calls"]}
    else:
        path = pathlib.Path(asked["arrays"])
        with np.load(path) as arrays:
            shape = arrays["w" if asked["direction"] == "weight gradient" else "x"].shape
        np.savez(path.with_name("results.npz"), wrong=np.zeros(shape, np.float32))
        answer = {"results": str(path.with_name("results.npz"))}
    print(json.dumps(answer), flush=True)
"""


class FakeEngine(ConvEngine):
    def __init__(self, engine, python):
        Process.__init__(self, [sys.executable, "-c", FAKE])
        self.engine = engine


@pytest.mark.parametrize("name", ["stride-2-even-padded", "lopsided-padding", "window-1x3", "valid"])
@pytest.mark.parametrize("direction", conv_ways.DIRECTIONS)
def test_the_reference_in_numpy_is_the_one_in_xla(name, direction):
    case = next(case for case in cases.SMALL if case.name == name)
    problem = conv_ways.make_problem(case, np.random.default_rng())
    wanted = conv_ways.expected(problem, direction, on_cpu=True)
    np.testing.assert_allclose(bench_layers.reference(problem, direction), wanted, rtol=1e-5, atol=1e-5)


def test_masks_of_a_layer_are_timed_beside_its_dense_forms():
    rows = list(bench_layers.measure(CASES, np.random.default_rng(), rounds=1))
    assert [row["direction"] for row in rows] == list(conv_ways.DIRECTIONS)
    for row in rows:
        assert not row["wrong"] and row["layer"] == "net 5x4, 16 to 16" and row["batch"] == 2
        dense = {way["name"]: way for way in row["ways"] if way["mask"] is None}
        assert "ClickTrain dense" in dense and len(dense) == 2 and dense[row["dense"]]["ratio"] == 1
        kinds = ("cpu", "cpu packed") if row["direction"] == "forward" else ("cpu",)
        ours = {way["name"] for way in row["ways"] if way["mask"] is not None}
        assert ours == {f"{kind} {mask}" for kind in kinds for mask in ("16-5.6x", "1-2.25x")}


def test_a_layer_in_a_chain_is_timed_by_the_call():
    (row,) = bench_layers.measure(CASES, np.random.default_rng(), directions=["forward"], rounds=1, chain=3)
    assert row["direction"] == "forward, 3 in a program" and not row["wrong"]
    assert {way["name"] for way in row["ways"] if way["mask"] is None} == {"XLA", "ClickTrain dense"}
    assert {way["name"] for way in row["ways"] if way["mask"]} == {"cpu packed 16-5.6x", "cpu packed 1-2.25x"}
    assert layers.goal_of(row["direction"], ((64, 1), 5.6)) == 4.5
    # Three calls are one after the other: what is right is not what one call gives.
    problem = conv_ways.make_problem(CASES[0], np.random.default_rng(0))
    once = bench_layers.reference(problem, "forward")
    again = dataclasses.replace(problem, x={"NHWC": once})
    wanted = bench_layers.reference(again, "forward")
    np.testing.assert_array_equal(bench_layers.reference(problem, "forward", 2), wanted)


def test_a_chain_takes_layers_that_can_follow_themselves(monkeypatch, tmp_path, capsys):
    unlike = dataclasses.replace(CASES[0], cout=32)
    monkeypatch.setattr(cases, "CPU", (unlike, CASES[0]))
    path = tmp_path / "layers.json"
    assert main(["bench", "conv", "--which", "cpu", "--rounds", "1", "--chain", "2", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["chain"] == 2 and [row["layer"] for row in record["results"]] == ["net 5x4, 16 to 16"]
    assert "one call's share of 2 in one program" in capsys.readouterr().out
    monkeypatch.setattr(cases, "CPU", (unlike,))
    assert main(["bench", "conv", "--which", "cpu", "--chain", "2"]) == 2
    assert "--chain 2: expected" in capsys.readouterr().err


def test_wrong_answers_of_another_library_are_not_timed():
    with FakeEngine("torch", "python") as engine:
        (row,) = bench_layers.measure(CASES[:1], np.random.default_rng(), [engine], directions=["forward"], rounds=1)
        assert engine.version == "torch 0" and "wrong by 1" in row["wrong"]["wrong"]
    assert "wrong" not in {way["name"] for way in row["ways"]}


def test_another_library_is_asked_for_so_many_calls(monkeypatch):
    monkeypatch.setattr(conv_engines, "_REST_S", 0.0)
    with FakeEngine("torch", "python") as engine:
        assert conv_engines.Remote(engine, "right").sample(5) == pytest.approx(5e-9)


def test_the_command_saves_what_its_tables_show(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "CPU", CASES)
    path = tmp_path / "layers.json"
    assert main(["bench", "conv", "--which", "cpu", "--rounds", "1", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["what"] == "layers" and len(record["results"]) == 3
    table = capsys.readouterr().out
    assert table == benchmarks.tables_of(record) + "\n" and "not measured" in table
    for part in ("### What it comes to", "### weight gradient", "### Dense forms", "(16, 1) 5.6x", "3.3: in "):
        assert part in table


def test_an_interpreter_without_the_libraries_is_refused(capsys):
    assert main(["bench", "conv", "--which", "cpu", "--engines-python", "/no/such/python"]) == 2
    assert "has none of the engines" in capsys.readouterr().err


def test_tables_by_hand():
    def way(name, median, tile=None, reduction=5.63):
        mask = None if tile is None else {"tile": [tile, 1], "reduction": reduction}
        return {"name": name, "mask": mask, "median": median, "ratio": 8.0 / median}

    row = {
        "layer": "vgg13 8x8, 512 to 512",
        "batch": 1,
        "direction": "forward",
        "dense_flops": 8e9,
        "dense": "onnxruntime",
        "wrong": {},
        "ways": [
            way("onnxruntime", 8.0),
            way("XLA", 16.0),
            way("cpu 64-5.6x", 2.0, 64),
            way("cpu packed 64-5.6x", 1.6, 64),
            way("cpu packed 1-2.25x", 8.0, 1, 2.25),
        ],
    }
    other = {**row, "layer": "another", "ways": [way("onnxruntime", 8.0), way("cpu packed 64-5.6x", 4.0, 64, 5.61)]}
    summary = layers.summary_table([row, other])
    # Of 5 and 2 the geometric mean; one reaches the goal.
    assert "| 3.16 " in summary and "4.5: in 1 of 2" in summary and "1.3: in 0 of 1" in summary
    table = layers.ratio_table([row, other])
    assert "5.00 (4.00)" in table and "| onnxruntime" in table and "(64, 1) 5.6x" in table
    assert "16000" in layers.dense_table([row]) or "1.6e+04" in layers.dense_table([row])
    assert layers.goal_of("input gradient", ((1, 1), 5.6)) is None
    assert layers.goal_of("weight gradient", ((16, 1), 5.6)) == 3
