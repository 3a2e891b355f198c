"""The pruned phase by pattern: the same training, in the way that is measured the fastest, resumed in the same way."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
import pallas_kernels as pk
from experiments import configs
from experiments.bench import step as bench_step
from experiments.configs.base import PruneConfig
from experiments.data import load
from experiments.train import compiled, pruned_phase
from experiments.train.loop import train
from experiments.train.pruned_phase import PrunedPhase, gaining_structures
from experiments.train.step import Trainer
from pallas_kernels import native

DENSE = configs.get("digits-dense")
PRUNE = PruneConfig(fractions=(), target=4.0, coeff=1e-3, select_epoch=1, prune_epoch=2, tile=(64, 1), floor=False)
CONFIG = dataclasses.replace(
    DENSE,
    name="by-pattern",
    epochs=4,
    learning_rate=0.003,
    method=PRUNE,
    loop=dataclasses.replace(DENSE.loop, checkpoint_every_epochs=1),
)


@pytest.fixture(scope="module")
def digits():
    whole = load(DENSE.data)
    return dataclasses.replace(
        whole,
        train_images=whole.train_images[:256],
        train_labels=whole.train_labels[:256],
        eval_images=whole.eval_images[:64],
        eval_labels=whole.eval_labels[:64],
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path / "cache"))


def asked(way, **changes):
    return dataclasses.replace(CONFIG, loop=dataclasses.replace(CONFIG.loop, pruned_convolution=way), **changes)


def selected(shape, **options):
    """Masks of one layer, and their plan."""
    params = {"Conv_0": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    plan = ct.make_plan(params, {".*": 0.6}, **options)
    scores = {"Conv_0": {"kernel": jax.random.uniform(jax.random.key(0), shape)}}
    return ct.select_masks(scores, plan, ct.patterns.fixed_set(4)), plan


def losses_of(trainer, way, steps):
    """Of the pruned phase in one way, from a state that is the same for all, on the same batches."""
    state, structures = bench_step.pruned_state(trainer)
    program = jax.jit(trainer.update_step("pruned", trainer.config.batch_size, way))
    metrics, data, order, _, key = bench_step.arguments(trainer)
    losses = []
    for step in range(steps):
        index = np.int32(step % trainer.steps_per_epoch)
        held = structures if way == "pattern" else {}
        state, metrics = program(state, metrics, data, order, index, key, held)
        losses.append(float(metrics[index, 0]))
    return np.asarray(losses)


@pytest.mark.parametrize(
    "precision, tolerance", [("float32", 1e-4), pytest.param("bfloat16", 5e-2, marks=pytest.mark.slow)]
)
def test_a_hundred_updates_by_pattern_follow_the_dense_masked_ones(digits, precision, tolerance):
    # At larger rates two dense forms part by more than this: a max pool that decides otherwise is enough.
    config = dataclasses.replace(CONFIG, precision=precision, learning_rate=0.001, epochs=30)
    direct = dataclasses.replace(config.loop, convolution="direct")
    # Nothing is drawn: the samplers take longer to compile than the net.
    config = dataclasses.replace(config, loop=direct, crop_padding=0, flip=False, mixup_epoch=None)
    trainer, steps = Trainer(config, digits), 100 if precision == "float32" else 30
    dense, pattern = (losses_of(trainer, way, steps) for way in ("dense", "pattern"))
    assert dense[-1] < 0.97 * dense[0]
    np.testing.assert_allclose(pattern, dense, rtol=tolerance)


@pytest.mark.parametrize(
    ("tile", "is_fast", "gains"),
    [
        ((64, 1), False, True),
        ((1, 1), False, False),  # the portable form gathers for each kernel alone
        ((64, 1), True, True),
        ((1, 1), True, True),
    ],
)
def test_layers_without_gain_stay_dense(tile, is_fast, gains, monkeypatch):
    monkeypatch.setattr(native, "is_fast", lambda: is_fast)
    masks, plan = selected((3, 3, 32, 64), tile=tile)
    assert bool(gaining_structures(masks, plan)) == gains


def test_a_structure_retains_what_the_masks_retain_and_with_supersets_no_less():
    mask, plan = selected((3, 3, 32, 64), tile=(64, 1))
    structure = gaining_structures(mask, plan)["Conv_0"]["kernel"]
    kept = np.asarray(mask.pattern["Conv_0"]["kernel"] & mask.kernel["Conv_0"]["kernel"])
    np.testing.assert_array_equal(np.asarray(pk.mask_of(structure)), kept)

    mask, plan = selected((3, 3, 32, 64), tile=(64, 1), superset=6)
    kept = np.asarray(mask.pattern["Conv_0"]["kernel"] & mask.kernel["Conv_0"]["kernel"])
    retained = np.asarray(pk.mask_of(gaining_structures(mask, plan)["Conv_0"]["kernel"]))
    assert (retained >= kept).all() and kept.sum() < retained.sum() < 0.5 * retained.size


def phase_for(asked="auto"):
    masks, plan = selected((3, 3, 32, 64), tile=(64, 1))
    return PrunedPhase(asked, plan, {"net": "one layer"}, hwnc=False), masks


def test_the_fastest_way_is_measured_once_and_remembered(monkeypatch):
    built, ran = [], []
    phase, masks = phase_for()
    phase.prepare(5, masks, lambda way, structures: built.append((way, bool(structures))))
    phase._wait()
    assert built == [("dense", False), ("pattern", True)]
    times = {"dense": 2.0, "pattern": 1.0}
    now = [0.0]

    def ready(way, structures):
        now[0] += 100  # what makes a call ready is not measured

        def call():
            ran.append(way)
            now[0] += times[way]

        return call

    monkeypatch.setattr(pruned_phase, "_clock", lambda: lambda: now[0])
    choice = phase.choose(ready)
    assert (choice.way, choice.source, choice.layers) == ("pattern", "measured", ["Conv_0/kernel"])
    assert choice.seconds == {"dense": 2.0, "pattern": 1.0}
    assert phase.choose(ready) is choice and len(ran) == 12

    again, masks = phase_for()
    again.prepare(5, masks, lambda way, structures: built.append(way))
    choice = again.choose(lambda way, structures: pytest.fail("measured again"))
    assert (choice.way, choice.source) == ("pattern", "cached") and built[2:] == ["pattern"]


@pytest.mark.parametrize(("cores", "clock"), [({3}, "process_time"), ({0, 1}, "perf_counter")])
def test_a_core_shared_with_others_does_not_mislead_the_choice(monkeypatch, cores, clock):
    # What others do there, or a stop of this process, is no time of its updates; of several cores that cannot be told.
    monkeypatch.setattr(pruned_phase.os, "sched_getaffinity", lambda process: cores)
    assert pruned_phase._clock() is getattr(pruned_phase.time, clock)


def test_a_way_that_is_hardly_faster_is_not_taken(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pruned_phase, "_clock", lambda: lambda: now[0])
    phase, masks = phase_for()
    phase.prepare(5, masks, lambda way, structures: None)

    def ready(way, structures):
        def call():
            now[0] += {"dense": 1.0, "pattern": 0.99}[way]

        return call

    choice = phase.choose(ready)
    assert choice.way == "dense" and choice.structures == {}


def test_what_fails_in_the_background_is_raised_where_it_is_waited_for():
    phase, masks = phase_for("pattern")

    def fail(way, structures):
        raise MemoryError("no room")

    phase.prepare(5, masks, fail)
    with pytest.raises(MemoryError, match="no room"):
        phase.choose(lambda way, structures: None)


def test_the_calls_that_are_measured_trace_nothing(digits, monkeypatch):
    """A net's trace takes longer than a small update, the more so by pattern: the choice would be of traces."""
    trainer = Trainer(asked("auto", epochs=3), digits)
    trainer.pruned.begin()
    state, structures = bench_step.pruned_state(trainer)
    metrics, _, order, _, key = bench_step.arguments(trainer)
    trainer._begin(0, 0)
    trainer._prepare_pruned("masks", state, metrics, order, key)
    trainer.pruned._wait()
    assert structures and trainer.pruned._candidates == trainer.pruned.ways and trainer.pruned.choice is None
    monkeypatch.setattr(compiled, "gradient_of_drawn", lambda *_: pytest.fail("a net was built to be traced"))
    choice = trainer._choose_pruned(state, metrics, order, key)
    assert choice.source == "measured" and set(choice.seconds) == {"dense", "pattern"}


