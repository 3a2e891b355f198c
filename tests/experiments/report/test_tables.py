"""Tables: generated from records, and nothing else."""

import re

from experiments.bench import gpu_measures
from experiments.records import RUNS, keep
from experiments.report import benchmarks, comparison, documents, readme, results
from experiments.report import comparison_records as studies
from experiments.report.statistics import markdown_table, mean_spread, paired


def test_statistics_by_hand():
    assert mean_spread([0.98, 0.99, 1.0], scale=100) == "99.00 ± 1.00"
    assert mean_spread([0.5]) == "0.50"
    assert paired({0: 0.9, 1: 0.8, 2: 0.1}, {0: 0.91, 1: 0.83}, scale=100) == "-2.00 ± 1.41"
    assert paired({0: 0.9}, {0: 0.9}) == "0.00"
    assert paired({0: 0.9}, {1: 0.9}) == "not measured"
    assert markdown_table(("a", "bb"), [("ccc", "d")]) == "| a   | bb |\n| --- | -- |\n| ccc | d  |\n"


def test_committed_tables_are_what_the_records_say():
    message = "run `python -m experiments table --write` and commit what it changes"
    texts = documents.generate()
    compared = [
        path / name
        for path in results.RECORDS.glob("compare-*")
        if (path / "study.json").exists()
        for name in comparison.files(studies.read(path))
    ]
    expected = {
        results.RESULTS_FILE,
        benchmarks.BENCHMARKS_FILE,
        readme.README,
        results.RECORDS / "published.csv",
        results.RECORDS / "price" / "price.csv",
    }
    assert set(texts) == expected | set(compared)
    for path, text in texts.items():
        assert path.read_text() == text, message


def test_pictures_that_the_documents_link_to_are_there():
    for path, text in documents.generate().items():
        if path.suffix != ".md":
            continue
        for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (path.parent / link).exists(), link


def test_the_gpu_table_names_every_measurement():
    assert set(benchmarks.GPU_MEASURES) == set(gpu_measures.MEASURES)


def test_a_table_from_records_by_hand(tmp_path):
    setting = {
        "date": "2026-11-22T10:00:00+00:00",
        "device": {"platform": "cpu", "kind": "cpu"},
        "cpu": {"model": "A CPU", "cores": 2},
    }
    runs = (("dense", 0, 0.80), ("dense", 1, 0.82), ("clicktrain", 0, 0.79), ("clicktrain", 1, 0.80))
    for method, seed, top1 in runs:
        config = {"name": method, "learning_rate": 0.1, "seed": seed, "data": {"dir": f"/anywhere/{seed}"}}
        summary = {
            "name": f"net-{method}",
            "method": method,
            "seed": seed,
            "final_top1": top1,
            "best_pruned_top1": top1,
            "conv_compression": 1.0 if method == "dense" else 8.0,
            "model_compression": 1.0,
            "train_seconds": 10.0,
            "compile_seconds": 2.0,
            "dataset": "cifar10",
            "encoding": "jpeg",
            "train_examples": 100,
            "eval_split": "test",
            "eval_examples": 10,
            "net": "vgg11",
            "width": 0.25,
            "epochs": 3,
        }
        record = {"name": method, "seed": seed, "config": config, "setting": setting, "summary": summary, "metrics": []}
        keep(tmp_path / "group" / RUNS, [record])
    text = results.generate(results.records(tmp_path))
    assert results.generate(results.records(tmp_path), without=("group",)) == ""
    dense, pruned = [line for line in text.splitlines() if line.startswith("| net-")]
    assert dense.startswith("| net-dense") and pruned.startswith("| net-clicktrain")
    assert "81.00 ± 1.41" in dense and "cifar10 (jpeg, lossy)" in text
    assert "79.50 ± 0.71" in pruned and "-1.50 ± 0.71" in pruned and "8.00x" in pruned
    assert results.write(text, tmp_path / "R.md") and not results.write(text, tmp_path / "R.md")
