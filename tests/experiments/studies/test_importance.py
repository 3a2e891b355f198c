"""The importance study: true changes against brute force, statistics by hand, one tiny study from end to end."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from clicktrain_jax import models
from experiments.data import load, normalise
from experiments.report import importance as table
from experiments.studies import importance as importance_study
from experiments.studies import kernel_removal
from experiments.studies.importance import Study, measure
from experiments.train.step import Trainer

STUDY = Study(checkpoint_epochs=(1,), seeds=1, kernels=3, images=60, batches=(1, 2), draws=2)
CONFIG = tiny.changed(
    method=None, mixup_epoch=None, crop_padding=0, data=dataclasses.replace(tiny.CONFIG.data, eval_split="validation")
)


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """Programs here run a few times: compiled without optimisation they are ready sooner."""
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick)
        yield


class Branched(nn.Module):
    """A convolution with strides beside a shortcut: what comes before it is still needed."""

    conv: type = nn.Conv

    @nn.compact
    def __call__(self, x, *, train):
        form = {"kernel_size": (3, 3), "padding": ((1, 1), (1, 1)), "use_bias": False}
        x = nn.relu(self.conv(4, strides=(1, 1), name="Conv_0", **form)(x))
        y = self.conv(4, strides=(2, 2), name="Conv_1", **form)(x)
        y = nn.BatchNorm(use_running_average=not train, name="BatchNorm_0")(y)
        return nn.Dense(3, name="Dense_0")((nn.relu(y) + x[:, ::2, ::2]).mean(axis=(1, 2)))


@pytest.mark.parametrize("conv", [nn.Conv, models.PatchConv])
def test_changes_are_those_of_whole_forwards(conv):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 8, 8, 2), np.uint8), rng.integers(0, 3, 7).astype(np.int32)
    mean, std = (0.5, 0.4), (0.2, 0.3)
    model = Branched(conv)
    inputs = normalise(jnp.asarray(images), mean, std)
    variables = model.init(jax.random.key(1), inputs, train=False)
    kernels = np.asarray([[0, 0], [3, 1], [2, 3]], np.int32)
    changes = kernel_removal.loss_changes(model, variables, images, labels, mean, std, "Conv_1/kernel", kernels)

    def losses(variables):
        logits = model.apply(variables, inputs, train=False)
        return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, labels), np.float64)

    assert changes.shape == (3, 7) and changes.dtype == np.float64
    for (i, o), change in zip(kernels, changes):
        without = jax.tree.map(jnp.copy, variables)
        without["params"]["Conv_1"]["kernel"] = without["params"]["Conv_1"]["kernel"].at[:, :, i, o].set(0.0)
        expected = losses(without) - losses(variables)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(change, expected, atol=2e-6)
    with pytest.raises(ValueError, match="Conv_9/kernel.* called 0 times"):
        kernel_removal.loss_changes(model, variables, images, labels, mean, std, "Conv_9/kernel", kernels)


def test_spearman_by_hand():
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    assert kernel_removal.spearman([1, 2, 30, 400, 5000], [0.2, 0.1, 0.4, 0.3, 9.0]) == pytest.approx(0.8)
    assert kernel_removal.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ties at their mean rank: 1 2.5 2.5 4 against 1 2 3 4, 4.5 / sqrt(4.5 * 5).
    assert kernel_removal.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(22.5))
    assert kernel_removal.spearman([1, 1, 1], [1, 2, 3]) == 0.0
    with pytest.raises(ValueError, match="3 and 2 values"):
        kernel_removal.spearman([1, 2, 3], [1, 2])


def test_correlations_in_layers_and_together():
    truth = {"a": np.asarray([1.0, 2.0, 3.0]), "b": np.asarray([10.0, 20.0, 30.0])}
    scores = {"a": np.asarray([13.0, 14.0, 15.0]), "b": np.asarray([2.0, 1.0, 0.0])}
    found = kernel_removal.correlate(truth, scores)
    assert found["by_layer"] == {"a": pytest.approx(1.0), "b": pytest.approx(-1.0)}
    assert found["layer_mean"] == pytest.approx(0.0)
    # Ranks 1 2 3 4 5 6 against 4 5 6 3 2 1: 1 - 6 * 62 / (6 * 35).
    assert found["together"] == pytest.approx(1 - 6 * 62 / 210)


def test_halves_agree_without_noise_and_do_not_in_noise_alone():
    rng = np.random.default_rng(0)
    level = {"layer": np.repeat(rng.normal(size=(40, 1)), 100, axis=1)}
    noise = {"layer": rng.normal(size=(40, 100))}
    assert kernel_removal.split_half(level, size=False)["together_ceiling"] == pytest.approx(1.0)
    assert kernel_removal.split_half(noise, size=False)["together"] < 0.2
    some = kernel_removal.split_half({"layer": level["layer"] + 10 * noise["layer"]}, size=False)
    assert 0.0 < some["layer_mean"] < some["layer_mean_ceiling"] < 1.0


def test_drawn_kernels_are_distinct_and_in_the_layer():
    drawn = kernel_removal.draw_kernels((3, 3, 5, 7), 20, 0)
    assert drawn.shape == (20, 2) and len(np.unique(drawn, axis=0)) == 20
    assert (drawn >= 0).all() and (drawn < [5, 7]).all()
    assert len(kernel_removal.draw_kernels((3, 3, 2, 2), 20, 0)) == 4


@pytest.fixture(scope="module")
def trainer(quick_programs):
    return Trainer(CONFIG, load(CONFIG.data))


@pytest.fixture(scope="module")
def studied(tmp_path_factory, trainer):
    folder = tmp_path_factory.mktemp("study")
    lines = []
    record = measure(CONFIG, (0.5,), STUDY, folder, lines.append, trainer)
    return {"command": "COMMAND", **json.loads(json.dumps(record))}, folder, lines


def test_a_study_records_what_it_measured(studied):
    record, folder, lines = studied
    (net,) = record["nets"]
    assert record["eval_split"] == "validation" and record["eval_examples"] == 198
    assert [layer["name"] for layer in net["truth"]["layers"]] == [f"Conv_{at}/kernel" for at in (1, 2, 3)]
    cells = {(cell["criterion"], cell["batches"]): cell for cell in net["tuned"]}
    assert len(cells) == 7 and cells["dense", None]["conv_compression"] == 1.0
    assert cells["taylor", 1]["conv_compression"] == cells["random", None]["conv_compression"] > 3
    assert cells["dense", None]["before"] == pytest.approx(net["top1"])
    assert "0 min left" in lines[-1]
    for row in net["truth"]["correlations"]:
        assert -1 <= row["size"]["together"][0] <= 1


def test_scores_are_of_the_training_gradient(studied, trainer):
    """Against `jax.grad` of a training forward written out, on the study's own first two batches."""
    record, folder, _ = studied
    blank = trainer.init(0)
    with np.load(folder / "net-seed0-epoch1.npz") as stored:
        leaves = [jnp.asarray(stored[str(at)]) for at in range(len(jax.tree.leaves(blank)))]
    state = jax.tree.unflatten(jax.tree.structure(blank), leaves)
    data = trainer.dataset
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), importance_study._BATCHES), 140)

    @jax.jit
    def gradient(params, images, labels):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            inputs = normalise(images, data.mean, data.std)
            logits = trainer.model.apply(variables, inputs, train=True, mutable=["batch_stats"])[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)["Conv_2"]["kernel"]

    kernel = np.asarray(state.params["Conv_2"]["kernel"], np.float64)
    expected = {"taylor-1": 0.0, "group_taylor-1": 0.0, "magnitude": np.square(kernel).sum(axis=(0, 1))}
    for batch in (order[:32], order[32:64]):
        images, labels = data.train_images[np.asarray(batch)], data.train_labels[np.asarray(batch)]
        product = kernel * np.asarray(gradient(state.params, images, labels), np.float64)
        expected["taylor-1"] += np.square(product).sum(axis=(0, 1)) / 2
        expected["group_taylor-1"] += np.square(product.sum(axis=(0, 1))) / 2
    layer = record["nets"][0]["truth"]["layers"][1]
    rows, columns = np.asarray(layer["kernels"]).T
    for name, values in expected.items():
        np.testing.assert_allclose(layer["scores"][name], values[rows, columns], rtol=1e-3, atol=1e-12)


