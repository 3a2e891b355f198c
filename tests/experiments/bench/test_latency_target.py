"""A target in time, and what the whole net reaches."""

import json

import pytest

from clicktrain_jax import LayerTime, LayerTimes
from experiments.bench import latency_target
from experiments.report.benchmarks import tables_of
from pallas_kernels.tuning import Timing


def test_every_target_is_asked_and_read(monkeypatch, tmp_path):
    def layer_times(apply_fn, variables, images, plan):
        times = (LayerTime(layer.name, 1.0, (0.1, 1.0), (0.1, 1.0)) for layer in plan.layers)
        return LayerTimes(len(plan.layers) + 1.0, tuple(times))

    def time_together(functions, **_):
        for function in functions.values():
            function()
        return {name: Timing(low, low, low, 1, 1) for name, low in zip(functions, (3.0, 2.0))}

    monkeypatch.setattr(latency_target.ct, "layer_times", layer_times)
    monkeypatch.setattr(latency_target, "time_together", time_together)
    monkeypatch.setattr("clicktrain_jax.deploy.InferenceNet.tuned", lambda net, batch: net)
    for name, few in {"NETS": (("small", 0.25),), "BATCHES": (2,), "RATIOS": (1.25, 9.0)}.items():
        monkeypatch.setattr(latency_target, name, few)
    out = tmp_path / "latency.json"
    text = latency_target.run(out)
    record = json.loads(out.read_text())
    met, refused = record["results"]
    assert met["reached"] == pytest.approx(1.5) and met["left_dense"] == 0
    assert "target=9 over latency is out of reach: the reachable maximum is" in refused["refused"]
    assert tables_of(record) == text and "| small x0.25 | 2 | 1.25x | 1.50x (+20%)" in " ".join(text.split())
