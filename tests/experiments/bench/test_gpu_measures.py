"""Single measurements on a GPU, at a tiny size on whatever is here."""

import json

import pytest

from experiments.bench import gpu_measures

pytestmark = pytest.mark.usefixtures("quick")


def test_one_that_fails_is_recorded(tmp_path, monkeypatch, capsys):
    def fails(smoke, packed):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(gpu_measures, "MEASURES", {"training": fails})
    assert not gpu_measures.run("training", tmp_path, True, None)
    record = json.loads((tmp_path / "training.json").read_text())
    assert not record["ok"] and "no such thing" in record["error"] and "training: FAILED" in capsys.readouterr().out


def test_one_that_stops_in_the_middle_keeps_what_it_has(tmp_path, monkeypatch):
    def stops(smoke, packed):
        yield {"rows": [1]}
        yield {"rows": [1, 2]}
        raise AssertionError("the third is wrong")

    monkeypatch.setattr(gpu_measures, "MEASURES", {"steps": stops})
    assert not gpu_measures.run("steps", tmp_path, True, None)
    record = json.loads((tmp_path / "steps.json").read_text())
    assert record["rows"] == [1, 2] and not record["ok"] and "the third is wrong" in record["error"]


def test_each_has_a_time():
    assert gpu_measures.LIMITS_S.keys() == gpu_measures.MEASURES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_measures.MEASURES)
def test_each_runs(name, tmp_path):
    assert gpu_measures.run(name, tmp_path, True, None)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["ok"] and record["smoke"]
    if name == "steps":
        assert record["steps"][0]["times_faster"] == 1
