"""The bench of the input pipeline, in small."""

import pytest

from experiments.bench import input as input_bench
from experiments.report.benchmarks import tables_of


def test_the_pipeline_is_measured_beside_its_ceilings():
    record = input_bench.measure(photos=16, epochs=1, size=(80, 60), image_size=16, batch_size=4, threads=2, rounds=2)
    names = [row["name"] for row in record["results"]]
    assert names == ["decode only", "decode and crop", "image files", "array_record"]
    assert record["results"][0]["ratio"] == 1 and record["results"][1]["of_crop"] == 1
    assert all(row["p20"] <= row["images_per_s"] <= row["p80"] for row in record["results"])
    assert record["pillow"]["name"] == "pillow alone" and record["pillow"]["images_per_s"] > 0
    assert 0 <= record["waiting"] < 1 and len(record["memory_mb"]) == 4
    assert record["photos"] | {"bytes": 0} == {"count": 16, "size": [80, 60], "bytes": 0}


def test_memory_is_flat_over_an_epoch():
    """128 batches of 3 MB each: what would not be let go of shows."""
    record = input_bench.measure(photos=32, epochs=8, size=(80, 60), image_size=256, batch_size=8, threads=2, rounds=1)
    first, *_, last = record["memory_mb"]
    assert last - first < 30, record["memory_mb"]


def test_the_table_says_what_is_in_the_record():
    row = {"p20": 90.0, "images_per_s": 100.0, "p80": 110.0}
    record = {
        "what": "input",
        "photos": {"count": 256, "size": [500, 375], "bytes": 104_000.0},
        "image_size": 224,
        "batch_size": 64,
        "threads": 2,
        "rounds": 7,
        "goal": 0.8,
        "results": [
            {"name": "decode only", **row, "ratio": 1.0, "of_crop": 1.4},
            {"name": "image files", **row, "ratio": 0.81, "of_crop": 0.95},
            {"name": "array_record", **row, "ratio": 0.79, "of_crop": 0.94},
        ],
        "pillow": {"images_per_s": 61.0, "ratio": 0.61},
        "waiting": 0.004,
        "memory_mb": [300.0, 301.0, 301.0, 301.0],
    }
    text = tables_of(record)
    assert "Pillow's resize 61 images/s, 0.61 of decoding alone" in text
    assert "500x375 pixels and 104 kB" in text and "0.4% of its time" in text and "300, 301, 301, 301 MB" in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[-3:]]
    assert [line[5] for line in cells] == ["", "0.8: met", "0.8: not met"]
    assert cells[1] == ["image files", "100", "90", "110", "0.81", "0.8: met", "0.95"]


@pytest.mark.parametrize("seed", [0, 1])
def test_photographs_weigh_what_imagenets_do(seed):
    from experiments.bench.photos import photo

    assert 80_000 < len(photo(seed)) < 140_000 and photo(seed) == photo(seed)
