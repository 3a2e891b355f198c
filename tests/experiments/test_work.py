"""Runs made longer or shorter."""

import dataclasses

import pytest

from experiments import configs
from experiments.configs.compare import study
from experiments.configs.methods import GradualConfig
from experiments.configs.work import at_equal_seconds, stretched


def test_what_happens_in_a_run_happens_in_proportion():
    config = dataclasses.replace(configs.get("vgg13-cifar10-own-9.0x"), ema_epochs=19)
    half = stretched(config, 95)
    assert (half.epochs, half.prune.select_epoch, half.prune.prune_epoch, half.ema_epochs) == (95, 10, 19, 10)
    assert half.lr_milestones == tuple(round(each / 2) for each in config.lr_milestones)
    assert half.mixup_epoch == round(config.mixup_epoch / 2) and half.prune.target == config.prune.target
    method = GradualConfig(8.0, begin_epoch=0, end_epoch=100)
    gradual = dataclasses.replace(configs.get("vgg13-cifar10-dense"), method=method)
    assert (stretched(gradual, 380).method.begin_epoch, stretched(gradual, 380).method.end_epoch) == (0, 200)


def test_seconds_saved_are_spent_on_epochs():
    config = study("slim").cell("early-tiles-8x").config
    longer = at_equal_seconds(config, 0.6)
    assert (longer.epochs, longer.name) == (20, f"{config.name}-20-epochs")
    assert longer.prune.prune_epoch == round(20 * config.prune.prune_epoch / 12)
    with pytest.raises(ValueError, match="of_dense=0: expected"):
        at_equal_seconds(config, 0)
    with pytest.raises(ValueError, match="is pruned after its 12 dense epochs"):
        stretched(study("slim").cell("rewind-3").config, 20)
