"""Every check and measurement that wants a GPU, in under ten minutes, one JSON record each.

    python -m experiments.bench.gpu_checks --out DIR [--packed FILE] [--only NAME ...] [--minutes M] [--smoke]

Needs jax, flax, optax and orbax, and safetensors for one check: images are random unless ``--packed`` names an archive
made by `python -m experiments pack-data`. ``--smoke`` runs everything at a tiny size on any device, to test this file.
A check that fails is recorded as failed and the next one runs; the exit code is then 1. Each check has a process of
its own, for a limited time: those that compare bits ask XLA for deterministic programs, those that measure speed must
not. What the minutes do not reach is named, with the command that does it; the exit code is then 1 too.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import clicktrain_jax as ct
from experiments import configs
from experiments.bench import gpu_conv_checks
from experiments.bench import gpu_exports as gpu_check
from experiments.bench import updates as bench
from experiments.configs import TrainConfig
from experiments.data import DataConfig, Dataset, load
from experiments.records import read_json, setting, write_json
from experiments.train.loop import Interrupted, train
from experiments.train.step import Trainer

GOLDEN = Path(__file__).parents[2] / "tests" / "clicktrain_jax" / "golden_small.npz"


def _random_images(count: int) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    held_out = images[:500], labels[:500]
    return Dataset("random", images, labels, *held_out, 10, (0.5,) * 3, (0.25,) * 3, "test", "raw", f"random{count}")


def _small_run(smoke: bool) -> TrainConfig:
    """All phases in five epochs of the small net, scores of several updates and a second selection among them."""
    config = configs.get("digits-clicktrain")
    prune = dataclasses.replace(
        config.prune, select_epoch=1, reselect_epoch=2, prune_epoch=3, importance_steps=3, patterns="coverage"
    )
    return dataclasses.replace(
        config, epochs=5, width=0.125 if smoke else 1.0, batch_size=32, mixup_epoch=4, method=prune,
        loop=dataclasses.replace(config.loop, progress=False, checkpoint_every_epochs=1),
    )


def _select(params: Any, grads: Any, plan: ct.Plan, patterns: Any) -> ct.Masks:
    return ct.select_masks(ct.importance.taylor(params, grads), plan, patterns)


def check_masks(smoke: bool, packed: str | None) -> dict[str, Any]:
    """The reference's masks from its own weights and gradients, bit for bit: TF32 would flip near-ties."""
    with np.load(GOLDEN) as stored:
        facts = dict(stored)
    compared = 0
    for case in sorted({key.partition(":")[0] for key in facts}):
        part = {key.partition(":")[2]: value for key, value in facts.items() if key.startswith(f"{case}:")}
        names = [str(name) for name in part["names"]]
        # PyTorch's OIHW to HWIO.
        params, grads = (
            {name: part[f"{key}/{name}"].transpose(2, 3, 1, 0) for name in names}
            for key in ("w_before_e1b0", "g_select")
        )
        rules = {re.escape(name): int(ratio) / 100 for name, ratio in zip(names, part["ratios"])}
        plan, patterns = ct.make_plan(params, rules), ct.patterns.fixed_set(int(part["num_patterns"]))
        masks = jax.jit(_select, static_argnums=2)(params, grads, plan, patterns)
        for kind, key in (("pattern", "pmask"), ("kernel", "kmask")):
            for name in names:
                if f"{key}/{name}" in part:
                    np.testing.assert_array_equal(
                        getattr(masks, kind)[name], part[f"{key}/{name}"].transpose(2, 3, 1, 0), f"{case} {kind} {name}"
                    )
                    compared += 1
    return {"masks_equal": compared}


def check_loop_programs(smoke: bool, packed: str | None) -> dict[str, Any]:
    """One compiled loop an epoch and one call an update train alike; equal seeds give equal bits."""
    config, dataset = _small_run(smoke), _random_images(100 if smoke else 1000)
    ends: dict[str, float] = {}
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        for program, runs in (("scan", 2), ("steps", 1)):
            asked = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epoch_program=program))
            trainer = Trainer(asked, dataset)
            for run in range(runs):
                summary = train(asked, Path(folder) / f"{program}{run}", trainer=trainer)
                digests.append(summary["params_sha256"])
                ends[program] = summary["final_loss"]
    if digests[0] != digests[1]:
        raise AssertionError("two equal runs ended with different bits")
    # The two programs may sum in other orders; 5 epochs let that grow.
    np.testing.assert_allclose(ends["scan"], ends["steps"], rtol=0.05)
    return {"final_loss": ends, "equal_runs_equal_bits": True}


