"""The published recipes' tables, from records made up by hand."""

import csv
import dataclasses
import io
import json

import pytest

from experiments import configs
from experiments.configs import to_dict
from experiments.report import published


def record_of(name, seed, top1, *, group=published.GROUP, kind="NVIDIA H200", config=None, **facts):
    config = config or dataclasses.replace(configs.get(name), precision="bfloat16")
    config = dataclasses.replace(config, seed=seed)
    dense = config.prune is None
    return {
        "name": name,
        "seed": seed,
        "group": group,
        "net": config.net,
        "dataset": config.data.name,
        "encoding": "png",
        "method": "dense" if dense else "clicktrain",
        "epochs": config.epochs,
        "train_examples": 50_000,
        "final_top1": top1,
        "best_pruned_top1": top1 + 0.01,
        "conv_compression": 1.0 if dense else 9.01,
        "conv_compression_without_shortcuts": 1.0 if dense else 9.05,
        "model_compression": 1.0 if dense else 8.5,
        "conv_weights": 900,
        "conv_retained": 900,
        "model_weights": 1000,
        "model_retained": 1000,
        "train_seconds": 50.0,
        "train_and_compile_seconds": 60.0,
        "eval_seconds": 5.0,
        "training_multiply_adds": 6.5e15,
        "config": json.loads(json.dumps(to_dict(config))),
        "setting": {
            "date": "2026-11-25T01:00:00+00:00",
            "device": {"platform": "gpu", "kind": kind},
            "cpu": {"model": "A CPU", "cores": 16},
        },
    } | facts


def rows_of(text):
    """Every table's rows by run."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header = lines[0]
    return [dict(zip(header, line)) for line in lines if line != header and set(line[0]) != {"-"}]


def wide(found):
    """The rows of the CSV file."""
    return list(csv.DictReader(io.StringIO(published.to_csv(found))))


def test_every_recipe_has_a_row_that_says_it_was_not_run():
    rows = {row["run"]: row for row in wide([])}
    assert set(rows) == {config.name for config in configs.published.configs()}
    assert all(row["ours, final (n)"] == row["ours, best pruned epoch"] == "not run" for row in rows.values())
    said = {name: row["published (best epoch, their count)"] for name, row in rows.items()}
    assert said["vgg13-cifar10-9.0x"] == "93.52" and said["vgg13-cifar10-dense"] == "not published"
    # No published figure is lost on its way from the configs' text.
    digits = sum(
        "published" in config.expected and "not" not in config.expected for config in configs.published.configs()
    )
    assert digits == sum(text != "not published" for text in said.values()) == 13


def test_a_group_by_hand():
    found = [
        record_of("vgg13-cifar10-dense", 0, 0.94),
        record_of("vgg13-cifar10-dense", 1, 0.95),
        record_of("vgg13-cifar10-9.0x", 0, 0.93),
        record_of("vgg13-cifar10-9.0x", 1, 0.935),
    ]
    text = published.generate(found)
    rows = {row["run"]: row for row in wide(found)}
    shown = next(row for row in rows_of(text) if row["run"] == "vgg13-cifar10-9.0x")
    assert len(shown) == 6 and all(rows["vgg13-cifar10-9.0x"][name] == value for name, value in shown.items())
    row = rows["vgg13-cifar10-9.0x"]
    assert row["published (best epoch, their count)"] == "93.52" and row["ours, final (n)"] == "93.25 ± 0.35 (n=2)"
    assert row["ours, best pruned epoch"] == "94.25 ± 0.35" and row["drop"] == "-1.25 ± 0.35"
    assert row["conv, all convolutions"] == "9.01x" and row["without shortcuts (their way)"] == "9.05x"
    assert (row["model"], row["hardware"], row["date"]) == ("8.50x", "NVIDIA H200", "2026-11-25")
    # 50,000 images, 190 epochs, 50 s; 2 * 6.5e15 operations in 50 s, of 989e12 a second.
    assert row["images/s, of peak"] == "190,000, 26.3%" and row["seconds"] == "60 ± 0"
    assert rows["vgg13-cifar10-dense"]["drop"] == ""
    assert rows["vgg13-cifar10-4.0x"]["ours, final (n)"] == "not run"
    assert "Images: png.\n" in text and "not comparable" not in text
    table = csv.DictReader(io.StringIO(published.to_csv(found)))
    assert "93.25 ± 0.35 (n=2)" in [line["ours, final (n)"] for line in table]


@pytest.mark.parametrize("encoding", ["jpeg", "jpeg+png", "lossy webp"])
def test_lossy_images_are_marked_in_their_group_alone(encoding):
    found = [record_of("vgg13-cifar10-9.0x", 0, 0.93, encoding=encoding)]
    text = published.generate(found)
    assert f"Images: {encoding}, lossy: absolute accuracies not comparable" in text
    table = csv.DictReader(io.StringIO(published.to_csv(found)))
    assert {line["images"] for line in table} == {"", f"{encoding}, lossy"}
    marked = [part.splitlines()[0] for part in text.split("\n### ") if "absolute accuracies not comparable" in part]
    assert marked == ["vgg13 on cifar10"]


def test_precisions_and_machines_have_rows_of_their_own_and_are_not_paired():
    single = record_of("vgg13-cifar10-9.0x", 0, 0.93, config=configs.get("vgg13-cifar10-9.0x"))
    found = [record_of("vgg13-cifar10-dense", 0, 0.94), single, record_of("vgg13-cifar10-9.0x", 0, 0.92, kind="A card")]
    rows = [row for row in wide(found) if row["run"] == "vgg13-cifar10-9.0x"]
    assert [(row["precision"], row["hardware"], row["drop"]) for row in rows] == [
        ("bfloat16", "A card", "not measured"),
        ("float32", "NVIDIA H200", "not measured"),
    ]
    # No peak is known of the one, and none in float32 is claimed of the other.
    assert {row["images/s, of peak"] for row in rows} == {"190,000"}


def test_other_methods_stand_beside_and_count_against_the_dense_net():
    narrow = next(
        config for name, config in configs.all_configs().items() if name.startswith("compare-vgg13-narrow-0.5")
    )
    found = [
        record_of("vgg13-cifar10-dense", 0, 0.94),
        record_of(narrow.name, 0, 0.92, config=narrow, conv_weights=225, conv_retained=225, model_retained=250),
    ]
    rows = {row["run"]: row for row in wide(found)}
    row = rows[narrow.name]
    assert (row["conv, all convolutions"], row["model"], row["drop"]) == ("4.00x", "4.00x", "-2.00")
    assert row["published (best epoch, their count)"] == "not published"


def test_records_of_a_config_that_is_no_more_are_refused():
    changed = dataclasses.replace(configs.get("vgg13-cifar10-9.0x"), epochs=191)
    stray = record_of("vgg13-cifar10-9.0x", 0, 0.93, config=changed)
    with pytest.raises(ValueError, match="vgg13-cifar10-9.0x, seed 0, in published is of no config"):
        published.generate([stray])
    # Elsewhere it is somebody else's business.
    assert published.generate([stray | {"group": "other"}]) == published.generate([])


def test_two_runs_of_one_seed_are_refused():
    with pytest.raises(ValueError, match="two runs of one seed"):
        published.generate([record_of("vgg13-cifar10-9.0x", 0, 0.93)] * 2)
