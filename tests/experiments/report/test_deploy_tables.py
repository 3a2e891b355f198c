"""The pages of `bench deploy`, from a record made up by hand."""

import json

import pytest

from experiments.bench.engines import DENSE, IN_C, OPENVINO, THIS_NET
from experiments.report import deploy

# A record made before PyTorch was left out keeps its rows.
EARLIER = "dense (PyTorch)"
RECORD = {
    "what": "deploy",
    "command": "python -m experiments bench deploy x",
    "load_average": [[1.0], [2.0]],
    "quick": False,
    "tolerance": 1e-3,
    "setting": {
        "date": "2026-11-23T10:00:00+00:00",
        "python": "3.12.1",
        "versions": {"jax": "0.12"},
        "device": {"platform": "cpu", "kind": "cpu"},
        "cpu": {"model": "A CPU", "cores": 2},
    },
    "net": {"net": {"name": "vgg13", "width": 1.0}},
    "tile": [32, 1],
    "sizes": {
        "files": {"manifest.json": 1000, "weights.safetensors": 5_999_000, "net.onnx": 40_000_000},
        "dense_bytes": 39_000_000,
        "conv_weights": 800,
        "conv_kept": 100,
        "conv_dense_bytes": 32,
        "conv_bytes": 4,
    },
    "latency": [1],
    "throughput": [128],
    "engines": {THIS_NET: "jax 0.12", DENSE: "jax 0.12", EARLIER: "torch 2"},
    "unavailable": {OPENVINO: "openvino is not installed"},
    "batches": {
        size: {
            name: {"form": "f", "low_s": 0.9 * scale * s, "median_s": scale * s, "high_s": scale * s, "refused": {}}
            for name, s in {THIS_NET: 0.010, IN_C: 0.009, DENSE: 0.036, EARLIER: 0.029}.items()
        }
        for size, scale in {"1": 1, "128": 100}.items()
    },
    "starts": {
        THIS_NET: {"seconds": 2.5, "bytes": {"1": 1e8, "128": 2e8}, "device_bytes": {"1": None, "128": None}},
        DENSE: {"seconds": 3.5, "bytes": {"1": 1e8}, "device_bytes": {"1": None}},
    },
    "layers": [{"name": "Conv_1", "dense_s": 0.002, "pattern_s": 0.001, "runs": "pattern", "why": "measured"}],
}


def line_of(text, *cells):
    return next(line for line in text.splitlines() if all(f"| {cell} " in line for cell in cells))


def test_ratios_and_goals_by_hand():
    assert deploy.ratios(RECORD["batches"]["1"]) == pytest.approx({IN_C: 0.9, DENSE: 3.6, EARLIER: 2.9})
    text = deploy.deploy_tables(RECORD)
    # The same net in C is no dense engine.
    assert "| 3.60 " in text and "2.90: dense (PyTorch)" in text
    assert "3: not met" in text and "in C at most" not in text
    alone = {**RECORD, "setting": {**RECORD["setting"], "cpu": {"model": "A CPU", "cores": 1}}}
    assert "3: not met; in C at most 1 of this net's time: met" in deploy.summary_table(alone)
    assert "3: " not in deploy.summary_table({**RECORD, "net": {"net": {"name": "vgg16", "width": 1.0}}})
    assert "2.2: met" in deploy.summary_table({**RECORD, "tile": [1, 1]})
    assert "128" in line_of(text, "128", THIS_NET) and "128" == f"{128 / 1.0:.0f}"
    assert "not measured" in line_of(text, "1", OPENVINO) and "openvino is not installed" in text
    assert "under 1 s: not met" in text and "not measured" in line_of(text, DENSE, "3.50")
    assert "6.00 MB to load" in text and "6.50x smaller" in text and "net.onnx 40.00 MB" in text
    assert "| 2.00 " in line_of(text, "Conv_1")


def test_without_this_net_there_are_no_ratios():
    batch = {name: found for name, found in RECORD["batches"]["1"].items() if name != THIS_NET}
    assert deploy.ratios(batch) == {}
    assert "not measured" in deploy.summary_table({**RECORD, "batches": {"1": batch}})


def test_the_document(tmp_path):
    assert "On a CPU: not measured." in deploy.generate(tmp_path)
    (tmp_path / "deploy").mkdir()
    path = tmp_path / "deploy" / "bench-vgg13.json"
    path.write_text(json.dumps({**RECORD, "quick": True}))
    assert "On a CPU: not measured." in deploy.generate(tmp_path)
    path.write_text(json.dumps(RECORD))
    text = deploy.generate(tmp_path)
    assert "### vgg13, 8.00x fewer convolution weights, tiles of (32, 1), on 2 cores" in text and "On a CPU" not in text
    assert "On a GPU: not measured." in text and "A CPU, 2 cores" in text
