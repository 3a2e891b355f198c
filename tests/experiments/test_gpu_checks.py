"""The script that spends a GPU's minutes, at a tiny size on whatever is here."""

import json

import pytest

from experiments import gpu_checks


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


@pytest.mark.slow
def test_every_check_runs_in_a_process_of_its_own(tmp_path):
    assert gpu_checks.main(["--out", str(tmp_path), "--smoke"]) == 0
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(records) == set(gpu_checks.CHECKS) and all(record["ok"] for record in records.values())
    # Deterministic programs would make the measured ones slow.
    flagged = {name for name, record in records.items() if "deterministic" in record["setting"]["xla_flags"]}
    assert flagged == {"loop-programs", "resume"}
