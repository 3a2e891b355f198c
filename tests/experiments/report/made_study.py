"""A whole study of a comparison, made up by hand: its cells, their runs and latencies."""

import csv
import io
import json

from experiments.records import RUNS, keep
from experiments.report import comparison

SETTING = {
    "date": "2026-11-22T10:00:00+00:00",
    "device": {"platform": "cpu", "kind": "cpu"},
    "cpu": {"model": "A CPU", "cores": 2},
    "versions": {"jax": "0.12.0"},
    "commit": "1234567",
}
# name: method, label, family, retained convolution weights, multiply-adds, top-1 of seed 0 (seed 1 has 2 points more),
# training seconds, milliseconds of one image (None: not measured). Dense: 800,000 weights, 100 s with compiling.
CELLS = {
    "dense": ("dense", "", "dense", 800_000, 10_000_000, 80.0, 90.0, 4.0),
    "early-4x": ("ClickTrain", "4x, early", "ClickTrain, early", 200_000, 5_000_000, 79.0, 76.0, 8**0.5),
    "early-8x": ("ClickTrain", "8x, early", "ClickTrain, early", 100_000, 2_500_000, 78.0, 70.0, 2.0),
    "early-16x": ("ClickTrain", "16x, early", "ClickTrain, early", 50_000, 1_000_000, 75.0, 74.0, 0.5),
    "rewind-2": ("PAT", "8x, 2 epochs", "PAT, rewinding", 100_000, 2_500_000, 76.0, 110.0, None),
    "rewind-4": ("PAT", "8x, 4 epochs", "PAT, rewinding", 99_000, 2_500_000, 77.5, 150.0, None),
    "rewind-8": ("PAT", "8x, 8 epochs", "PAT, rewinding", 100_000, 2_500_000, 77.8, 190.0, None),
    "admm-8": ("PAT", "20x, ADMM", "PAT, ADMM", 40_000, 1_000_000, 79.9, 110.0, None),
    "gradual": ("PDT", "5.7x, gradual", "PDT, gradual", 141_421, 3_000_000, 77.0, 78.0, None),
    "two-of-four": ("PDT", "2:4", "PDT, 2:4", 400_000, 5_000_000, 81.0, 120.0, None),
    "narrow-0.5": ("narrow", "width 0.5", "narrow", 200_000, 2_500_000, 76.0, 40.0, 2.0),
    "narrow-0.35": ("narrow", "width 0.35", "narrow", 100_000, 1_250_000, 72.0, 30.0, 1.0),
    "one-shot": ("one-shot", "8x, not retrained", "one-shot", 100_000, 2_500_000, 15.0, 90.0, None),
    "not-there": ("random", "8x, random", "random", 100_000, 2_500_000, None, 0.0, None),
}
# One cell's trials are of a study whose seconds were not recorded, and one's are nowhere.
TUNED_BY = {"early-8x": ["early"], "admm-8": ["dense", "early"], "gradual": ["gradual"], "two-of-four": ["elsewhere"]}
SEEDS = (0, 1)


def summary_of(name, seed):
    method, _, _, retained, multiply_adds, top1, seconds, _ = CELLS[name]
    compiling = 10.0 if seed == 0 else 0.0  # the process had the programs by then
    own = method in ("dense", "narrow")
    return {
        "name": name,
        "seed": seed,
        "method": method,
        "final_top1": (top1 + 2 * seed) / 100,
        "dataset": "cifar10",
        "encoding": "jpeg",
        "net": "vgg11",
        "width": 1.0,
        "epochs": 8,
        "train_examples": 4000,
        "eval_examples": 10_000,
        "eval_split": "test",
        "conv_weights": retained if own else 800_000,
        "conv_retained": retained,
        "model_weights": 1_000_000,
        "model_retained": 200_000 + retained,
        "multiply_adds": multiply_adds if own else 10_000_000,
        "retained_multiply_adds": multiply_adds,
        "train_seconds": seconds,
        "compile_seconds": compiling,
        "cpu_seconds": 2.0 * seconds,
        "eval_seconds": 1.0,
        "train_and_compile_seconds": seconds + compiling,
        "training_multiply_adds": 3e9 * seconds,
        "training_bytes": 50_000_000,
        "masks_sha256": f"masks-{name}-{seed}",
        "params_sha256": f"params-{name}-{seed}",
    }


def latency_of(cells):
    timed = {name: CELLS[name][7] for name in cells if CELLS[name][7] is not None}
    times = {name: {"median_s": ms / 1e3, "low_s": ms / 1e3, "high_s": ms / 1e3} for name, ms in timed.items()}
    slower = {name: {key: 8 * value for key, value in each.items()} for name, each in times.items() if "16" not in name}
    nets = {
        name: {"masks_sha256": f"masks-{name}-0", "params_sha256": f"params-{name}-0", "layers": 8, "pattern_layers": 3}
        for name in timed
    }
    return {"setting": SETTING, "seed": 0, "batches": {"1": times, "32": slower}, "nets": nets}


def record_of(cell, seed, **changes):
    record = {
        "name": cell,
        "seed": seed,
        "config": {"name": cell, "seed": seed},
        "setting": SETTING,
        "summary": summary_of(cell, seed),
        "metrics": [],
    }
    return record | changes


def write(folder, cells, latency):
    """Writes a study of these cells and returns its folder."""
    facts = {
        "name": "made",
        "title": "A made-up study",
        "command": "python -m experiments compare made",
        "dense": "dense",
        "epochs": 8,
        "cells": [
            {
                "name": cell,
                "method": CELLS[cell][0],
                "label": CELLS[cell][1],
                "family": CELLS[cell][2],
                "tuned_by": TUNED_BY.get(cell, ["dense"]),
            }
            for cell in cells
        ],
        "tuning": [
            {
                "cell": "early-8x",
                "group": "early",
                "field": "learning_rate",
                "chosen": 0.1,
                "trials": [
                    {"value": 0.03, "top1": 0.751, "seconds": 80.0},
                    {"value": 0.1, "top1": 0.7625, "seconds": 90.0},
                ],
            },
            {
                "cell": "dense",
                "group": "dense",
                "field": "learning_rate",
                "chosen": 0.03,
                "trials": [
                    {"value": 0.03, "top1": 0.81, "seconds": 100.0},
                    {"value": 0.1, "top1": None, "seconds": 0.0},
                ],
            },
            {
                "cell": "gradual",
                "group": "gradual",
                "field": "learning_rate",
                "chosen": 0.1,
                "trials": [{"value": 0.1, "top1": 0.7}],
            },
        ],
    }
    folder.mkdir()
    keep(folder / RUNS, (record_of(cell, seed) for cell in cells for seed in SEEDS if CELLS[cell][5] is not None))
    (folder / "study.json").write_text(json.dumps(facts))
    if latency:
        (folder / "latency.json").write_text(json.dumps(latency_of(cells)))
    return folder


def wide(study):
    """The wide table by cell."""
    return {row["cell"]: row for row in csv.DictReader(io.StringIO(comparison.files(study)[comparison.WIDE]))}
