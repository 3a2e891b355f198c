"""The ablation: its cells, forks that change no bit, the rule of halving, the harness, the table."""

import dataclasses
import functools

import pytest
import tiny

from clicktrain_jax import models
from clicktrain_jax.models import sizes
from experiments.configs import ablation as cells_of
from experiments.configs import to_dict
from experiments.records import RUNS, RunFolder, kept, read_config, read_json, read_metrics
from experiments.report import ablation as table
from experiments.studies import ablation, jobs
from experiments.train import forks, loop
from experiments.train.checkpoints import Checkpoints
from experiments.train.recipe import make_plan
from experiments.train.step import Trainer

DENSE = tiny.changed(name="try-dense", method=None)


def cell(name, question="when", must=False, reference="base", **changes):
    prune = dataclasses.replace(tiny.CONFIG.prune, **changes)
    return cells_of.Cell(name, question, reference, must, tiny.changed(name=f"try-{name}", method=prune))


FAMILY = cells_of.Family(
    "try", DENSE, (cell("base", must=True), cell("late", select_epoch=2), cell("later", select_epoch=2, prune_epoch=4))
)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, tiny_dataset):
    """Run folder of a dense run that has finished one epoch."""
    folder = RunFolder(tmp_path_factory.mktemp("trunk") / "try-dense-seed0")
    trainer = Trainer(DENSE, tiny_dataset)
    state, _ = trainer.run_epoch(trainer.init(0), 0, 0)
    folder.open(DENSE, tiny_dataset.fingerprint)
    folder.append_metrics({"epoch": 0, "train_seconds": 123.0, "compile_seconds": 0.0})
    checkpoints = Checkpoints(folder.checkpoints)
    checkpoints.save(1, state)
    checkpoints.close()
    return folder.path


@pytest.fixture(scope="module")
def forked(trunk, tiny_trainer, tmp_path_factory):
    """A run forked from the trunk: its folder and summary."""
    folder = tmp_path_factory.mktemp("forked") / "run"
    return folder, forks.train_forked(tiny.CONFIG, folder, trunk, trainer=tiny_trainer)


def test_a_forked_run_ends_with_the_bits_of_one_trained_from_scratch(forked, trunk, tiny_trainer, tmp_path):
    whole = loop.train(tiny.CONFIG, tmp_path / "whole", trainer=tiny_trainer)
    folder, summary = forked
    same = ("params_sha256", "masks_sha256", "final_top1", "final_loss", "conv_compression", "layers")
    assert {key: summary[key] for key in same} == {key: whole[key] for key in same}
    mark = read_json(folder / "setting.json")["forked"]
    assert (mark["from"], mark["epochs"]) == ("try-dense-seed0", 1)
    # The epoch before the fork is told and counted as it was in the trunk,
    assert [line["epoch"] for line in read_metrics(folder)] == list(range(tiny.CONFIG.epochs))
    # but for the dense update, which was compiled for this run.
    first = read_metrics(folder)[0]
    assert first.pop("compile_seconds") > 0 and summary["train_seconds"] > 123
    assert first == {key: value for key, value in read_metrics(trunk)[0].items() if key != "compile_seconds"}


def test_a_fork_goes_on_from_its_own_checkpoints(forked, trunk, tiny_trainer):
    folder, summary = forked
    lines = read_metrics(folder)
    assert forks.train_forked(tiny.CONFIG, folder, trunk, trainer=tiny_trainer) == summary
    (folder / "summary.json").unlink()  # as if killed before its very end
    assert forks.train_forked(tiny.CONFIG, folder, trunk, trainer=tiny_trainer) == summary
    assert read_metrics(folder) == lines


