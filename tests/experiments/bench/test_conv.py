"""The convolutions' benchmark: its ways are right, wrong ones are found out, its figures follow from what was timed."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.bench import conv as bench_conv
from experiments.bench import conv_ways
from experiments.bench import step as bench_step
from experiments.report import benchmarks, conv
from pallas_kernels.pattern_conv import cases

CEILINGS = {"flops_per_s": 1e9, "bytes_per_s": 1e9, "what": "nothing"}
KNOWN = {case.name: case for case in cases.SMALL}
WAYS = {
    "forward": {"XLA", "patches", "backend dense", "xla", "xla packed", "cpu", "cpu packed", conv_ways.OPEN},
    "input gradient": {"XLA", "flipped", "flipped patches", "backend dense", "xla", "cpu", conv_ways.OPEN},
    "weight gradient": {"XLA", "patches", "channel-major patches", "backend dense", "xla", "cpu", conv_ways.OPEN},
}


@pytest.mark.parametrize("name", ["short-last-tiles", "stride-2-even-padded", "stride-2-by-1-hwnc", "lopsided-padding"])
def test_every_way_is_right_and_timed(name):
    rows = list(bench_conv.measure([KNOWN[name]], np.random.default_rng(), CEILINGS, rounds=1))
    assert [row["direction"] for row in rows] == list(conv_ways.DIRECTIONS)
    for row in rows:
        # The native kernels know one layout.
        native = {"cpu", "cpu packed"} & WAYS[row["direction"]] if KNOWN[name].layout == "HWNC" else set()
        assert not row["wrong"] and set(row["refused"]) == {"mosaic_gpu"} | native
        assert {way["name"] for way in row["ways"]} == WAYS[row["direction"]] - native
        fastest = min((way for way in row["ways"] if not way["ours"]), key=lambda way: way["median"])
        assert row["dense"] == fastest["name"] and fastest["ratio"] == 1
        for way in row["ways"]:
            assert way["p20"] <= way["median"] <= way["p80"] and way["error"] <= 1e-5
            assert way["floor_share"] == pytest.approx(row["floor_s"] / way["median"])


def test_both_layouts_beside_each_other():
    case = dataclasses.replace(KNOWN["short-last-tiles-hwnc"], dtype="bfloat16")
    (row,) = bench_conv.measure(
        [case], np.random.default_rng(), CEILINGS, directions=["forward"], layouts=("NHWC", "HWNC"), rounds=1
    )
    wanted = {f"{name} {layout}" for name in ("XLA", "backend dense", "xla") for layout in ("NHWC", "HWNC")}
    assert {way["name"] for way in row["ways"]} == wanted | {"xla packed", conv_ways.OPEN} and not row["wrong"]


@pytest.mark.parametrize(
    ("direction", "spoil", "message"),
    [
        ("forward", lambda y: y.at[0, 0, 0, 0].add(0.1), "wrong by"),
        ("forward", lambda y: y.at[-1, 0, 0, 0].set(jnp.nan), "not finite"),
        ("input gradient", lambda dx: 1.001 * dx, "wrong by"),
        ("weight gradient", lambda dw: dw + 1e-7, "not exactly zero"),
    ],
)
def test_a_wrong_way_is_found_out(direction, spoil, message):
    problem = conv_ways.make_problem(KNOWN["short-last-tiles"], np.random.default_rng())
    wanted = conv_ways.expected(problem, direction, on_cpu=True)
    way = next(way for way in conv_ways.ways(problem, direction)[0] if way.name == "xla")
    assert conv_ways.judge(way, direction, wanted, problem)[1] is None
    spoilt = dataclasses.replace(way, function=lambda *arguments: spoil(way.function(*arguments)))
    assert message in conv_ways.judge(spoilt, direction, wanted, problem)[1]


def test_a_wrong_way_is_recorded_and_not_timed(monkeypatch):
    monkeypatch.setitem(conv_ways.BOUNDS, "float32", -1.0)
    (row,) = bench_conv.measure(
        [KNOWN["one-pixel"]], np.random.default_rng(), CEILINGS, directions=["forward"], rounds=1
    )
    assert not row["ways"] and row["dense"] is None and set(row["wrong"]) == WAYS["forward"]
    # A table of nothing but trouble is still a table.
    assert conv.layer_table([row]) and "wrong, not timed" in conv.troubles([row])


def test_work_by_hand():
    # 2 images of 4x4, whole 3x3 kernels, 2 of 4 tiles removed: the corner taps meet 9 pixels, edges 12, the middle 16.
    case = cases.Case("whole", (4, 4), 2, 2, 2, tile=(1, 1), patterns=(), removed=0.5)
    problem = conv_ways.make_problem(case, np.random.default_rng())
    work = bench_conv.work_of(problem, "forward")
    assert work["flops"] == 2 * 2 * 2 * (4 * 9 + 4 * 12 + 16)
    assert work["dense_flops"] == 2 * 2 * 16 * 9 * 4 and work["reduction"] == 2
    assert work["bytes"] == 4 * (2 * 16 * 2 * 2 + 18)
    assert bench_conv.work_of(problem, "weight gradient")["bytes"] == 4 * (2 * 16 * 2 * 2 + 36)


def test_goals_are_of_cases_that_exist():
    assert bench_conv.GOALS.keys() <= {case.name for case in cases.PORTABLE}
    assert len(bench_conv.GOALS) == 14


def test_no_layer_of_the_gpu_list_is_empty():
    for case in bench_conv.list_of("gpu"):
        left = np.prod(case.grid) - case.num_removed
        assert left > 0, case.name
        if case.removed:
            assert 7 <= 2.25 * np.prod(case.grid) / left <= 9.5, case.name


def row(case, direction, dense, ours, layers=1, floor=0.25):
    ways = [("XLA", False, dense), ("mosaic_gpu", True, ours)]
    return {
        "case": case,
        "direction": direction,
        "layers": layers,
        "floor_s": floor,
        "dense": "XLA",
        "goal": None,
        "ways": [
            {"name": name, "ours": mine, "note": "", "median": median, "ratio": dense / median}
            for name, mine, median in ways
        ],
    }


def test_means_by_hand():
    rows = [row("vgg16-n512-a-8x", direction, 4.0, 1.0) for direction in conv_ways.DIRECTIONS]
    rows += [row("resnet50-n128-b-8x", direction, 8.0, 1.0, layers=2) for direction in conv_ways.DIRECTIONS]
    mean = conv.mean_ratio(rows, "mosaic_gpu", conv.ALL)
    assert mean["mean"] == pytest.approx((4 * 8 * 8) ** (1 / 3)) and mean["least"] == 4
    assert mean["layers"] == mean["of"] == 3 and mean["floor_share"] == pytest.approx(0.25)
    table = conv.summary_table(rows)
    assert "vgg16-n512 and resnet50-n128, 8x" in table and "3: met; 60% of floor: not met" in table
    # Without one direction a layer counts in none of the sums, and the goal is not judged.
    rows[0]["ways"].pop()
    assert conv.mean_ratio(rows, "mosaic_gpu", conv.ALL)["layers"] == 2
    assert "not measured as a whole" in conv.summary_table(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--which", "gpu"], "jax runs on cpu here"),
        (["--filter", "no-such-layer"], "matches no case"),
        (["--filter", "("], "is no regular expression"),
        (["--rounds", "0"], "rounds=0"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["bench", "conv", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_saves_what_its_tables_show(monkeypatch, tmp_path, capsys):
    small = dataclasses.replace(KNOWN["per-channel"], name="channel-n1-32x32-64")
    monkeypatch.setattr(cases, "PORTABLE", (small,))
    monkeypatch.setattr(bench_conv, "measure_ceilings", lambda: CEILINGS)
    path = tmp_path / "records" / "conv.json"
    assert main(["bench", "conv", "--which", "portable", "--rounds", "1", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert {"date", "versions", "device", "commit"} <= record["setting"].keys() and len(record["load_average"]) == 2
    assert len(record["results"]) == 3 and record["results"][0]["goal"] == 1.2
    table = capsys.readouterr().out
    assert table == conv.conv_tables(record) + "\n"
    # The goal stands beside the figure, whichever way it went.
    assert "1.2: " in table and "### weight gradient" in table


def test_whole_steps_by_hand(monkeypatch):
    measured = [
        {"name": "dense, one", "tile": None, "seconds": [2.0, 4.0, 6.0], "images_per_s": 8.0, "ratio": 1.0},
        {
            "name": "pruned, by pattern in tiles of (64, 1), NHWC",
            "tile": (64, 1),
            "seconds": [1.0, 2.0, 3.0],
            "images_per_s": 16.0,
            "ratio": 2.0,
        },
        {
            "name": "pruned, by pattern in tiles of (1, 1), NHWC",
            "tile": (1, 1),
            "seconds": [1.0, 2.0, 3.0],
            "images_per_s": 16.0,
            "ratio": 2.0,
        },
    ]
    monkeypatch.setattr(bench_step, "measure", lambda *arguments, **options: measured)
    rows = bench_step.measure_step("vgg13", 1.0, 32, 3)
    assert [row["median"] for row in rows] == [4.0, 2.0, 2.0]
    *_, dense, tiled, alone = benchmarks.tables_of({"what": "step", "results": rows}).splitlines()
    assert "2.5: not met" in tiled and "2: met" in alone and "met" not in dense
    # A record of several nets says which, in one table.
    several = [{"net": "vgg13, width 1, N = 32", **row} for row in rows]
    assert "| vgg13, width 1, N = 32" in benchmarks.tables_of({"what": "step", "results": several})


def test_a_trial_is_no_measurement(tmp_path):
    rows = list(bench_conv.measure([KNOWN["one-pixel"]], np.random.default_rng(), CEILINGS, rounds=1))
    setting = {"date": "2026-11-22T10:00:00+00:00", "device": {"platform": "gpu", "kind": "A GPU"}}
    record = {"ok": True, "setting": setting, "ceilings": CEILINGS, "conv_rows": rows, "left_out": ["a-layer"]}
    (tmp_path / "gpu").mkdir()
    for smoke in (True, False):
        (tmp_path / "gpu" / "conv-shift.json").write_text(json.dumps(record | {"smoke": smoke}))
        line = next(line for line in benchmarks.generate(tmp_path).splitlines() if line.startswith("| conv-shift"))
        assert ("not measured" in line) == smoke and ("passed, without a-layer" in line) != smoke
    assert "#### weight gradient" in benchmarks.generate(tmp_path)


def test_ceilings_are_measured():
    found = bench_conv.measure_ceilings(small=True)
    assert found["flops_per_s"] > 0 and found["bytes_per_s"] > 0 and "64 x 64" in found["what"]
