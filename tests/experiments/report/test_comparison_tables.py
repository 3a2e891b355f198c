"""The comparison's tables, from a whole study made up by hand: figures, verdicts, and what is refused."""

import csv
import dataclasses
import io
import json

import pytest

from experiments.records import RUNS, keep, kept
from experiments.report import claims, comparison, comparison_plots, documents
from experiments.report import comparison_records as studies
from tests.experiments.report.made_study import latency_of, record_of, wide


def rows_of(text, header):
    """The table below a heading or a text, by its first two columns."""
    lines = text[text.index(header) :].splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("|"))
    found = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return {row[0]: dict(zip(found[0], row)) for row in found[2:]}


def test_the_table_shown_has_six_columns_of_the_wide_one(study):
    rows = rows_of(comparison.generate(study), "### A made-up")
    whole = wide(study)
    assert list(rows) == [f"{row['method']}: {label}" if label != "dense" else label for label, row in whole.items()]
    for label, row in zip(whole, rows.values()):
        assert list(row) == ["cell", "n", "top-1, %", "against dense", "conv", "seconds, of dense"]
        for name in ("n", "top-1, %", "against dense", "conv"):
            assert row[name] == whole[label][name]
        assert row["seconds, of dense"] == whole[label]["of dense"]


def test_records_that_are_too_short_say_so_and_shared_cores_have_no_seconds(make_study):
    folder = make_study(("dense", "early-8x", "rewind-2", "gradual"))
    study = studies.read(folder)
    assert "too short to count: 32,000 images seen" in study.doubts()
    assert "The claims count for little here; too short" in comparison.generate(study)
    assert "records of 1 of them are too short" in comparison.verdicts([study])
    shared = {"shared_cores": True}
    keep(folder / RUNS, [record | {"setting": record["setting"] | shared} for record in kept(folder / RUNS)])
    study = studies.read(folder)
    assert "Time is told in CPU seconds" in comparison.generate(study)
    assert wide(study)["8x, early"]["end-to-end s"] == wide(study)["8x, early"]["of dense"] == "not measured"
    assert all(cell.seconds() == {} for cell in study.cells)
    # CPU seconds stand in their place: 140 of 180.
    row = rows_of(comparison.generate(study), "### A made-up")["ClickTrain: 8x, early"]
    assert row["CPU seconds, of dense"] == wide(study)["8x, early"]["CPU s, of dense"] == "0.78"
    assert len(study.processor_time(study.cells[1])) == 2
    # The claims are read by the same clock, and say so.
    goal, limit = claims.against_dense(study).claims
    assert goal.verdict == claims.HOLDS and "CPU seconds are at most 0.85" in goal.text and "0.78 (n=2" in goal.text
    assert limit.verdict == claims.HOLDS and "1 of 1 cells;" in limit.text
    assert "1.57 (8x, early)" in claims.against_pat(study).claims[0].text
    # The code grows faster: a run of another commit says nothing, nor do runs of none that is known.
    records = kept(folder / RUNS)
    told = {commit: records[0]["setting"] | {"commit": commit} for commit in ("another", "unknown", "1234567-dirty")}
    for commit, setting in told.items():
        some = records[:1] if commit == "another" else records
        keep(folder / RUNS, [one | {"setting": setting} for one in some] + records[len(some) :])
        other = studies.read(folder)
        assert len(other.processor_time(other.cells[1])) == (1 if commit == "another" else 0)
    keep(folder / RUNS, records)
    # What needs no seconds is told all the same.
    assert wide(study)["8x, early"]["top-1, %"] == "79.00 ± 1.41"


def test_cells_whose_time_was_not_measured_leave_a_claim_on_all_open(make_study):
    folder = make_study(("dense", "early-4x", "early-8x"))
    runs = kept(folder / RUNS)
    for run in runs:
        commit = "another" if run["name"] == "early-4x" else "one"
        run["setting"] = run["setting"] | {"shared_cores": True, "commit": commit}
    keep(folder / RUNS, runs)
    goal, limit = claims.against_dense(studies.read(folder)).claims
    assert goal.verdict == claims.HOLDS
    assert limit.verdict == claims.UNTOLD and "1 of 1 cells (1 more: not measured)" in limit.text
    # Nor does a goal for the quickest of all fail by those that were measured.
    slow = [
        run | {"summary": run["summary"] | {"cpu_seconds": 1000.0}} if run["name"] == "early-8x" else run
        for run in runs
    ]
    keep(folder / RUNS, slow)
    assert claims.against_dense(studies.read(folder)).claims[0].verdict == claims.UNTOLD