@pytest.mark.slow
def test_a_whole_run_by_pattern_prunes_and_learns_like_the_dense_one(tmp_path, digits):
    by_pattern = train(asked("pattern"), tmp_path / "pattern", dataset=digits)
    dense = train(asked("dense"), tmp_path / "dense", dataset=digits)
    assert by_pattern["pruned_convolution"]["way"] == "pattern" and by_pattern["pruned_convolution"]["layers"]
    assert dense["pruned_convolution"]["way"] == "dense"
    assert by_pattern["masks_sha256"] == dense["masks_sha256"]
    assert abs(by_pattern["final_loss"] - dense["final_loss"]) < 1e-3 * dense["final_loss"]
    assert by_pattern["conv_retained"] == dense["conv_retained"]


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_way(tmp_path, digits):
    """Whatever the cache says by now: a run is not half one program and half another."""
    folder = tmp_path / "halved"
    config = asked("auto")
    trainer = Trainer(config, digits)
    trainer.pruned.asked = trainer.pruned.configured = "pattern"

    class Stop(Exception):
        pass

    original = trainer.run_epoch

    def until_three(state, epoch, *rest):
        if epoch == 3:
            raise Stop
        return original(state, epoch, *rest)

    trainer.run_epoch = until_three
    with pytest.raises(Stop):
        train(config, folder, dataset=digits, trainer=trainer)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("convolution", {}).get("way") for line in lines] == [None, None, "pattern"]
    pruned_phase.Cache().put(pruned_phase.facts_of(config, trainer.plan), {"way": "dense"})
    resumed = train(config, folder, dataset=digits)
    assert resumed["pruned_convolution"]["way"] == "pattern"
