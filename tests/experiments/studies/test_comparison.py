"""The comparison's harness: equal trials for all, what forks from what, going on, records."""

import dataclasses

import pytest
import tiny

from experiments.configs import compare
from experiments.configs.compare import Cell, Study, Tuning
from experiments.configs.methods import AfterConfig, RetrainConfig
from experiments.records import RUNS, RunFolder, keep, kept, read_json
from experiments.studies import comparison as harness
from experiments.studies import jobs

BASE = tiny.changed(method=None, learning_rate=0.1)
END = BASE.epochs
AFTER = dataclasses.replace(tiny.CONFIG.prune, select_epoch=END, prune_epoch=END)


def cell(name, called, group, **changes):
    return Cell(name, called, name, called, group, dataclasses.replace(BASE, name=f"compare-try-{name}", **changes))


STUDY = Study(
    "try",
    "a try",
    (
        cell("dense", "dense", "dense"),
        cell("pruned", "ClickTrain", "clicktrain", method=tiny.CONFIG.prune),
        cell("narrow", "narrow", "narrow", width=0.0625),
        cell("rewind", "PAT", "dense", method=AfterConfig(AFTER, RetrainConfig(2))),
    ),
    (
        Tuning("dense", "dense", "learning_rate", (0.1, 0.2)),
        Tuning("clicktrain", "pruned", "learning_rate", (0.1, 0.2)),
        Tuning("narrow", "narrow", "learning_rate", (0.1, 0.2)),
    ),
)
# Of the trials: the dense run and the narrow one do better with 0.2, the pruned one with 0.1.
SECONDS = 3.5
TRIALS = {"dense": (0.6, 0.7), "pruned": (0.5, 0.4), "narrow": (0.3, 0.35)}


@pytest.fixture
def pretend(monkeypatch):
    """Jobs leave the files of a finished run; the list of those done."""
    done = []

    def do(job, trainers=None):
        name = job.config.name.removeprefix("compare-try-")
        top1 = 0.5
        if job.config.data.eval_split == "validation":
            name, _, value = name.partition("-learning_rate-")
            top1 = TRIALS[name][value == "0.2"]
        folder = RunFolder(job.folder)
        folder.open(job.config, "fingerprint")
        folder.append_metrics({"epoch": 0})
        folder.write_summary(
            {"final_top1": top1, "params_sha256": job.folder.name, "train_and_compile_seconds": SECONDS}
        )
        done.append(job)
        return {}

    monkeypatch.setattr(jobs, "do", do)
    return done


def test_every_group_gets_as_many_trials_and_its_best_one(pretend, tmp_path):
    lines = []
    result = harness.run(STUDY, tmp_path, seeds=(0, 1), tuning_seeds=(7,), workers=0, timing=False, say=lines.append)
    assert result == {"finished": 8, "missing": 0, "failed": {}}
    trials = [job for job in pretend if job.config.data.eval_split == "validation"]
    assert len(trials) == 6 and all(job.folder.parent.name == "tuning" for job in trials)
    final = {job.folder.name: job for job in pretend if job not in trials}
    rates = {name: job.config.learning_rate for name, job in final.items()}
    assert rates["compare-try-dense-seed0"] == rates["compare-try-narrow-seed1"] == 0.2
    assert rates["compare-try-pruned-seed0"] == 0.1
    # Pruned after the dense run: at that run's rate, and from its checkpoints.
    assert rates["compare-try-rewind-seed1"] == 0.2
    assert final["compare-try-rewind-seed1"].trunk == tmp_path / "compare-try-dense-seed1"
    # Another learning rate, or another width: no epoch is shared.
    assert final["compare-try-pruned-seed0"].trunk is None and final["compare-try-narrow-seed0"].trunk is None
    assert final["compare-try-dense-seed0"].config.loop.keep_checkpoints == END
    # A seed at a time.
    assert [job.config.seed for job in pretend if job not in trials] == [0] * 4 + [1] * 4

    study = read_json(tmp_path / "study.json")
    assert [each["chosen"] for each in study["tuning"]] == [0.2, 0.1, 0.2]
    assert study["tuning"][1]["trials"] == [
        {"value": 0.1, "top1": 0.5, "seconds": SECONDS},
        {"value": 0.2, "top1": 0.4, "seconds": SECONDS},
    ]
    tuned_by = {each["name"].rpartition("-")[2]: each["tuned_by"] for each in study["cells"]}
    assert tuned_by == {"dense": ["dense"], "pruned": ["clicktrain"], "narrow": ["narrow"], "rewind": ["dense"]}
    assert study["dense"] == study["cells"][0]["name"] == "compare-try-dense"

    count = len(pretend)
    again = {"seeds": (0, 1), "tuning_seeds": (7,), "workers": 0, "timing": False}
    assert harness.run(STUDY, tmp_path, **again) == result
    assert len(pretend) == count  # nothing was trained twice
    assert harness.collect(STUDY, tmp_path, tmp_path / "records") == 8
    assert (tmp_path / "records" / "compare-try" / "study.json").exists()