def test_runs_of_another_length_say_nothing_of_time_saved(make_study):
    folder = make_study(("dense", "early-8x"))
    runs = kept(folder / RUNS)
    keep(
        folder / RUNS,
        [one | {"summary": one["summary"] | {"epochs": 8 + 4 * (one["name"] != "dense")}} for one in runs],
    )
    assert claims.against_dense(studies.read(folder)).claims == []


def test_the_joint_table_by_hand(study):
    rows = wide(study)
    assert list(rows) == [  # by method, family and compression
        "dense",
        "4x, early",
        "8x, early",
        "16x, early",
        "8x, 2 epochs",
        "8x, 8 epochs",
        "8x, 4 epochs",
        "20x, ADMM",
        "5.7x, gradual",
        "2:4",
        "width 0.5",
        "width 0.35",
        "8x, not retrained",
        "8x, random",
    ]
    row = rows["8x, early"]
    assert (row["method"], row["n"], row["top-1, %"]) == ("ClickTrain", "2", "79.00 ± 1.41")
    assert row["against dense"] == "-2.00"
    # 800,000 / 100,000; 1,000,000 / 300,000; 2.5 of 10 million; 70 of 90 s; 70 + 10 of 90 + 10 s.
    assert (row["conv"], row["model"], row["multiply-adds"]) == ("8.00x", "3.33x", "0.250")
    assert (row["training multiply-adds"], row["end-to-end s"], row["of dense"]) == ("0.778", "80.0", "0.80")
    assert (row["without compiling"], row["peak MB"]) == ("0.78", "50")
    # 80 + 90 s of trials; 80 + 170 of 100 + 100 s. What two groups decided is charged with both.
    assert (row["tuning s"], row["of dense, with tuning"]) == ("170", "1.25")
    assert rows["20x, ADMM"]["tuning s"] == "270"
    for label in ("5.7x, gradual", "2:4"):
        assert rows[label]["tuning s"] == rows[label]["of dense, with tuning"] == "not measured"
    assert (row["ms, N=1"], row["speed-up, N=1"]) == ("2", "2.00x")
    assert (row["ms, N=32"], row["speed-up, N=32"]) == ("16", "2.00x")
    # A narrow net counts against the study's dense one, not against itself.
    assert (rows["width 0.5"]["conv"], rows["width 0.5"]["multiply-adds"]) == ("4.00x", "0.250")
    assert rows["16x, early"]["ms, N=32"] == rows["16x, early"]["speed-up, N=32"] == "not measured"
    assert rows["8x, 2 epochs"]["ms, N=1"] == "not measured"
    assert rows["8x, random"]["top-1, %"] == "not run"
    assert rows["dense"]["against dense"] == ""


def test_every_seed_is_charged_with_compiling(study):
    """Seed 1 found the programs compiled; a run by itself would not."""
    assert study.cells[2].seconds() == {0: 80.0, 1: 80.0}


def test_latencies_of_another_net_are_refused(make_study):
    for field in ("masks_sha256", "params_sha256"):
        folder = make_study(("dense", "early-8x"), name=f"compare-{field}")
        latency = latency_of(("dense", "early-8x"))
        latency["nets"]["early-8x"][field] = "of another net"
        (folder / "latency.json").write_text(json.dumps(latency))
        with pytest.raises(ValueError, match=f"{field} of early-8x is 'of another net'"):
            studies.read(folder)


def test_latencies_without_their_run_are_refused(make_study):
    folder = make_study(("dense", "early-8x"))
    keep(folder / RUNS, [record_of("early-8x", 0, summary=None)])
    with pytest.raises(ValueError, match="no record of a run of it with seed 0"):
        studies.read(folder)


