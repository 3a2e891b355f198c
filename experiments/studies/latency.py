"""Seconds that the nets of finished runs take to answer, all of them side by side: latency.json of a study.

The arrays that are timed are those whose accuracy a run's summary tells: their digests must agree with it, their logits
with the trainer's model, and the very program that is timed is evaluated on the whole evaluation set.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy import InferenceNet
from clicktrain_jax.deploy.load import inference_net
from experiments.bench import timing
from experiments.bench.deploy import worst_difference
from experiments.data import Dataset, normalise
from experiments.records import RunFolder, setting
from experiments.studies.export import Restored, restore, top1
from experiments.train.checkpoints import digest
from pallas_kernels.tuning import time_together

# Largest allowed max|difference| / max|logit|, in float32 on a CPU: what is left is the order of sums.
TOLERANCE = 1e-3
# bfloat16 has 8 bits, and GPUs take 10 bits of float32.
_COARSER = {"bfloat16": 0.05, "gpu": 0.01}
_CHECKED_IMAGES = 32
# The share of the evaluation set that may be classified otherwise, for the same reason.
TOP1_TOLERANCE = 0.002
BUDGET_S = 120.0

Program = Callable[[Any], jax.Array]


class _Ready(NamedTuple):
    """A net that can be timed.

    Attributes:
        programs: by batch size: float32 (batch, height, width, channels) in [0, 1] -> logits (batch, classes).
        facts: what the record tells of it.
        image_shape: (height, width, channels).
        seed: of its run.
    """

    programs: dict[int, Program]
    facts: dict[str, Any]
    image_shape: tuple[int, ...]
    seed: int


def measure(
    runs: Mapping[str, Path],
    *,
    batches: Sequence[int] = (1, 32),
    rounds: int = 15,
    data_dir: str | None = None,
    budget_s: float | None = BUDGET_S,
) -> dict[str, Any]:
    """Make the nets of finished runs ready for inference as an export does, tune each, and time all of them in turns.

    Nets whose masks were not chosen by ClickTrain's selection (gradual magnitude, RigL, 2:4) are timed as dense ones,
    their weights masked: nothing here runs them faster. A narrow net is itself.

    Args:
        runs: run folders by the name of their cell, with checkpoints, all of one seed.
        batches: numbers of images a call.
        rounds: samples of each net.
        data_dir: where the images are now, if not where they were.
        budget_s: seconds for one batch size; no round is begun after them, but three are made. None for no limit.

    Returns:
        Plain data: ``setting``, ``seed``, ``load_average`` before and after, ``seconds`` in all, ``rounds``,
        ``batches`` {size: {cell: {"median_s", "low_s", "high_s"}}} (20th and 80th percentile), ``nets`` {cell:
        {"params_sha256", "masks_sha256", "layers", "pattern_layers", "pattern_layers_by_batch", "top1", "run_top1"}}:
        how many convolutions there are, how many run by pattern at the first batch size and at each, and the accuracy
        of the program that is timed for the largest.

    Raises:
        ValueError: no runs, bad batch sizes, a run that is not finished or is not what its summary says, runs of
            several seeds or image sizes, logits other than the trainer's.
    """
    if not runs:
        raise ValueError("runs is empty: give the folder of at least one finished run")
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise ValueError(f"batches={tuple(batches)}: expected different numbers of images, each 1 or more")
    loads, begin = [os.getloadavg()], time.perf_counter()
    nets = {cell: _make_ready(Path(path), batches, data_dir) for cell, path in runs.items()}
    for what in ("seed", "image_shape"):
        found = {cell: getattr(net, what) for cell, net in nets.items()}
        if len(set(found.values())) > 1:
            raise ValueError(f"the runs have different values of {what}, {found}: time those of one together")
    first = next(iter(nets.values()))
    timed = {}
    for batch in batches:
        images = jnp.asarray(timing.images_of(batch, first.image_shape))
        functions = {cell: functools.partial(net.programs[batch], images) for cell, net in nets.items()}
        timings = time_together(functions, rounds=rounds, budget_s=budget_s)
        timed[str(batch)] = {
            cell: {"median_s": each.median_s, "low_s": each.low_s, "high_s": each.high_s}
            for cell, each in timings.items()
        }
    return {
        "setting": setting(),
        "seed": first.seed,
        "rounds": rounds,
        "load_average": [*loads, os.getloadavg()],
        "seconds": time.perf_counter() - begin,
        "batches": timed,
        "nets": {cell: net.facts for cell, net in nets.items()},
    }


def _make_ready(path: Path, batches: Sequence[int], data_dir: str | None) -> _Ready:
    """Restore a run, tune its net, and see that it is the net that the run's summary tells of."""
    summary = RunFolder(path).summary()
    if summary is None:
        raise ValueError(f"{path} holds no summary.json: only a finished run is timed; train it to its end first")
    found = restore(path, data_dir)
    variables = found.variables
    held, masks = _masks(found)
    # Of the run's own parameters: what 2:4 computes with follows from them.
    facts: dict[str, Any] = {
        "params_sha256": digest(found.state.params),
        "masks_sha256": None if held is None else digest(held),
    }
    for what, now in facts.items():
        if summary.get(what) != now:
            raise ValueError(
                f"{path}: {what} of the newest checkpoint is {now}, the summary has {summary.get(what)}: the accuracy "
                "told there is not this net's; train the run again"
            )
    dataset, image_shape = found.dataset, tuple(found.trainer.image_shape)
    net = _net(found.trainer.model, variables, masks, image_shape, dataset)
    programs, by_pattern = {}, {}
    expected = _logits(found.trainer.model, variables, dataset)
    for batch in batches:
        if masks is not None:
            net = net.tuned(batch)
        sites = net.convolutions(batch)
        by_pattern[str(batch)] = sum(site.plan.run != "dense" for site in sites)
        function, prepared = net.program(batch)
        programs[batch] = functools.partial(function, prepared)
        logits = _classifier(programs[batch], batch)(dataset.eval_images[:_CHECKED_IMAGES])
        difference = worst_difference(logits, expected)
        if not difference <= _tolerance(found.config.precision):
            raise ValueError(
                f"{path}: logits of the net made for {batch} images differ from the trainer's by {difference:.3g} of "
                f"the largest, expected at most {_tolerance(found.config.precision):g}: are its weights masked?"
            )
    accuracy = top1(_classifier(programs[max(batches)], max(batches)), dataset)
    if not abs(accuracy - summary["final_top1"]) <= TOP1_TOLERANCE:
        raise ValueError(
            f"{path}: top-1 of the net that is timed is {accuracy:.4f}, the summary has {summary['final_top1']:.4f}: "
            f"expected a difference of at most {TOP1_TOLERANCE:g}; are these the run's images?"
        )
    facts |= {
        "layers": len(sites),
        "pattern_layers": by_pattern[str(batches[0])],
        "pattern_layers_by_batch": by_pattern,
        "top1": accuracy,
        "run_top1": summary["final_top1"],
    }
    return _Ready(programs, facts, image_shape, found.config.seed)


