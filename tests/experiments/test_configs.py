"""Named configs: what they are called, what they are made of, what is refused."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny

import clicktrain_jax as ct
from clicktrain_jax import models
from experiments import configs
from experiments.configs import PruneConfig, compare, from_dict, to_dict
from experiments.configs.methods import KINDS
from experiments.records import differences, identity, kept
from experiments.train.forks import dense_of
from experiments.train.recipe import learning_rate, prune_rules

ALL = configs.all_configs()
PUBLISHED = Path(
    os.environ.get("CLICKTRAIN_RECIPES", Path(__file__).parents[3] / "shared" / "reference" / "recipes.json")
)


def conv_compression(config):
    """All convolution weights / retained ones, from shapes and counts alone."""
    model = models.build(config.net, num_classes=10, width=config.width)
    shape = models.default_image_shape(config.net)
    layers = models.conv_layers(model, shape)
    rules = prune_rules(config.prune.fractions, models.prunable_convs(model, shape), config.net)
    plan = ct.make_plan(models.abstract_variables(model, shape)["params"], rules).by_name()
    total = retained = 0
    for layer in layers:
        kh, kw, cin, cout = layer.kernel_shape
        total += kh * kw * cin * cout
        kept = (cin * cout - plan[layer.path].num_removed) * min(kh * kw, 4) if layer.path in plan else None
        retained += kh * kw * cin * cout if kept is None else kept
    return total / retained


PRUNED = {
    (c.net, c.width, c.prune.fractions): c
    for c in ALL.values()
    if c.prune and c.prune.fractions and c.name.endswith("x")
}


@pytest.mark.parametrize("config", PRUNED.values(), ids=lambda config: config.name)
def test_names_carry_the_compression_over_all_convolutions(config):
    assert config.name.rpartition("-")[2] == f"{conv_compression(config):.1f}x"


def test_names_are_unique_and_every_pruned_config_has_its_dense_one():
    families = (
        configs.demo,
        configs.slim,
        configs.published,
        configs.imagenet,
        configs.own,
        configs.modern,
        configs.price,
        configs.ablation,
        configs.compare,
    )
    families = [config for family in families for config in family.configs()]
    assert len(ALL) == len(families)
    # Each method has its own tuned learning rate.
    same = {"name": "", "expected": "", "learning_rate": 1.0}
    # At equal seconds each cell has other epochs than the dense run, which is the slim study's by another name.
    others = {cell.config.name for cell in configs.compare.study("slim-seconds").cells}
    alike = [config for name, config in ALL.items() if name not in others]
    known = [dataclasses.replace(other, **same) for other in alike if other == dense_of(other)]
    for config in alike:
        dense = [other for other in known if other == dataclasses.replace(dense_of(config), **same)]
        assert len(dense) == 1, f"{config.name} is compared with {len(dense)} dense configs"


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the authors' recipes (shared/reference) are not here")
def test_every_published_recipe_is_here():
    ours = [config for config in configs.published.configs() if config.prune]
    remaining = list(ours)
    for recipe in json.loads(PUBLISHED.read_text())["recipes"]:
        for variant in recipe["variants"]:
            best = max(variant["runs"], key=lambda run: run["best_top1"] or 0)
            match = [
                config
                for config in remaining
                if (config.net, config.data.name) == (recipe["net"], recipe["dataset"])
                and [round(100 * fraction) for fraction in config.prune.fractions] == variant["kernel_prune_percent"]
            ]
            assert len(match) == 1
            config = match[0]
            remaining.remove(config)
            assert config.prune.coeff == best["group_lasso_coeff"]
            assert config.expected == (
                "not published" if best["best_top1"] is None else f"best test top-1 {best['best_top1']:.2f} published"
            )
            for ours_, theirs in {
                "epochs": "epochs",
                "batch_size": "batch_size",
                "learning_rate": "learning_rate",
                "lr_gamma": "lr_gamma",
                "momentum": "momentum",
                "weight_decay": "weight_decay",
                "mixup_alpha": "mixup_alpha_after_prune",
            }.items():
                assert getattr(config, ours_) == recipe[theirs]
            assert list(config.lr_milestones) == recipe["lr_milestones"]
            assert (config.prune.select_epoch, config.prune.prune_epoch, config.prune.num_patterns) == (
                recipe["select_epoch"],
                recipe["prune_epoch"],
                recipe["num_patterns"],
            )
            assert config.mixup_epoch == config.prune.prune_epoch
    assert not remaining


@pytest.mark.parametrize("config", ALL.values(), ids=lambda config: config.name)
def test_configs_survive_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


OLD = Path(configs.__file__).parents[1] / "results"


def test_records_from_before_there_was_one_field_for_the_method_are_read():
    """Each says of its method what the cell of its name says today."""
    cells, kinds = {cell.config.name: cell.config for cell in compare.study("digits").cells}, set()
    for record in kept(OLD / "compare-digits" / "runs.jsonl"):
        stored = record["config"]
        assert "method" not in stored and "sparse" in stored
        config = from_dict(stored)
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
        assert identity(stored) == identity(to_dict(config))
        ours = cells[config.name]
        if config.admm is not None:  # its penalty was tuned
            tuned = dataclasses.replace(ours.admm, rho=config.admm.rho)
            ours = dataclasses.replace(ours, method=dataclasses.replace(ours.method, admm=tuned))
        assert config.method == ours.method, config.name
        assert not [field for field, _, _ in differences(stored, ours) if field.startswith("method")]
        kinds.add(config.method and config.method.kind)
    # Younger than the five fields are the others.
    assert kinds == {None, *KINDS} - {"magnitude", "set", "random", "n_of_m_once"}


def test_two_methods_in_an_old_record_are_refused():
    stored = {"prune": {"fractions": [0.5]}, "channels": {}}
    with pytest.raises(ValueError, match="prune and channels are methods of their own"):
        from_dict(stored)
    with pytest.raises(ValueError, match="method.kind='what': expected one of"):
        from_dict({"name": "a", "net": "small", "epochs": 1, "method": {"kind": "what"}})


def test_step_schedule_drops_at_its_milestones():
    rate = learning_rate(ALL["vgg13-cifar10-9.0x"], steps_per_epoch=391)
    rates = [float(rate(epoch * 391 + step)) for epoch, step in ((0, 0), (54, 390), (55, 0), (130, 390), (131, 0))]
    np.testing.assert_allclose(rates, (0.1, 0.1, 0.01, 0.01, 0.001), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"width": 0}, "width=0"),
        ({"seed": -1}, "seed=-1"),
        ({"lr_milestones": (3,)}, "they are for 'step'"),
        ({"mixup_epoch": -1}, "mixup_epoch=-1"),
        ({"epochs": 3}, "prune_epoch=3 is not before epochs=3"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.changed(**fields)


def test_impossible_prunings_are_refused():
    with pytest.raises(ValueError, match="select_epoch=5, prune.prune_epoch=4"):
        PruneConfig(fractions=(0.5,), coeff=0, select_epoch=5, prune_epoch=4)
    for both_or_neither in ({"fractions": ()}, {"fractions": (0.5,), "target": 8.0}):
        with pytest.raises(ValueError, match="or else leave them empty and give a target"):
            PruneConfig(**both_or_neither, coeff=0, select_epoch=1, prune_epoch=4)
    for reselect_epoch in (1, 4):
        with pytest.raises(ValueError, match=f"reselect_epoch={reselect_epoch}: expected it between"):
            PruneConfig(fractions=(0.5,), coeff=0, select_epoch=1, prune_epoch=4, reselect_epoch=reselect_epoch)
    with pytest.raises(ValueError, match="for generated patterns, not for 'fixed'"):
        PruneConfig(fractions=(0.5,), coeff=0, select_epoch=1, prune_epoch=4, entries=3)
    with pytest.raises(ValueError, match="has 2 values; small has 3 prunable convolutions"):
        prune_rules((0.5, 0.5), ("a", "b", "c"), "small")
    with pytest.raises(ValueError, match="unknown config field 'epoch' for TrainConfig"):
        from_dict(to_dict(tiny.CONFIG) | {"epoch": 3})
    with pytest.raises(ValueError, match="did you mean vgg13-cifar10-9.0x"):
        configs.get("vgg13-cifar10-9x")


def test_imagenet_in_large_batches_keeps_the_authors_schedule_at_a_rate_in_proportion():
    large, published = ALL["resnet50-imagenet2012-1024-2.3x"], ALL["resnet50-imagenet2012-2.3x"]
    assert large.method == published.method and large.lr_milestones == published.lr_milestones == (31, 61, 75)
    assert large.data == published.data and large.data.image_size == 224 and large.crop_padding == 0
    rate = learning_rate(large, 1251)
    assert float(rate(0)) == pytest.approx(0.4 / (5 * 1251))
    assert float(rate(5 * 1251 // 2)) == pytest.approx(0.2, rel=1e-3)
    at = [float(rate(epoch * 1251 + 1)) for epoch in (5, 30, 31, 61, 75, 94)]
    assert at == pytest.approx([0.4, 0.4, 0.04, 0.004, 0.0004, 0.0004])
    with pytest.raises(ValueError, match="warmup_epochs=95: expected 0 to 94"):
        dataclasses.replace(large, warmup_epochs=95)
    cosine = dataclasses.replace(large, lr_schedule="cosine", lr_milestones=())
    assert float(learning_rate(cosine, 100)(500)) == pytest.approx(0.4)