def test_what_does_not_fit_together_is_refused(make_study):
    folder = make_study(("dense", "early-8x"))
    config = {"name": "early-8x", "seed": 1, "learning_rate": 1.0}
    keep(folder / RUNS, [record_of("early-8x", 1, config=config)])
    with pytest.raises(ValueError, match="runs of early-8x were made with different configs"):
        studies.read(folder)
    stray = make_study(("dense", "early-8x"), name="compare-stray")
    whole = (stray / RUNS).read_text()
    keep(stray / RUNS, [record_of("narrow-0.5", 1)])
    with pytest.raises(ValueError, match="'narrow-0.5', no cell of study.json"):
        studies.read(stray)
    (stray / RUNS).write_text(whole + whole.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="a second run of dense, seed 0"):
        studies.read(stray)
    (stray / RUNS).write_text(whole + '{"name": "dense"}\n')
    with pytest.raises(ValueError, match="line 5: is no record of a run"):
        studies.read(stray)
    (stray / RUNS).write_text(whole)
    facts = json.loads((stray / "study.json").read_text())
    facts["cells"][1]["method"] = "Magic"
    (stray / "study.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="method='Magic' of early-8x: expected one of"):
        studies.read(stray)


def test_the_csv_file_has_the_same_figures_unrounded(study):
    rows = {row["cell"]: row for row in csv.DictReader(io.StringIO(comparison.to_csv(study)))}
    row = rows["early-8x"]
    assert float(row["model_compression_mean"]) == pytest.approx(10 / 3, rel=1e-5)
    assert float(row["top1_percent_std"]) == pytest.approx(2**0.5, rel=1e-5)
    assert (row["latency_ms_n1"], row["speed_up_n32"], row["n"]) == ("2", "2", "2")
    assert rows["early-16x"]["latency_ms_n32"] == rows["not-there"]["top1_percent_mean"] == ""


def test_tuning_is_told(study):
    rows = {row["cell"]: row for row in csv.DictReader(io.StringIO(comparison.files(study)[comparison.TUNING]))}
    assert rows["8x, early"]["tried"] == "0.03: 75.10, 0.1: 76.25" and rows["8x, early"]["chosen"] == "0.1"
    assert rows["dense"]["tried"] == "0.03: 81.00, 0.1: failed" and rows["dense"]["trials"] == "2"


def test_the_sheet_is_drawn(study, make_study, tmp_path):
    comparison_plots.draw(study, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    bare = make_study(("dense", "not-there"), latency=False, name="compare-bare")
    comparison_plots.draw(studies.read(bare), tmp_path / "bare.png")
    (bare / RUNS).unlink()
    with pytest.raises(ValueError, match="nothing to draw"):
        comparison_plots.draw(studies.read(bare), tmp_path / "none.png")
    assert "not run" in comparison.generate(studies.read(bare))


def test_the_documents_have_every_study_first_and_its_csv(make_study, tmp_path):
    folder = make_study()
    texts = documents.generate(tmp_path)
    [markdown] = [text for path, text in texts.items() if path.name == "RESULTS.md"]
    study = studies.read(folder)
    assert texts[folder / comparison.CSV] == comparison.to_csv(study)
    assert markdown.splitlines()[2] == comparison.verdicts([study]) and " claims hold**; " in markdown.splitlines()[2]
    for name in comparison.files(study):
        assert f"[{name}]({name})" in markdown and folder / name in texts
    places = [markdown.index(f"## {title}") for title in ("Comparisons", "Published recipes")]
    assert places == sorted(places) and "## compare-made" not in markdown
    assert f"]({comparison.PLOT})" in markdown
    assert texts == documents.generate(tmp_path)


def test_no_study_is_said(tmp_path):
    assert "No comparison is recorded" in comparison.section([])
    assert studies.folders(tmp_path) == []


def test_a_cell_knows_what_it_lacks(study):
    cell = dataclasses.replace(study.cells[1], latency={})
    assert cell.latency_s(1) is None and study.speed_up(cell, 1) is None and cell.column("no such field") == {}
