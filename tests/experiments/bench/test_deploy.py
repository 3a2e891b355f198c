"""The benchmark of exports: wrong answers are not timed, figures follow from what was timed, engines compute alike."""

import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.deploy import load
from experiments.bench import c_library, drawn, engines, worker
from experiments.bench import deploy as bench
from experiments.bench.engines import DENSE, IN_C, NATIVE, OPENVINO, ORT, PLAIN, THIS_NET, Job
from experiments.records import read_json
from experiments.report import deploy


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "tiny.export"
    model = models.build("small", num_classes=10, width=0.25)
    rng = np.random.default_rng(0)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32), train=False))
    # Quicker than the net's own initialisation, and with variances above 0.
    variables = jax.tree.map(lambda leaf: rng.uniform(-0.2, 0.8, leaf.shape).astype(np.float32) ** 2, variables)
    plan = ct.make_plan(variables["params"], {"Conv_0/kernel": None, "Conv_.*/kernel": 0.5}, tile=(8, 1))
    masks = ct.select_masks(jax.tree.map(np.abs, variables["params"]), plan, ct.patterns.fixed_set(4))
    net = {"name": "small", "num_classes": 10, "width": 0.25, "precision": "float32"}
    ct.export(
        path,
        lambda variables, images: model.apply(variables, images, train=False),
        variables,
        masks,
        image_shape=(8, 8, 1),
        normalise={"mean": [0.4], "std": [0.25]},
        net=net,
        stablehlo=False,
    )
    return path


