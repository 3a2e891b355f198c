"""Run, export, evaluate: the accuracy stays what it was, and the page is there."""

import ctypes
import json
import shutil
import subprocess

import numpy as np
import pytest
import tiny

import clicktrain_jax as ct
from experiments.__main__ import main
from experiments.records import read_json
from experiments.studies import export as exports
from experiments.train import loop


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_trainer):
    path = tmp_path_factory.mktemp("finished") / "run"
    loop.train(tiny.CONFIG, path, trainer=tiny_trainer)
    return path


@pytest.fixture(scope="module")
def exported(finished):
    path = finished.parent / "exported"
    exports.export_run(finished, path, is_timed=False)
    return path


@pytest.fixture
def capture(capsys):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_export_is_as_accurate_as_its_run(finished, exported):
    summary = read_json(finished / "summary.json")
    accuracy = read_json(exported / "manifest.json")["facts"]["accuracy"]
    assert accuracy["top1"] == accuracy["run_top1"] == summary["final_top1"]
    assert (accuracy["split"], accuracy["examples"]) == (summary["eval_split"], summary["eval_examples"])
    found = exports.evaluate_export(exported)
    assert found["top1"] == found["exported_top1"] == summary["final_top1"]


def test_logits_are_those_of_the_masked_net(finished, exported):
    run = exports.restore(finished)
    images = run.dataset.eval_images[:7]
    variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}
    pixels = (images.astype(np.float32) / 255 - np.float32(run.dataset.mean)) / np.float32(run.dataset.std)
    expected = run.trainer.model.apply(variables, pixels, train=False)
    np.testing.assert_allclose(ct.load(exported)(images), expected, atol=1e-4)


def test_the_page_tells_of_this_run(exported):
    text = (exported / exports.REPORT).read_text()
    assert "tiny" in text and "not measured" in text
    assert f"{100 * read_json(exported / 'manifest.json')['facts']['accuracy']['top1']:.2f}" in text


def test_commands(finished, exported, tmp_path, capture):
    code, out, _ = capture("export", finished, "--out", tmp_path / "out", "--dtype", "int8", "--no-timing")
    assert code == 0
    assert "weights int8" in out and "top-1 on the test set of 599" in out
    assert (tmp_path / "out" / "weights.safetensors").stat().st_size < (exported / "weights.safetensors").stat().st_size
    code, out, _ = capture("evaluate", tmp_path / "out")
    assert code == 0 and "as when it was exported" in out
    code, out, _ = capture("evaluate", finished)
    assert code == 0 and "after 5 of 5 epochs" in out


def test_a_net_in_c(finished, tmp_path, capture):
    """From the run to a program: compiled here, it answers as the export does."""
    if shutil.which("gcc") is None:
        pytest.skip("not installed: gcc")
    out = tmp_path / "out"
    code, _, _ = capture("export", finished, "--out", out, "--c", "--no-stablehlo", "--no-timing")
    assert code == 0 and {"net.c", "net.h"} <= {path.name for path in out.iterdir()}
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-o", tmp_path / "net.so"]
    subprocess.run([*command, out / "net.c", "-lm"], check=True)
    library = ctypes.CDLL(str(tmp_path / "net.so"))
    images = exports.restore(finished).dataset.eval_images[:5]
    logits = np.zeros((5, 10), np.float32)
    for image, row in zip(np.ascontiguousarray(images), logits):
        library.net_run(*(ctypes.c_void_p(array.ctypes.data) for array in (image, row)))
    np.testing.assert_allclose(logits, ct.load(out)(images), atol=1e-4)
    assert capture("evaluate", out)[0] == 0


@pytest.mark.slow
def test_timing_is_in_the_page(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path / "cache"))
    exports.export_run(finished, tmp_path / "out")
    text = (tmp_path / "out" / exports.REPORT).read_text()
    assert "dense (XLA)" in text and "this net" in text


def test_what_cannot_be_exported(finished, tmp_path, capture):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished)
    (unfinished / "summary.json").unlink()
    for arguments, message in (
        (("export", unfinished), "only a finished run is exported"),
        (("export", tmp_path / "nowhere"), "no summary.json"),
        (("export", finished, "--out", finished), "is no export and not empty"),
        (("export",), "Missing from python -m experiments export: RUN the run folder. (required) (all fields"),
    ):
        code, _, err = capture(*arguments)
        assert (code, message in err) == (2, True), err


def test_a_changed_export_is_not_evaluated(exported, tmp_path, capture):
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    manifest = read_json(broken / "manifest.json")
    manifest["facts"]["accuracy"]["top1"] = 1.0
    (broken / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = capture("evaluate", broken)
    assert code == 2 and "manifest.json" in err