def test_the_same_command_goes_on_and_another_is_refused(studied, trainer):
    record, folder, first = studied
    lines = []
    again = measure(CONFIG, (0.5,), STUDY, folder, lines.append, trainer)
    assert len(lines) == 1 < len(first)  # the scores alone are gathered anew
    for field in ("nets", "seconds", "study"):
        assert json.loads(json.dumps(again[field])) == record[field]
    with pytest.raises(ValueError, match="holds parts of other work: study"):
        measure(CONFIG, (0.5,), dataclasses.replace(STUDY, kernels=2), folder, trainer=trainer)


@pytest.mark.parametrize(
    ("config", "study", "message"),
    [
        (tiny.CONFIG, STUDY, "tiny prunes"),
        (tiny.changed(method=None), STUDY, "eval_split='test'"),
        (CONFIG, dataclasses.replace(STUDY, checkpoint_epochs=(9,)), "tiny has 5 epochs"),
        (CONFIG, dataclasses.replace(STUDY, batches=(1, 5)), "an epoch has 4 full batches"),
    ],
)
def test_bad_studies_are_refused(config, study, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        measure(config, (0.5,), study, tmp_path)
    with pytest.raises(ValueError, match="expected numbers from 1 up"):
        dataclasses.replace(STUDY, batches=(4, 1))


def test_a_record_says_how_it_was_made(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(importance_study, "measure", lambda *arguments: asked.append(arguments) or {"nets": []})
    study = Study(seeds=2, checkpoint_epochs=(3, 10))
    record = importance_study.run("DIR", tmp_path / "new" / "record.json", study=study)
    assert record == json.loads((tmp_path / "new" / "record.json").read_text())
    assert record["command"].endswith("record.json --study.checkpoint-epochs 3 10 --study.seeds 2")
    config, fractions, *_ = asked[0]
    assert config.data.dir == "DIR" and config.data.eval_split == "validation" and len(fractions) == 7


def test_table_and_plot_from_the_record(studied, tmp_path):
    record, _, _ = studied
    text = table.generate(record, "plot.png")
    net = record["nets"][0]
    row = net["truth"]["correlations"][0]
    assert (row["criterion"], row["batches"], row["draws"]) == ("taylor", 1, 2)
    shown = next(line for line in text.splitlines() if line.startswith("| taylor"))
    assert table.mean_spread(row["size"]["layer_mean"]) in shown
    assert table.mean_spread(row["signed"]["together"]) in shown
    magnitude = next(cell for cell in net["tuned"] if cell["criterion"] == "magnitude")
    assert f"{100 * magnitude['after']:.2f}" in text and "9 kernels, 60 images" in text
    assert "`COMMAND`" in text and "(plot.png)" in text
    table.plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    untold = {**record, "nets": [{**net, "truth": None}]}
    assert "size, in a layer" not in table.generate(untold)
    with pytest.raises(ValueError, match="truth_seeds=0"):
        table.plot(untold, tmp_path / "none.png")


def test_the_sufficient_number_of_batches_by_hand():
    def row(count, *values):
        return {"criterion": "taylor", "batches": count, "size": {"layer_mean": list(values)}}

    rows = [row(1, 0.30, 0.34), row(4, 0.44, 0.50), row(16, 0.50, 0.47), row(64, 0.5)]
    record = {
        "study": {"batches": [1, 4, 16, 64], "checkpoint_epochs": [3]},
        "nets": [{"epochs": 3, "truth": {"correlations": rows}}],
    }
    assert table.sufficient(record, "taylor") == 16
    rows[1] = row(4, 0.49)
    assert table.sufficient(record, "taylor") == 4
    assert table.sufficient({**record, "nets": []}, "taylor") is None