def check_resume(smoke: bool, packed: str | None) -> dict[str, Any]:
    """A run stopped after three epochs and resumed ends with the bits of an uninterrupted one."""
    config, dataset = _small_run(smoke), _random_images(100 if smoke else 1000)

    class Stop(Exception):
        pass

    class Stopping(Trainer):
        def run_epoch(self, state: Any, epoch: int, *rest: Any, **options: Any) -> Any:
            if epoch == 3:
                raise Stop
            return super().run_epoch(state, epoch, *rest, **options)

    trainer = Stopping(config, dataset)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Stop):
            train(config, Path(folder) / "stopped", trainer=trainer)
        # Programs of their own: a compiler that tunes could choose differently.
        resumed = train(config, Path(folder) / "stopped", dataset=dataset)
        whole = train(config, Path(folder) / "whole", dataset=dataset)
    if resumed["params_sha256"] != whole["params_sha256"]:
        raise AssertionError("the resumed run ended with other bits")
    return {"equal_bits": True}


def measure_update_costs(smoke: bool, packed: str | None) -> dict[str, Any]:
    """Updates of every phase against the plain optax step."""
    size = {"net": "vgg11", "width": 0.125, "batch_size": 8, "repeats": 2} if smoke else {
        "net": "vgg16", "width": 1.0, "batch_size": 128, "repeats": 30,
    }
    return {"size": size, "rows": bench.measure_steps(**size)}


def measure_selection(smoke: bool, packed: str | None) -> dict[str, Any]:
    """Seconds of the selection with each option, whole VGG-16."""
    size = {"net": "vgg11", "width": 0.125, "batch_size": 1, "repeats": 1} if smoke else {
        "net": "vgg16", "width": 1.0, "batch_size": 1, "repeats": 7,
    }
    return {"size": size, "rows": bench.measure_selection(**size)}


def measure_training(smoke: bool, packed: str | None) -> dict[str, Any]:
    """Images a second of whole epochs of VGG-13, dense and pruned, in bfloat16 and float32."""
    dataset = _random_images(256 if smoke else 50_000)
    if packed:
        dataset = load(DataConfig("cifar10", dir=packed))
    rates = {}
    for name in ("vgg13-cifar10-dense", "vgg13-cifar10-9.0x"):
        for precision in ("bfloat16", "float32"):
            config = dataclasses.replace(configs.get(name), precision=precision, width=0.125 if smoke else 1.0)
            trainer = Trainer(config, dataset)
            state = trainer.init(0)
            # Mixup is on in both: it begins with the prune, also in the dense run.
            epoch = config.mixup_epoch + 1
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                state, _ = trainer.run_epoch(state, epoch, 0)
                seconds.append(time.perf_counter() - start)
            # The first epoch compiles.
            rates[f"{name}, {precision}"] = len(dataset.train_labels) / min(seconds[1:])
    return {"images_per_second": rates}


# Seconds that a check's process may take at most. The first six come first and fit ten minutes together.
LIMITS_S = {
    "conv-correctness": 90,
    "conv-shift": 60,
    "conv-sweeps": 75,
    "conv-dense": 90,
    "conv-mosaic": 150,
    "steps": 90,
    "deploy": 120,
    "masks": 60,
    "loop-programs": 120,
    "resume": 120,
    "update-costs": 180,
    "selection": 120,
    "training": 180,
}
# Of those, for a process to start and to end what it has begun.
_AROUND_S = 25


def _within(name: str, function: Callable[[bool, float], Iterator[dict[str, Any]]]) -> Callable[..., Any]:
    """The check, told how long it may go on beginning new things."""

    @functools.wraps(function)
    def check(smoke: bool, packed: str | None) -> Iterator[dict[str, Any]]:
        return function(smoke, LIMITS_S[name] - _AROUND_S)

    return check


CHECKS: dict[str, Callable[[bool, str | None], dict[str, Any] | Iterator[dict[str, Any]]]] = {
    "conv-correctness": _within("conv-correctness", gpu_conv_checks.check_correctness),
    "conv-shift": _within("conv-shift", gpu_conv_checks.measure_shift),
    "conv-sweeps": _within("conv-sweeps", gpu_conv_checks.measure_sweeps),
    "conv-dense": _within("conv-dense", gpu_conv_checks.measure_dense),
    "conv-mosaic": _within("conv-mosaic", gpu_conv_checks.measure_mosaic),
    "steps": _within("steps", gpu_conv_checks.measure_steps),
    "deploy": _within("deploy", gpu_check.measure),
    "masks": check_masks,
    "loop-programs": check_loop_programs,
    "resume": check_resume,
    "update-costs": measure_update_costs,
    "selection": measure_selection,
    "training": measure_training,
}
# For XLA.
FLAGS = {
    "loop-programs": "--xla_gpu_deterministic_ops=true",
    "resume": "--xla_gpu_deterministic_ops=true",
    # Hundreds of small programs whose speed nobody asks for.
    "conv-correctness": "--xla_gpu_autotune_level=0",
}
_SHARE_PROGRAMS = ("conv-shift", "conv-sweeps", "conv-dense", "conv-mosaic")


