"""The table of file sizes: from real exports, one small net here, and from its record."""

import json
from pathlib import Path

import pytest

from clicktrain_jax import models
from experiments.bench import sizes
from experiments.configs import published
from experiments.configs.base import PruneConfig
from experiments.report.exports import ratio, sizes_table, stored

RECORD = Path(__file__).parents[3] / "experiments" / "results" / "deploy" / "sizes.json"


@pytest.fixture(scope="module")
def record():
    prune = PruneConfig(fractions=(0.5,), coeff=0.0, select_epoch=0, prune_epoch=1)
    lines = []
    found = sizes.measure([("small-half", "small", prune)], lines.append)
    assert len(lines) == 2 and lines[0].startswith("small-half, tile (1, 1): ")
    return json.loads(json.dumps(found))


def test_a_record_of_real_exports(record):
    assert [(row["name"], row["tile"]) for row in record["rows"]] == [("small-half", [1, 1]), ("small-half", [64, 1])]
    layers = models.conv_layers(models.build("small", num_classes=10), models.default_image_shape("small"))
    weights = sum(
        layer.kernel_shape[0] * layer.kernel_shape[1] * layer.kernel_shape[2] * layer.kernel_shape[3]
        for layer in layers
    )
    for row in record["rows"]:
        whole, small = row["float32"], row["int8"]
        assert whole["weights"] == small["weights"] == weights
        assert whole["kept"] == small["kept"] < weights
        assert whole["values"] == 4 * whole["kept"] and small["values"] == small["kept"]
        assert whole["indices"] == small["indices"] > 0 == whole["scales"]
        parts = ("values", "indices", "scales", "headers")
        assert stored(whole) == sum(whole[part] for part in parts) < whole["all_files"]
        assert ratio(whole) == 4 * weights / stored(whole)
    tiled, alone = record["rows"][1]["float32"], record["rows"][0]["float32"]
    assert tiled["indices"] < alone["indices"] / 4


def test_the_table_by_hand():
    part = {
        "weights": 1_000_000,
        "kept": 125_000,
        "values": 500_000,
        "indices": 20_000,
        "scales": 0,
        "headers": 5_000,
        "all_files": 600_000,
    }
    small = part | {"values": 125_000, "scales": 1_000}
    row = {"name": "net-8x", "net": "net", "patterns": 4, "float32": part, "int8": small}
    record = {
        "setting": {"versions": {"jax": "0.12"}, "date": "2026-11-22T10:00:00+00:00"},
        "width": 1.0,
        "rows": [row | {"tile": [1, 1]}, row | {"tile": [64, 1], "float32": part | {"indices": 0}}],
    }
    text = sizes_table(record)
    line = next(line for line in text.splitlines() if line.startswith("| net-8x"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["net-8x", "4.00", "12.5%"]
    assert cells[3:8] == ["0.53", "3.8%", "7.62x", "0.15", "26.49x"]
    assert cells[8:11] == ["0.51", "0.0%", "7.92x"]
    assert "jax 0.12, 2026-11-22" in text


def test_every_recipe_and_every_net_is_a_case():
    cases = sizes.cases()
    recipes = [config.name for config in published.configs() if config.prune is not None]
    assert [name for name, _, _ in cases][: len(recipes)] == recipes
    assert {net for _, net, _ in cases} == set(models.names())


def test_the_committed_record_has_every_case_and_keeps_the_promise():
    record = json.loads(RECORD.read_text())
    names = {name for name, _, _ in sizes.cases()}
    assert {(row["name"], tuple(row["tile"])) for row in record["rows"]} == {(n, t) for n in names for t in sizes.TILES}
    for row in record["rows"]:
        part = row["float32"]
        kept = part["weights"] / part["kept"]
        if row["name"].startswith("vgg13") and kept >= 8:
            assert ratio(part) >= 6.5
        # Indices cost at most a sixth of what they point at; headers count in nets of less than a few megabytes only.
        assert part["indices"] < part["values"] / 6, row["name"]
        assert part["headers"] < 0.01 * stored(part) or 4 * part["weights"] < 2e6, row["name"]
    assert sizes_table(record).count("\n| ") >= len(names)