def _masks(found: Restored) -> tuple[Any, Any]:
    """``(as the run holds them, `clicktrain_jax.Masks` that convolutions can be run by)``; None where it has none."""
    masks = found.masks
    # Only those that ClickTrain's selection made, whoever asked for it, are in patterns.
    return masks, None if found.trainer.updates is None else masks


def _net(model: Any, variables: Any, masks: Any, image_shape: tuple[int, ...], dataset: Dataset) -> InferenceNet:
    # The net keeps this function, and would keep a whole `Restored` with its training images if it named one.
    return inference_net(
        lambda variables, images: model.apply(variables, images, train=False),
        variables,
        masks,
        image_shape=image_shape,
        normalise={"mean": dataset.mean, "std": dataset.std},
    )


def _logits(model: Any, variables: Any, dataset: Dataset) -> np.ndarray:
    """Of the trainer's model, on the first images of the evaluation set."""

    @jax.jit
    def apply(variables: Any, images: Any) -> jax.Array:
        return model.apply(variables, normalise(images, dataset.mean, dataset.std), train=False)

    return np.asarray(apply(variables, dataset.eval_images[:_CHECKED_IMAGES]))


def _classifier(program: Program, batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """A program of one batch size as a function of any number of uint8 images; the last batch is filled up."""

    def classify(images: np.ndarray) -> np.ndarray:
        pixels = images.astype(np.float32) / np.float32(255)
        pixels = np.pad(pixels, ((0, -len(images) % batch), (0, 0), (0, 0), (0, 0)))
        logits = [np.asarray(program(pixels[first : first + batch])) for first in range(0, len(pixels), batch)]
        return np.concatenate(logits)[: len(images)]

    return classify


def _tolerance(precision: str) -> float:
    return max(_COARSER.get(precision, TOLERANCE), _COARSER.get(jax.default_backend(), TOLERANCE))
