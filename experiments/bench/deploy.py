"""An exported net beside dense engines: latency, throughput, memory, startup, size; one table, one record.

    python -m experiments bench deploy vgg13.export --engines-python OTHER/bin/python --out RECORD.json

Every engine has a process of its own, with the library it needs and every core that this process may use; the rounds
go from one to the next, so that what disturbs the machine disturbs them alike. Engines run the same net: all of its
weights, those that are removed being zero. An engine with several forms is given all of them, and its best counts.
Nothing is timed before its logits are right.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import clicktrain_jax as ct
from clicktrain_jax.deploy import InferenceNet, storage
from clicktrain_jax.deploy.c_net import to_c
from clicktrain_jax.deploy.export import ONNX as EXPORTED_ONNX
from clicktrain_jax.deploy.onnx import to_onnx
from experiments.bench import drawn, timing
from experiments.bench.c_library import LIBRARY, compile_c
from experiments.bench.engines import ENGINES, ONNX, OPENVINO, ORT, Job
from experiments.bench.worker import Failed, Worker
from experiments.records import setting, write_json
from experiments.report import deploy as tables

LATENCY, THROUGHPUT = (1, 8, 32), (128, 512)
# Largest allowed max|difference| / max|logit|.
TOLERANCE = 1e-3
ROUNDS, STARTS, _BUDGET_S = 20, 3, 60.0
_QUICK = {"rounds": 5, "budget_s": 5.0, "starts": 1}
# A form that is so much slower than its engine's best after a few rounds, or was at the batch size before, is left out.
_SCREENING, _FAR = 3, 1.5
# After its last call an engine's threads may wait for more work without a pause, onnxruntime's for 45 ms: that core is
# not to be missed by the engine that is next.
_REST_S = 0.1
# An engine that would take longer for a call is left out.
_LONGEST_S = 1.0


def run(
    path: Path,
    *,
    latency: tuple[int, ...] = LATENCY,
    throughput: tuple[int, ...] = THROUGHPUT,
    rounds: int = ROUNDS,
    starts: int = STARTS,
    quick: bool = False,
    tuned: bool = False,
    cores: int | None = None,
    engines_python: str | None = None,
    out: Path | None = None,
) -> str:
    """An exported net beside itself in C and dense engines: native kernels, XLA, onnxruntime and OpenVINO.

    Args:
        path: an export's folder; or a name such as vgg13-8x-64x1, for that net with drawn weights.
        latency: batch sizes for which seconds a call are of interest.
        throughput: batch sizes for which images a second are.
        rounds: samples of every form of every engine.
        starts: how often each engine is started anew.
        quick: few rounds, and no throughput.
        tuned: measure this net's own ways too, for each batch size; that takes minutes, once.
        cores: that engines may use; all by default.
        engines_python: an interpreter that has onnxruntime or OpenVINO, where this one has not.
        out: a JSON file to save the record in.

    Raises:
        ValueError: no export, or one that needs a user's own function; bad sizes, or more cores than there are.
    """
    sizes = sorted({*latency} if quick else {*latency, *throughput})
    if not sizes or min(sizes[0], rounds, starts) < 1:
        raise ValueError(f"{sizes=}, {rounds=}, {starts=}: expected at least one size, and 1 or more of each")
    with _on(cores), tempfile.TemporaryDirectory() as temporary:
        path, folder = Path(path), Path(temporary)
        if not path.exists() and drawn.export_named(path.name, folder / path.name):
            path = folder / path.name
        net = ct.load(path)
        if not isinstance(net, InferenceNet):
            raise ValueError(f"{path} is no net of clicktrain_jax.models: its dense form is not known to this command")
        plan = {"rounds": rounds, "budget_s": _BUDGET_S, "starts": starts}
        if quick:
            plan |= {**_QUICK, "rounds": min(rounds, _QUICK["rounds"])}
        job = Job(path, folder, jax.default_backend(), tuned)
        hand_over(net, path, job.folder)
        loads, begin = [os.getloadavg()], time.perf_counter()
        found = measure(net, job, sizes, dict.fromkeys((ORT, OPENVINO), engines_python), **plan)
        layers = timing.layers(net.tuned(sizes[0]) if tuned else net, sizes[0])
        asked = "".join(
            text
            for text, is_asked in (
                (" --quick", quick),
                (" --tuned", tuned),
                (f" --cores {cores}", cores),
                (" --engines-python ...", engines_python),
            )
            if is_asked
        )
        record = {
            "what": "deploy",
            "command": f"python -m experiments bench deploy {path.name}{asked}",
            "setting": setting(),
            # At the beginning and at the end: (1, 5, 15 minutes) each.
            "load_average": [*loads, os.getloadavg()],
            "seconds": time.perf_counter() - begin,
            "quick": quick,
            "tolerance": TOLERANCE,
            "net": _facts(net),
            "tile": _tile(net),
            "sizes": _sizes(path, net.manifest),
            "latency": [size for size in sizes if size in latency],
            "throughput": [size for size in sizes if size in throughput],
            **found,
            "layers": layers,
        }
    if out is not None:
        write_json(out, record)
    return tables.deploy_tables(record)


@contextlib.contextmanager
def _on(count: int | None) -> Iterator[None]:
    """So many of this process's cores for it and those that it starts; all for None."""
    before = sorted(os.sched_getaffinity(0))
    if count is not None and not 1 <= count <= len(before):
        raise ValueError(f"cores={count}: this process may use {len(before)}")
    os.sched_setaffinity(0, before[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def hand_over(net: InferenceNet, path: Path, folder: Path) -> None:
    """Write what engines without jax run: an ONNX model, C; where one cannot be made, why."""
    try:
        stored = EXPORTED_ONNX in net.manifest["files"]
        data = storage.read_file(path, EXPORTED_ONNX) if stored else to_onnx(net.folded, net.folded.image_shape)
        (folder / ONNX).write_bytes(data)
    except ValueError as error:
        (folder / f"{ONNX}.txt").write_text(str(error))
    try:
        compile_c(to_c(net), folder)
    except ValueError as error:
        (folder / f"{LIBRARY}.txt").write_text(str(error))


def measure(
    net: InferenceNet,
    job: Job,
    sizes: Sequence[int],
    pythons: Mapping[str, str],
    *,
    rounds: int,
    budget_s: float,
    starts: int,
    engines: Sequence[str] = tuple(ENGINES),
) -> dict[str, Any]:
    """Time all engines for each batch size, then start each of them anew.

    Args:
        net: that they run.
        job: handed to them.
        sizes: batch sizes, rising.
        pythons: interpreters of engines that have one of their own.
        rounds: samples of every form.
        budget_s: of one batch size; no round is begun after it.
        starts: how often each engine is started.
        engines: of `ENGINES`.

    Returns:
        Parts of the record: ``engines`` {name: version}, ``unavailable`` {name: reason}, ``batches`` {size: {engine:
        ...}}, see `_measure_batch`, and ``starts`` {engine: ...}, see `_measure_starts`.
    """
    unavailable, batches = {}, {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in engines:
            try:
                worker = stack.enter_context(Worker(name, job, pythons.get(name)))
                worker.ask("load")
                workers[name] = worker
            except Failed as reason:
                unavailable[name] = str(reason)
        before: dict[str, tuple[int, dict[str, Any]]] = {}
        for size in sizes:
            batches[size] = _measure_batch(net, workers, size, job.folder, before, rounds, budget_s)
            before |= {name: (size, found) for name, found in batches[size].items() if found["forms"]}
        versions = {name: worker.version for name, worker in workers.items()}
    starting = {}
    for name in versions:
        forms = {size: batches[size][name]["form"] for size in sizes if batches[size][name]["forms"]}
        if forms:
            starting[name] = _measure_starts(name, job, pythons.get(name), forms, starts)
    return {
        "engines": versions,
        "unavailable": unavailable,
        "batches": {str(size): found for size, found in batches.items()},
        "starts": starting,
    }


def _measure_batch(
    net: InferenceNet,
    workers: Mapping[str, Worker],
    size: int,
    folder: Path,
    before: Mapping[str, tuple[int, dict[str, Any]]],
    rounds: int,
    budget_s: float,
) -> dict[str, dict[str, Any]]:
    """Judge and time every form of every engine on the same images.

    Args:
        net: what they run.
        workers: of the engines.
        size: number of images.
        folder: of the job.
        before: ``(size, what was found)`` of each engine at the batch size before, where there was one.
        rounds, budget_s: see `measure`.

    Returns:
        ``{engine: {"form", "median_s", "low_s", "high_s", "forms": {form: {the same, "samples", "calls", "error"}},
        "refused": {form: reason}}}``; without the first four where no form is right. Low and high are the 20th and
        80th percentiles, "error" is max|difference| / max|logit|.
    """
    images = images_file(folder, size)
    np.save(images, timing.images_of(size, net.folded.image_shape))
    wanted = np.asarray(net.dense(size)(np.load(images)))
    found: dict[str, dict[str, Any]] = {name: {"forms": {}, "refused": {}} for name in workers}
    for name, worker in workers.items():
        slow, expected_s = _expected(*before[name], size) if name in before else ([], 0.0)
        if expected_s > _LONGEST_S:
            found[name]["refused"]["all"] = f"about {expected_s:.0f} s a call: left out"
            continue
        try:
            answer = worker.ask("prepare", images=str(images), without=slow)
        except Failed as reason:
            found[name]["refused"]["all"] = str(reason)
            continue
        found[name]["refused"] |= answer["failed"]
        with np.load(answer["logits"]) as logits:
            for form in logits:
                error = worst_difference(logits[form], wanted)
                # So written that a NaN does not pass.
                if error <= TOLERANCE:
                    found[name]["forms"][form] = {"error": error}
                else:
                    reason = f"logits differ by {error:.2g} of the largest, {TOLERANCE:g} is allowed"
                    found[name]["refused"][form] = reason
        os.unlink(answer["logits"])
    _time(workers, found, rounds, budget_s)
    for engine in found.values():
        if engine["forms"]:
            best = min(engine["forms"], key=lambda form: engine["forms"][form]["median_s"])
            chosen = engine["forms"][best]
            engine |= {"form": best, **{key: chosen[key] for key in ("median_s", "low_s", "high_s")}}
    return found


def _expected(before: int, found: Mapping[str, Any], size: int) -> tuple[list[str], float]:
    """``(forms that are not worth trying, seconds a call)`` of an engine, from a smaller batch."""
    slow = [form for form, each in found["forms"].items() if each["median_s"] > _FAR * found["median_s"]]
    return slow, found["median_s"] * size / before


def worst_difference(logits: np.ndarray, wanted: np.ndarray) -> float:
    """max|difference| / max|logit|; infinite for another shape."""
    if logits.shape != wanted.shape:
        return float("inf")
    return float(np.abs(logits - wanted).max() / np.abs(wanted).max())


def _time(workers: Mapping[str, Worker], found: Mapping[str, dict[str, Any]], rounds: int, budget_s: float) -> None:
    """Add seconds to every form, in rounds that each begin with another one."""
    seconds = {(name, form): [] for name, engine in found.items() for form in engine["forms"]}
    calls: dict[tuple[str, str], int] = {}
    begin = time.perf_counter()
    active = list(seconds)
    for index in range(rounds):
        if index >= _SCREENING and time.perf_counter() - begin > budget_s:
            break
        if index == _SCREENING:
            active = _worth_more(seconds)
        shift = index % len(active) if active else 0
        for name, form in active[shift:] + active[:shift]:
            sample = workers[name].ask("sample", form=form, calls=calls.get((name, form)))
            calls[name, form] = sample["calls"]
            seconds[name, form].append(sample["seconds"])
            time.sleep(_REST_S)
    for (name, form), samples in seconds.items():
        low, median, high = np.percentile(samples, (20, 50, 80)).tolist()
        found[name]["forms"][form] |= {
            "median_s": median,
            "low_s": low,
            "high_s": high,
            "samples": len(samples),
            "calls": calls[name, form],
        }


def _worth_more(seconds: Mapping[tuple[str, str], list[float]]) -> list[tuple[str, str]]:
    """The forms that may still be their engine's best."""
    least: dict[str, float] = {}
    for (name, _), samples in seconds.items():
        least[name] = min(least.get(name, float("inf")), min(samples))
    return [key for key, samples in seconds.items() if min(samples) <= _FAR * least[key[0]]]


def _measure_starts(name: str, job: Job, python: str | None, forms: Mapping[int, str], starts: int) -> dict[str, Any]:
    """Start an engine in fresh processes: seconds to its first answer, and the memory it comes to need.

    Args:
        name: of the engine.
        job: handed to it.
        python: its interpreter.
        forms: its best form by batch size, rising.
        starts: how many processes.

    Returns:
        ``{"seconds": median from loading to the first answer of the smallest batch, "samples": seconds,
        "bytes": {size: most memory above what the process had with the library alone}, "device_bytes": likewise of an
        accelerator, or None}``; the memory is the least of the processes.
    """
    first, *others = forms
    samples, memory = [], []
    for _ in range(starts):
        with Worker(name, job, python) as worker:
            started = worker.ask("start", images=str(images_file(job.folder, first)), form=forms[first])
            samples.append(started["seconds"])
            peaks = {str(first): started}
            for size in others:
                worker.ask("prepare", images=str(images_file(job.folder, size)), only=forms[size])
                peaks[str(size)] = worker.ask("memory")
            memory.append(
                {
                    size: (peak["peak_bytes"] - started["bytes_before"], peak["device_bytes"])
                    for size, peak in peaks.items()
                }
            )
    least = {size: min((each[size] for each in memory), key=lambda pair: pair[0]) for size in memory[0]}
    return {
        "seconds": statistics.median(samples),
        "samples": samples,
        "bytes": {size: pair[0] for size, pair in least.items()},
        "device_bytes": {size: pair[1] for size, pair in least.items()},
    }


def images_file(folder: Path, size: int) -> Path:
    """Where the images of a batch size are kept."""
    return folder / f"images-{size}.npy"


def _facts(net: InferenceNet) -> dict[str, Any]:
    facts = net.manifest["facts"]
    found = {key: facts.get(key) for key in ("net", "image_shape", "accuracy")}
    return {**found, "run": (facts.get("run") or {}).get("name"), "dtype": net.manifest["dtype"]}


def _tile(net: InferenceNet) -> list[int] | None:
    """(filters, channels) that the masks of all its pruned convolutions have in common at least; None without any."""
    tiles = [site.structure.tile for site in net.convolutions(1) if site.structure is not None]
    return [min(sizes) for sizes in zip(*tiles)] if tiles else None


def _sizes(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of the export's files and of dense float32 weights, and how many weights there are."""
    found = storage.sizes(manifest)
    return {
        "files": {name: (path / name).stat().st_size for name in sorted(found.files)},
        "dense_bytes": sum(leaf.dense_float32 for leaf in found.leaves.values()),
        "conv_weights": found.convolutions.weights,
        "conv_kept": found.convolutions.kept,
        "conv_dense_bytes": found.convolutions.dense_float32,
        "conv_bytes": found.convolutions.stored + found.headers,
    }