def test_without_tunings_every_cell_is_trained_as_it_is(pretend, tmp_path):
    study = dataclasses.replace(STUDY, tunings=())
    result = harness.run(study, tmp_path, seeds=(3,), workers=0, timing=False)
    assert result == {"finished": 4, "missing": 0, "failed": {}}
    assert {job.config.learning_rate for job in pretend} == {STUDY.dense.config.learning_rate}
    assert read_json(tmp_path / "study.json")["tuning"] == []


def test_some_cells_run_with_every_seed_before_the_others_and_each_is_kept_at_once(pretend, tmp_path, monkeypatch):
    study = dataclasses.replace(
        STUDY, tunings=(dataclasses.replace(STUDY.tunings[0], epochs=1),), first=("dense", "narrow")
    )
    records, counts = tmp_path / "records", []

    def say(line):
        runs = kept(records / "compare-try" / RUNS)
        counts.append(len(runs))
        cells = read_json(records / "compare-try" / "study.json")["cells"]
        assert len(cells) == len({run["name"] for run in runs})

    monkeypatch.setattr(jobs, "do_all", lambda wanted, *rest: say_each(wanted, rest[-1]))

    def say_each(wanted, told):
        for job in wanted:
            jobs.do(job)
            if job.folder.parent.name != "tuning":
                told(job.folder.name)

    options = {"seeds": (0, 1), "tuning_seeds": (7,), "workers": 0, "timing": False}
    harness.run(study, tmp_path / "work", **options, records=records, data_dir="/somewhere", say=say)
    trials = [job for job in pretend if job.folder.parent.name == "tuning"]
    assert {job.config.epochs for job in trials} == {1}
    final = [job for job in pretend if job not in trials]
    order = [(job.config.name.rpartition("-")[2], job.config.seed) for job in final]
    assert order == [
        ("dense", 0),
        ("narrow", 0),
        ("dense", 1),
        ("narrow", 1),
        ("pruned", 0),
        ("rewind", 0),
        ("pruned", 1),
        ("rewind", 1),
    ]
    assert counts == [1, 2, 3, 4, 5, 6, 7, 8]
    # At the dense run's rate, tuned or not; and no record tells where the images lay.
    assert {job.config.learning_rate for job in final} == {0.2}
    config = kept(records / "compare-try" / RUNS)[0]["config"]
    assert config["data"]["dir"] is None and config["data"]["cache_dir"] is None
    assert read_json(records / "compare-try" / "study.json")["tuning"][0]["epochs"] == 1


