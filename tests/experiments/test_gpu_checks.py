"""The script that spends a GPU's minutes, at a tiny size on whatever is here."""

import json

import pytest

from experiments import gpu_checks


def test_masks_check(tmp_path):
    assert gpu_checks.main(["--out", str(tmp_path), "--smoke", "--only", "masks"]) == 0
    record = json.loads((tmp_path / "masks.json").read_text())
    assert record["ok"] and record["masks_equal"] > 10


def test_a_failing_check_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def fails(smoke, packed):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(gpu_checks, "CHECKS", {"resume": fails, "masks": lambda smoke, packed: {}})
    assert gpu_checks.main(["--out", str(tmp_path), "--smoke"]) == 1
    assert "no such thing" in json.loads((tmp_path / "resume.json").read_text())["error"]
    assert json.loads((tmp_path / "masks.json").read_text())["ok"]


@pytest.mark.slow
def test_every_check_runs(tmp_path):
    assert gpu_checks.main(["--out", str(tmp_path), "--smoke"]) == 0