def run_check(name: str, out: Path, smoke: bool, packed: str | None) -> bool:
    """Run one check in this process and write its record; returns whether it passed."""
    start = time.perf_counter()
    facts = {"check": name, "what": (CHECKS[name].__doc__ or "").strip(), "smoke": smoke, "setting": setting()}
    found: dict[str, Any] = {}

    def write(**outcome: Any) -> None:
        write_json(out / f"{name}.json", facts | {"seconds": time.perf_counter() - start, **outcome, **found})

    unfinished = {"ok": False, "error": "it was stopped before its end"}
    write(**unfinished)
    try:
        result = CHECKS[name](smoke, packed)
        for part in [result] if isinstance(result, dict) else result:
            found = part
            write(**unfinished)
        outcome: dict[str, Any] = {"ok": True}
    except Interrupted:
        raise
    except Exception:  # a record of what went wrong is the point
        outcome = {"ok": False, "error": traceback.format_exc()}
    write(**outcome)
    said = "ok" if outcome["ok"] else "FAILED"
    said = f"skipped, {found['skipped']}" if outcome["ok"] and "skipped" in found else said
    left_out = f"; left out: {', '.join(found['left_out'])}" if found.get("left_out") else ""
    print(f"{name}: {said} in {time.perf_counter() - start:.1f} s{left_out}", flush=True)
    if not outcome["ok"]:
        print(outcome["error"], flush=True)
    return outcome["ok"]


def run_apart(name: str, out: Path, options: Sequence[str], limit_s: float | None, programs: str) -> bool:
    """Run one check in a process of its own; returns whether it passed.

    Args:
        name: of the check.
        out: folder of the records; an older one of this check is removed.
        options: further ones of the command line.
        limit_s: the process is killed after this; None for no limit. What it had found so far is kept.
        programs: folder where compiled programs are kept for the next check.
    """
    record = out / f"{name}.json"
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.bench.gpu_checks", "--here"]
    command += ["--out", str(out), "--only", name, *options]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS.get(name, '')}".strip()
    # On a small CPU, a smoke run's interpreted kernels hang with fewer threads than they have warpgroups.
    environment = {"NPROC": "16"} | os.environ | {"XLA_FLAGS": flags}
    if name in _SHARE_PROGRAMS:
        environment |= {"JAX_COMPILATION_CACHE_DIR": programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    try:
        return subprocess.run(command, env=environment, check=False, timeout=limit_s).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: FAILED, stopped after {limit_s:.0f} s", flush=True)
        # None yet: the device itself did not answer.
        facts = read_json(record) if record.exists() else {"check": name, "ok": False, "smoke": "--smoke" in options}
        write_json(record, facts | {"error": f"stopped after {limit_s:.0f} s"})
        return False


def main(arguments: list[str]) -> int:
    """Run the checks, each in a process of its own; returns 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--packed", help="packed CIFAR-10 archive")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--minutes", type=float, default=9.7, help="in all; no limit with --smoke")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.here:
        return int(not all([run_check(name, asked.out, asked.smoke, asked.packed) for name in asked.only]))
    options = ["--smoke"] * asked.smoke + (["--packed", asked.packed] if asked.packed else [])
    end = time.monotonic() + 60 * asked.minutes
    failed, late = 0, []
    with tempfile.TemporaryDirectory() as programs:
        for name in asked.only:
            limit_s = None if asked.smoke else min(LIMITS_S[name], end - time.monotonic())
            # Less than a start takes would be a sure failure.
            if limit_s is not None and limit_s < 2 * _AROUND_S:
                late.append(name)
                continue
            failed += not run_apart(name, asked.out, options, limit_s, programs)
    if late:
        again = f"python -m experiments.bench.gpu_checks --out {asked.out} --only {' '.join(late)}"
        print(f"no time was left for {', '.join(late)}; they run with: {again}", flush=True)
    return int(bool(failed or late))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