def test_what_the_records_hold_is_not_trained_again(pretend, tmp_path, monkeypatch):
    options = {"seeds": (0,), "tuning_seeds": (7,), "workers": 0, "timing": False, "records": tmp_path / "records"}
    harness.run(STUDY, tmp_path / "first", **options)
    stored = tmp_path / "records" / "compare-try"
    before = {path.name: path.read_bytes() for path in stored.iterdir()}
    count = len(pretend)
    # In a clone elsewhere: the records are there, the run folders are not.
    assert harness.run(STUDY, tmp_path / "second", **options) == {"finished": 4, "missing": 0, "failed": {}}
    assert len(pretend) == count
    assert {path.name: path.read_bytes() for path in stored.iterdir()} == before
    # One seed more; what was another run under the same name, and what was not finished, are trained.
    runs = kept(stored / RUNS)
    runs[0]["config"]["epochs"] += 1
    runs[1]["summary"] = None
    keep(stored / RUNS, runs)
    harness.run(STUDY, tmp_path / "third", **{**options, "seeds": (0, 1)})
    trained = {(job.config.name, job.config.seed) for job in pretend[count:]}
    assert trained == {(run["name"], run["seed"]) for run in runs[:2]} | {(run["name"], 1) for run in runs}
    # Nets without checkpoints are not timed.
    timed = []
    monkeypatch.setattr(harness.latency, "measure", lambda runs, data_dir: timed.extend(runs) or {"nets": {}})
    harness.run(STUDY, tmp_path / "second", **{**options, "timing": True})
    assert not timed


def test_no_final_run_before_all_trials(pretend, tmp_path):
    result = harness.run(STUDY, tmp_path, seeds=(0,), minutes=0, workers=0, timing=False)
    # The dense run's two trials come first, with three seeds each.
    assert result["finished"] == 0 and result["missing"] == 6 and not pretend


def test_some_cells_alone(pretend, tmp_path):
    harness.run(STUDY, tmp_path, seeds=(0,), workers=0, timing=False, only="narrow-none|pruned")
    pretend.clear()
    result = harness.run(STUDY, tmp_path, seeds=(0,), workers=0, timing=False, only="rewind")
    assert result["finished"] == 2
    # What an earlier call found stays told.
    study = read_json(tmp_path / "study.json")
    assert [each["name"].rpartition("-")[2] for each in study["cells"]] == ["dense", "pruned", "rewind"]
    assert {each["group"] for each in study["tuning"]} == {"dense", "clicktrain"}
    assert {job.config.name for job in pretend} == {"compare-try-rewind"}
    assert not any("narrow" in job.config.name for job in pretend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "expected at least one, all different"),
        ({"seeds": (1, 1)}, "expected at least one, all different"),
        ({"minutes": -1.0}, "expected 0 or more"),
        ({"only": "no such"}, "leaves no cell; the cells are dense, pruned"),
    ],
)
def test_bad_input(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        harness.run(STUDY, tmp_path, workers=0, **options)


def test_the_named_studies_are_whole():
    for study in compare.studies():
        assert study.dense.method == "dense" and compare.study(study.name) == study
        names = [each.config.name for each in study.cells]
        assert len(set(names)) == len(names)
        methods = {each.method for each in study.cells}
        if study.name == "slim-seconds":  # tuned as the slim one, its cells longer
            assert methods == {"ClickTrain", "PAT", "PDT", "dense", "narrow"} and not study.tunings
            continue
        assert methods == {"ClickTrain", "PAT", "PDT", "dense", "narrow", "one-shot", "random"}
        tuned = {tuning.group for tuning in study.tunings}
        # The slim study takes the dense run's rate for all.
        assert tuned == ({"dense"} if study.name == "slim" else {each.group for each in study.cells})
        assert set(study.first) <= {each.name for each in study.cells}
        assert len({len(tuning.values) for tuning in study.tunings}) == 1  # as many trials for each
    with pytest.raises(ValueError, match="no study 'nets'; the studies are digits, slim, slim-seconds, vgg13"):
        compare.study("nets")
    with pytest.raises(ValueError, match="no cell 'best'"):
        compare.study("digits").cell("best")


def test_what_is_no_field_of_a_config_is_one_of_its_method():
    """As trials are named: "admm.rho"."""
    config = compare.study("digits").cell("admm-20").config
    changed = harness.with_field(config, "admm.rho", 0.5)
    assert changed.method.admm == dataclasses.replace(config.method.admm, rho=0.5)
    assert harness.with_field(changed, "admm.rho", config.admm.rho) == config
    assert harness.with_field(config, "learning_rate", 0.5).learning_rate == 0.5