def test_without_a_trunk_the_run_begins_at_its_first_update(tiny_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(forks, "train", lambda config, folder, **_: folder.exists())
    assert forks.train_forked(tiny.CONFIG, tmp_path / "run", tmp_path / "no trunk", trainer=tiny_trainer) is False


def test_a_trunk_of_another_run_is_refused(trunk, tiny_dataset, tiny_trainer, tmp_path):
    with pytest.raises(ValueError, match="is no dense run of tiny: its seed is 0, the cell's 1"):
        forks.train_forked(tiny.changed(seed=1), tmp_path / "run", trunk, trainer=tiny_trainer)
    other = Trainer(tiny.changed(learning_rate=0.2), tiny_dataset)
    with pytest.raises(ValueError, match="its learning_rate is 0.1, the cell's 0.2"):
        forks.train_forked(other.config, tmp_path / "run", trunk, trainer=other)


def test_the_fork_is_before_the_first_gathered_score():
    def at(select_epoch, importance_steps):
        prune = dataclasses.replace(
            tiny.CONFIG.prune, select_epoch=select_epoch, prune_epoch=4, importance_steps=importance_steps
        )
        return forks.fork_epoch(tiny.changed(method=prune), steps_per_epoch=5)

    assert [at(2, 1), at(2, 2), at(2, 6), at(2, 7)] == [2, 1, 1, 0]
    assert [at(0, 1), at(1, 16)] == [0, 0]


def test_halving_by_hand():
    cells = [
        cell("base", "patterns", must=True),
        cell("a", "patterns"),
        cell("b", "patterns"),
        cell("c", "patterns"),
        cell("d", "patterns"),
        cell("alone", "lasso"),
        cell("first", "removal"),
        cell("second", "removal"),
        cell("gone", "target"),
    ]
    top1 = {"base": 0.1, "a": 0.4, "b": 0.6, "c": 0.5, "d": 0.2, "alone": 0.3, "first": 0.7, "second": 0.7}
    decided = ablation.halve(cells, top1)
    assert {question: found["kept"] for question, found in decided.items()} == {
        "patterns": ["b", "c", "a", "base"],
        "removal": ["first"],
        "lasso": ["alone"],
    }
    assert decided["patterns"]["ranking"][0] == ["b", 0.6]


TOP1 = {"dense": 0.9, "base": 0.2, "late": 0.5, "later": 0.4}


@pytest.fixture
def pretend(monkeypatch):
    """Jobs leave the files of a finished run, and say when they were done."""
    done = []

    def do(job):
        assert job.trunk is None or job.trunk.name in done
        folder = RunFolder(job.folder)
        folder.open(job.config, "fingerprint")
        folder.append_metrics({"epoch": 0})
        folder.write_summary({"final_top1": TOP1[job.config.name.removeprefix("try-")]})
        done.append(job.folder.name)
        return {}

    monkeypatch.setattr(jobs, "do", do)
    return done


def test_the_harness_halves_goes_on_and_collects(pretend, tmp_path):
    lines = []
    result = ablation.run(FAMILY, tmp_path, seeds=(0, 1), workers=0, data_dir="here", say=lines.append)
    assert pretend == [
        "try-dense-seed0",
        "try-dense-seed1",
        "try-base-seed0",
        "try-late-seed0",
        "try-later-seed0",
        # The better half of three is two, and the base is a must.
        "try-base-seed1",
        "try-late-seed1",
        "try-later-seed1",
    ]
    assert result == {"finished": 8, "missing": 0, "failed": {}}
    assert lines[2].startswith("try-base-seed0: top-1 20.00, ")
    halving = (tmp_path / "halving-try.json").read_text()
    assert read_json(tmp_path / "halving-try.json")["questions"] == {
        "when": {"ranking": [["late", 0.5], ["later", 0.4], ["base", 0.2]], "kept": ["late", "later", "base"]}
    }
    assert read_config(tmp_path / "try-late-seed1").data.dir == "here"
    # Done is done.
    assert ablation.run(FAMILY, tmp_path, seeds=(0, 1), workers=0, say=lines.append) == result
    assert len(lines) == len(pretend) == 8 and (tmp_path / "halving-try.json").read_text() == halving
    assert ablation.collect(tmp_path, tmp_path / "records") == 8
    copied = {(run["name"], run["seed"]): run for run in kept(tmp_path / "records" / RUNS)}
    assert len(copied) == 8 and copied["try-base", 1] == RunFolder(tmp_path / "try-base-seed1").record()


def test_halving_drops_what_is_behind(pretend, tmp_path):
    family = dataclasses.replace(FAMILY, cells=FAMILY.cells[1:])
    ablation.run(family, tmp_path, seeds=(3, 4), workers=0)
    assert pretend[2:] == ["try-late-seed3", "try-later-seed3", "try-late-seed4"]


@pytest.mark.slow
def test_worker_processes_train_the_same_bits_as_this_one(tmp_path):
    def short(name, **changes):
        config = tiny.changed(name=f"try-{name}", epochs=3, partial_batch="drop", mixup_epoch=None, method=None)
        if not changes:
            return config
        return dataclasses.replace(config, method=dataclasses.replace(tiny.CONFIG.prune, **changes))

    base = cells_of.Cell("base", "when", "base", True, short("base", prune_epoch=2))
    family = cells_of.Family("try", short("dense"), (base,))
    runs = {}
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        assert ablation.run(family, folder, seeds=(0,), workers=workers) == {"finished": 2, "missing": 0, "failed": {}}
        runs[workers] = read_json(folder / "try-base-seed0" / "summary.json")
        assert read_json(folder / "try-base-seed0" / "setting.json")["forked"]["epochs"] == 1
    assert runs[0]["params_sha256"] == runs[1]["params_sha256"]


def test_no_run_starts_after_the_time_is_spent(tmp_path):
    result = ablation.run(FAMILY, tmp_path, minutes=0, workers=0)
    assert result == {"finished": 0, "missing": 3, "failed": {}}
    assert not list(tmp_path.glob("*-seed*")) and not list(tmp_path.glob("halving*"))


def test_a_cell_that_cannot_run_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def fail(job):
        if "late-" in job.folder.name:
            return {"error": "no such tile"}
        RunFolder(job.folder).path.mkdir()
        RunFolder(job.folder).write_summary({"final_top1": 0.5})
        return {}

    monkeypatch.setattr(jobs, "do", fail)
    lines = []
    result = ablation.run(FAMILY, tmp_path, seeds=(0,), workers=0, say=lines.append)
    assert result["failed"] == {"try-late-seed0": "no such tile"} and result["missing"] == 0
    assert "try-late-seed0: failed: no such tile" in lines
    halving = read_json(tmp_path / "halving-try.json")
    assert [name for name, _ in halving["questions"]["when"]["ranking"]] == ["base", "later"]
    assert halving["failed"] == result["failed"]


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least one, all different"):
        ablation.run(FAMILY, tmp_path, seeds=(0, 0))
    with pytest.raises(ValueError, match="workers=-1, minutes=None"):
        ablation.run(FAMILY, tmp_path, workers=-1)
    with pytest.raises(ValueError, match="workers=999: this process may use"):
        ablation.run(FAMILY, tmp_path, workers=999)


def record(name, seed, top1, **fields):
    config = next(config for config in cells_of.configs() if config.name == name)
    setting = {
        "date": "2026-11-22T10:00:00+00:00",
        "device": {"platform": "cpu", "kind": "cpu"},
        "cpu": {"model": "A CPU", "cores": 1},
    }
    return {
        "name": name,
        "seed": seed,
        "final_top1": top1,
        "conv_compression": 8.6,
        "train_seconds": 60.0,
        "dataset": "cifar10",
        "encoding": "jpeg",
        "train_examples": 6000,
        "eval_split": "validation",
        "eval_examples": 5000,
        "net": "vgg11",
        "width": 0.25,
        "epochs": 10,
        "setting": setting,
        "config": to_dict(dataclasses.replace(config, seed=seed)),
        "group": "ablation",
        **fields,
    }


RECORDS = [
    *(record("ablation-base", seed, top1) for seed, top1 in enumerate((0.50, 0.52, 0.54))),
    *(record("ablation-cov8", seed, top1) for seed, top1 in enumerate((0.52, 0.53, 0.55))),
    *(record("ablation-both-32x1", seed, top1) for seed, top1 in enumerate((0.48, 0.49, 0.51))),
    record("ablation-lasso-0", 0, 0.49, retained_importance=0.61),
    record("ablation-dense", 0, 0.60),
]


def test_a_table_and_a_plot_from_records_by_hand(tmp_path):
    text = table.generate(RECORDS)
    rows = {
        line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    }
    assert rows["cov8"] == ["3", "53.33 ± 1.53", "base", "+1.33 ± 0.58", "+1.00 ± 0.00", "8.60x", "", "60 ± 0"]
    assert rows["base"][2:5] == ["", "", ""]
    assert rows["dense"][:5] == ["1", "60.00", "base", "+10.00", ""]
    assert rows["lasso-0"][3] == "-1.00" and rows["lasso-0"][6] == "0.61"
    table.plot(RECORDS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_records_that_are_not_of_these_cells_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ablation-base, seed 0, was made with another config"):
        bad = record("ablation-base", 0, 0.5)
        table.generate([bad | {"config": bad["config"] | {"epochs": 11}}])
    with pytest.raises(ValueError, match="'stray' is of no cell"):
        table.generate([RECORDS[0] | {"name": "stray"}])
    with pytest.raises(ValueError, match="no records of the ablation to draw"):
        table.plot([], tmp_path / "plot.png")


@pytest.mark.parametrize("family", cells_of.families(), ids=lambda family: family.prefix)
def test_cells_differ_from_the_dense_run_in_the_pruning_only(family):
    names = [one.name for one in family.cells]
    assert names[0] == "base" and len(set(names)) == len(names)
    prunes = [one.config.prune for one in family.cells]
    assert all(prune not in prunes[:index] for index, prune in enumerate(prunes)), "two cells are the same run"
    for one in family.cells:
        assert dataclasses.replace(one.config, method=None, name="", expected="") == dataclasses.replace(
            family.dense, name="", expected=""
        )
        assert one.question in cells_of.QUESTIONS
        assert next(other for other in family.cells if other.name == one.reference).must
        # `python -m experiments list` has 31 columns for a name.
        assert len(one.config.name) < 31
        assert one.config.data.eval_split == "validation"
    assert {one.question for one in family.cells} == set(cells_of.QUESTIONS)


@pytest.mark.parametrize("family", cells_of.families(), ids=lambda family: family.prefix)
def test_every_cell_can_be_planned(family, monkeypatch):
    """Fractions that leave nothing of a narrow layer in wide tiles, or options that exclude each other, show here."""
    monkeypatch.setattr(sizes, "_trace", functools.cache(sizes._trace))  # one net for all cells
    dense = family.dense
    model = models.build(dense.net, num_classes=10, width=dense.width)
    shape = models.default_image_shape(dense.net)
    params = models.abstract_variables(model, shape)["params"]
    for one in family.cells:
        plan = make_plan(one.config.prune, model, params, shape, dense.net)
        assert len(plan.layers) == len(models.prunable_convs(model, shape))