@pytest.fixture(scope="module")
def job(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        # Its tests are elsewhere, and its import takes long.
        patch.setattr(bench, "to_onnx", lambda *arguments: (_ for _ in ()).throw(ValueError("no converter here")))
        bench.hand_over(ct.load(exported), exported, folder)
    return Job(exported, folder, "cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path / "cache"))


@functools.cache
def loaded(path):
    return load(path)


class FakeWorker:
    """Answers without an engine: `ANSWERS` by engine, `{form: (seconds, what is added to the logits)}`."""

    ANSWERS = {
        THIS_NET: {"tuned": (0.01, 0.0)},
        DENSE: {"good": (0.04, 0.0), "slow": (0.4, 0.0)},
        ORT: {"wrong": (0.001, 1.0), "not a number": (0.001, np.nan), "right": (0.02, 1e-6)},
        OPENVINO: {},
    }
    asked: list = []

    def __init__(self, engine, job, python=None):
        if engine not in self.ANSWERS:
            raise worker.Failed("it is not installed")
        self.engine, self.job, self.version = engine, job, f"{engine} 1.0"

    def ask(self, do, **details):
        self.asked.append((self.engine, do, details))
        return getattr(self, do, lambda **_: {})(**details)

    def prepare(self, images, without=(), only=None):
        array = np.load(images)
        logits = np.asarray(loaded(self.job.export).dense(len(array))(array))
        forms = {form: added for form, (_, added) in self.ANSWERS[self.engine].items() if form not in without}
        path = str(Path(images).with_suffix(f".{len(self.asked)}.npz"))
        np.savez(path, **{form: logits + added for form, added in forms.items()})
        return {"logits": path, "failed": {"broken": "RuntimeError: no"} if self.engine == OPENVINO else {}}

    def sample(self, form, calls):
        return {"seconds": self.ANSWERS[self.engine][form][0] * self.size(), "calls": calls or 5}

    def size(self):
        return next(int(Path(d["images"]).stem.split("-")[1]) for e, do, d in self.asked[::-1] if do == "prepare")

    def start(self, images, form):
        return {"seconds": 1.5, "bytes_before": 1000, "peak_bytes": 5000, "device_bytes": None}

    def memory(self):
        return {"peak_bytes": 7000, "device_bytes": None}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "asked", [])
    monkeypatch.setattr(bench, "to_onnx", lambda *arguments: b"")
    monkeypatch.setattr(bench, "compile_c", lambda files, folder: None)
    monkeypatch.setattr(bench, "_REST_S", 0)
    monkeypatch.setattr(
        bench.timing,
        "layers",
        lambda net, batch: [
            {"name": "a", "dense_s": 0.002, "pattern_s": 0.001, "runs": "pattern", "why": "measured"},
            {"name": "b", "dense_s": 0.002, "pattern_s": None, "runs": "dense", "why": "nothing of it is removed"},
        ],
    )
    monkeypatch.setattr(bench.InferenceNet, "tuned", lambda net, batch: net)
    monkeypatch.setattr(bench.ct, "load", loaded)


def test_what_is_recorded(exported, faked, tmp_path):
    text = bench.run(exported, latency=(1, 2), throughput=(4,), rounds=6, out=tmp_path / "new" / "record.json")
    record = read_json(tmp_path / "new" / "record.json")
    assert deploy.deploy_tables(record) == text
    assert record["command"].startswith("python -m experiments bench deploy tiny.export")
    assert list(record["batches"]) == ["1", "2", "4"] and record["throughput"] == [4]
    assert set(record["unavailable"]) == {IN_C, NATIVE, PLAIN} and record["tile"] == [8, 1]
    assert list(record["engines"]) == [THIS_NET, DENSE, ORT, OPENVINO]
    first = record["batches"]["1"]
    assert first[THIS_NET]["median_s"] == 0.01 and first[THIS_NET]["form"] == "tuned"
    # Its best form counts; the slow one is left out after the first rounds, and from the next size on.
    assert first[DENSE]["form"] == "good" and first[DENSE]["median_s"] == 0.04
    assert first[DENSE]["forms"]["good"]["samples"] == 6 and first[DENSE]["forms"]["slow"]["samples"] == 3
    assert list(record["batches"]["2"][DENSE]["forms"]) == ["good"]
    # What is wrong is not timed, however fast.
    assert first[ORT]["form"] == "right" and set(first[ORT]["refused"]) == {"wrong", "not a number"}
    assert "median_s" not in first[OPENVINO] and first[OPENVINO]["refused"] == {"broken": "RuntimeError: no"}
    timed = {details["form"] for _, do, details in FakeWorker.asked if do == "sample"}
    assert timed == {"tuned", "good", "slow", "right"}
    start = record["starts"][THIS_NET]
    assert start["seconds"] == 1.5 and start["bytes"] == {"1": 4000, "2": 6000, "4": 6000}
    assert set(record["starts"]) == {THIS_NET, DENSE, ORT}
    assert not list(tmp_path.glob("**/*.npz"))


def test_rounds_go_round(exported, faked):
    bench.run(exported, latency=(1,), throughput=(), rounds=4)
    sampled = [(engine, details["form"]) for engine, do, details in FakeWorker.asked if do == "sample"]
    ways = [(THIS_NET, "tuned"), (DENSE, "good"), (DENSE, "slow"), (ORT, "right")]
    assert sampled[:12] == ways + ways[1:] + ways[:1] + ways[2:] + ways[:2]
    left = [way for way in ways if way != (DENSE, "slow")]
    assert sampled[12:] == left  # the fourth round begins with the first again


def test_an_engine_that_would_take_too_long(exported, faked, monkeypatch):
    monkeypatch.setitem(FakeWorker.ANSWERS, DENSE, {"good": (4.0, 0.0)})
    bench_text = bench.run(exported, latency=(1,), throughput=(4,), rounds=1)
    assert "dense (XLA), not timed for N = 4: about 16 s a call: left out" in bench_text


def test_quick_has_no_throughput(exported, faked, tmp_path):
    bench.run(exported, quick=True, out=tmp_path / "record.json")
    record = read_json(tmp_path / "record.json")
    assert record["quick"] and list(record["batches"]) == ["1", "8", "32"]
    assert record["batches"]["1"][THIS_NET]["forms"]["tuned"]["samples"] == 5


@pytest.mark.parametrize("options", [{"latency": (), "throughput": ()}, {"latency": (0,)}, {"rounds": 0}])
def test_bad_sizes(exported, options):
    with pytest.raises(ValueError, match="expected at least one size"):
        bench.run(exported, **options)


def test_a_folder_that_is_no_export(tmp_path):
    with pytest.raises(ValueError, match="manifest"):
        bench.run(tmp_path)


def test_differences():
    wanted = np.array([[1.0, -4.0]])
    assert bench.worst_difference(wanted + 0.1, wanted) == pytest.approx(0.025)
    assert bench.worst_difference(wanted[:, :1], wanted) == float("inf")
    assert not bench.worst_difference(wanted * np.nan, wanted) <= bench.TOLERANCE


def images_of(job, size=2):
    path = bench.images_file(job.folder, size)
    np.save(path, bench.timing.images_of(size, (8, 8, 1)))
    return path


@pytest.mark.parametrize("name", [NATIVE, DENSE, PLAIN, THIS_NET, IN_C])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_form_is_right(name, job, monkeypatch):
    monkeypatch.setattr(bench.InferenceNet, "tuned", lambda net, batch: net)
    if importlib.util.find_spec(engines.PACKAGES[name]) is None:
        pytest.skip(f"{engines.PACKAGES[name]} is not installed")
    try:
        engine = engines.ENGINES[name](job)
    except ImportError as error:
        pytest.skip(f"{engines.PACKAGES[name]} does not work here: {error}")
    engine.load()
    images = np.load(images_of(job))
    expected = ct.load(job.export)(images)
    made = engine.forms(images)
    assert made
    for form, make in made.items():
        found = np.array(make()(), np.float32)
        assert bench.worst_difference(found, np.asarray(expected)) < 1e-5, form
    np.testing.assert_allclose(np.array(engine.first(images, next(iter(made)))), expected, atol=1e-4)


def test_engines_of_the_cpu_are_not_compared_with_a_gpu(job):
    with pytest.raises(engines.Unavailable, match="not compared with a GPU"):
        engines.OnnxRuntime(Job(job.export, job.folder, "gpu"))


def test_a_name_draws_its_net(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(drawn.ct, "export", lambda folder, apply_fn, variables, masks, **_: kept.update(masks=masks))
    assert drawn.export_named("small-4x-8x1", tmp_path / "a") and not drawn.export_named("net.export", tmp_path)
    report = ct.report(jax.tree.map(jnp.ones_like, kept["masks"].pattern), kept["masks"])
    assert report.conv_compression == pytest.approx(4, rel=0.05)
    with pytest.raises(ValueError, match="vgg12"):
        drawn.export_named("vgg12-8x-8x1", tmp_path / "b")


def test_cores_are_given_back():
    before = os.sched_getaffinity(0)
    with bench._on(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match="cores=1000"), bench._on(1000):
        pass


def test_c_that_does_not_compile_says_why(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="error"):
        c_library.compile_c({"net.h": b"", "net.c": b"no C"}, tmp_path)
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    with pytest.raises(ValueError, match="no compiler: "):
        c_library.compile_c({"net.h": b"", "net.c": b""}, tmp_path)


@contextlib.contextmanager
def started(name, job):
    """A worker, or a skip that says why there is none."""
    try:
        process = worker.Worker(name, job)
    except worker.Failed as reason:
        pytest.skip(str(reason))
    with process:
        yield process


def test_a_library_that_is_not_installed(job, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(job.folder))
    (job.folder / "onnxruntime.py").write_text("raise ModuleNotFoundError('none', name='onnxruntime')")
    (job.folder / "openvino.py").write_text("raise ImportError('a file of it is missing')")
    with pytest.raises(worker.Failed, match="^onnxruntime is not installed$"):
        worker.Worker(ORT, job)
    with pytest.raises(worker.Failed, match="^openvino cannot be imported: a file of it is missing$"):
        worker.Worker(OPENVINO, job)


@pytest.mark.parametrize("name", [ORT, OPENVINO])
def test_an_engine_without_its_model_says_why(name, job):
    with started(name, job) as process:
        with pytest.raises(worker.Failed, match="^no converter here$"):
            process.ask("load")


@pytest.mark.slow
def test_the_exported_net_in_a_process_of_its_own(job):
    images = images_of(job)
    with worker.Worker(THIS_NET, job) as process:
        with pytest.raises(worker.Failed, match="KeyError"):
            process.ask("sample", form="nothing was prepared", calls=1)
        found = process.ask("start", images=str(images), form="tuned")
        assert found["peak_bytes"] > found["bytes_before"] and found["device_bytes"] is None
        answer = process.ask("prepare", images=str(images))
        assert answer["failed"] == {}
        with np.load(answer["logits"]) as logits:
            (form,) = logits
            assert form.startswith("as loaded: ")
            np.testing.assert_allclose(logits[form], ct.load(job.export)(np.load(images)), atol=1e-4)
        sample = process.ask("sample", form=form, calls=None)
        assert sample["seconds"] > 0 and sample["calls"] >= 1
        assert process.ask("sample", form=form, calls=3)["calls"] == 3
        os.kill(process._process.pid, 9)
        with pytest.raises(worker.Failed, match="ended with -9"):
            process.ask("memory")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the converter
def test_every_engine_that_is_installed(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_REST_S", 0)
    bench.run(exported, latency=(1, 3), quick=True, out=tmp_path / "record.json")
    record = read_json(tmp_path / "record.json")
    assert {THIS_NET, DENSE, PLAIN} <= set(record["engines"])
    assert set(record["engines"]) | set(record["unavailable"]) == set(engines.ENGINES)
    for batch in record["batches"].values():
        for name in record["engines"]:
            assert batch[name]["median_s"] > 0 and record["starts"][name]["seconds"] > 0
            # Only what OpenVINO does unasked may be off, where the CPU has bfloat16.
            assert set(batch[name]["refused"]) <= ({"its default precision"} if name == OPENVINO else set())


MEMORY = """
import numpy as np
from experiments.bench import worker
before = worker.resident_bytes(reset=True)
array = np.ones(2**23, np.float64)  # touched, 64 MiB
with_array = worker.resident_bytes()
assert 0.9 * array.nbytes < with_array - before, (before, with_array)
del array
assert worker.resident_bytes() > before + 2**25
"""


def test_memory_is_the_most_since_it_was_reset():
    # In a process of its own: here what earlier tests held may be freed at any moment.
    subprocess.run([sys.executable, "-c", MEMORY], check=True, timeout=300)
