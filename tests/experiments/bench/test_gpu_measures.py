"""Single measurements on a GPU, at a tiny size on whatever is here."""

import argparse
import json

import pytest

from experiments.bench import gpu, gpu_measures

pytestmark = pytest.mark.usefixtures("quick")


def do(name, folder):
    """Measure in this process, at a tiny size: whether it went well, and the record."""
    ok = gpu.do(gpu.Item(name, "measures", 60), argparse.Namespace(out=folder, smoke=True, packed=None))
    return ok, json.loads((folder / f"{name}.json").read_text())


def test_one_that_fails_is_recorded(tmp_path, monkeypatch, capsys):
    def fails(smoke, budget_s, packed):
        raise RuntimeError("no such thing")

    monkeypatch.setitem(gpu_measures.MEASURES, "training", (60, fails))
    ok, record = do("training", tmp_path)
    assert not ok and not record["ok"] and "no such thing" in record["error"]
    assert "no such thing" in capsys.readouterr().out


def test_one_that_stops_in_the_middle_keeps_what_it_has(tmp_path, monkeypatch):
    def stops(smoke, budget_s, packed):
        yield {"rows": [1]}
        yield {"rows": [1, 2]}
        raise AssertionError("the third is wrong")

    monkeypatch.setitem(gpu_measures.MEASURES, "steps", (60, stops))
    ok, record = do("steps", tmp_path)
    assert not ok and record["rows"] == [1, 2] and not record["ok"] and "the third is wrong" in record["error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_measures.MEASURES)
def test_each_runs(name, tmp_path):
    ok, record = do(name, tmp_path)
    assert ok and record["ok"] and record["smoke"]
    if name == "steps":
        assert record["steps"][0]["times_faster"] == 1
