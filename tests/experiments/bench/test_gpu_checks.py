"""The script that spends a GPU's minutes, at a tiny size on whatever is here."""

import json
import time

import pytest

from experiments.bench import conv_ways, gpu_checks, gpu_conv_checks
from pallas_kernels.pattern_conv import cases


def test_masks_check(tmp_path):
    assert gpu_checks.main(["--out", str(tmp_path), "--here", "--smoke", "--only", "masks"]) == 0
    record = json.loads((tmp_path / "masks.json").read_text())
    assert record["ok"] and record["masks_equal"] > 10


def test_a_failing_check_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def fails(smoke, packed):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(gpu_checks, "CHECKS", {"resume": fails, "masks": lambda smoke, packed: {}})
    assert gpu_checks.main(["--out", str(tmp_path), "--here", "--smoke", "--only", "resume", "masks"]) == 1
    assert "no such thing" in json.loads((tmp_path / "resume.json").read_text())["error"]
    assert json.loads((tmp_path / "masks.json").read_text())["ok"]


def test_a_check_that_stops_in_the_middle_keeps_what_it_has(tmp_path, monkeypatch):
    def stops(smoke, packed):
        yield {"rows": [1]}
        yield {"rows": [1, 2]}
        raise AssertionError("the third is wrong")

    monkeypatch.setattr(gpu_checks, "CHECKS", {"steps": stops})
    assert gpu_checks.main(["--out", str(tmp_path), "--here", "--smoke", "--only", "steps"]) == 1
    record = json.loads((tmp_path / "steps.json").read_text())
    assert record["rows"] == [1, 2] and not record["ok"] and "the third is wrong" in record["error"]


def test_a_check_that_hangs_is_stopped_and_recorded(tmp_path, monkeypatch):
    # A process that starts and is killed long before its check could end.
    (tmp_path / "training.json").write_text('{"ok": true, "an older": "record"}')
    start = time.monotonic()
    assert not gpu_checks.run_apart("training", tmp_path, ["--smoke"], 0.5, str(tmp_path))
    assert time.monotonic() - start < 60
    record = json.loads((tmp_path / "training.json").read_text())
    assert not record["ok"] and record["error"] == "stopped after 0 s" and "an older" not in record


def test_what_the_minutes_do_not_reach_is_named(tmp_path, capsys):
    assert gpu_checks.main(["--out", str(tmp_path), "--minutes", "0.1", "--only", "masks", "steps"]) == 1
    assert "--only masks steps" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))


def test_the_convolutions_come_first_and_fit_ten_minutes():
    first = ["conv-correctness", "conv-shift", "conv-sweeps", "conv-dense", "conv-mosaic", "steps"]
    assert list(gpu_checks.CHECKS)[:6] == first
    assert gpu_checks.LIMITS_S.keys() == gpu_checks.CHECKS.keys()
    assert sum(gpu_checks.LIMITS_S[name] for name in first) < 580


def test_wrong_convolutions_fail_the_check(monkeypatch):
    monkeypatch.setattr(cases, "SMALL_BLOCKS", cases.SMALL[:1])
    monkeypatch.setattr(cases, "SMALL", ())
    *_, outcome = gpu_conv_checks.check_correctness(True, 60)
    ways = {(row["way"], row["direction"]) for row in outcome["judged"]}
    assert outcome["wrong"] == 0 and {("xla", direction) for direction in conv_ways.DIRECTIONS} <= ways
    monkeypatch.setitem(conv_ways.BOUNDS, "float32", 1e-12)
    with pytest.raises(AssertionError, match="are wrong; the first"):
        list(gpu_conv_checks.check_correctness(True, 60))


def test_what_the_time_does_not_reach_is_left_out_by_name():
    steps = gpu_conv_checks.check_correctness(True, -1)
    outcomes = [next(steps) for _ in range(3)]
    assert cases.SMALL[0].name in outcomes[-1]["left_out"]
    with pytest.raises(AssertionError, match="none was judged"):
        next(steps)


@pytest.mark.slow
def test_every_check_runs_in_a_process_of_its_own(tmp_path):
    assert gpu_checks.main(["--out", str(tmp_path), "--smoke"]) == 0
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(records) == set(gpu_checks.CHECKS) and all(record["ok"] for record in records.values())
    assert records["steps"]["steps"][0]["times_faster"] == 1
    # Deterministic programs would make the measured ones slow.
    flagged = {name for name, record in records.items() if "deterministic" in record["setting"]["xla_flags"]}
    assert flagged == {"loop-programs", "resume"}
