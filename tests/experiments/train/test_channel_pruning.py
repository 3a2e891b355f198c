"""PruneTrain in a run: nets that get smaller twice, and are restored at the width they had."""

import json
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clicktrain_jax import models
from clicktrain_jax.channels import channel_nodes
from clicktrain_jax.methods import channel_lasso
from clicktrain_jax.trees import named_leaves
from experiments.train.channel_pruning import ChannelPruning
from experiments.train.checkpoints import Checkpoints
from experiments.train.state import TrainState

IMAGE = (8, 8, 1)
# Programs here run a few times: compiled without optimisation they are ready sooner.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CHANNELS = [f"params/Conv_{index}/kernel" for index in range(4)]


class Settings(NamedTuple):
    ratio: float = 0.2
    every_epochs: int = 3
    threshold: float = 1e-4
    multiple: int = 8


@pytest.fixture(scope="module")
def run():
    """(pruning, optimizer, first state, a jitted update) of the small net: 16, 32, 32 and 64 channels."""
    model = models.build("small", num_classes=10, width=0.5, conv=models.NarrowConv)
    abstract = models.abstract_variables(model, IMAGE)
    pruning = ChannelPruning(model, abstract, IMAGE, Settings())
    optimizer = pruning.optimizer(optax.sgd(0.05, momentum=0.9))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(16, *IMAGE)), jnp.float32)

    @quick_jit
    def update(state):
        def loss_of(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(16) % 10).mean()
            return loss, new["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        change, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
        return TrainState(state.step + 1, optax.apply_updates(state.params, change), batch_stats, opt_state), loss

    @quick_jit
    def start(key):
        variables = model.init(key, images, train=False)
        params = variables["params"]
        return TrainState(jnp.int32(0), params, variables["batch_stats"], optimizer.init(params))

    @quick_jit
    def logits(state):
        return model.apply({"params": state.params, "batch_stats": state.batch_stats}, images, train=False)

    return pruning, start(jax.random.key(0)), update, logits


def without(state, layer, count):
    """The state with channels ``count`` and up of a layer at zero: what writes them, BatchNorm, what reads them."""
    params = jax.tree.map(np.array, state.params)
    reader = f"Conv_{layer + 1}" if layer < 3 else "Dense_0"
    params[f"Conv_{layer}"]["kernel"][..., count:] = 0
    params[reader]["kernel"][..., count:, :] = 0
    for name in ("scale", "bias"):
        params[f"BatchNorm_{layer}"][name][count:] = 0
    return state._replace(params=jax.tree.map(jnp.asarray, params))


def test_reconfigurations_compose_and_are_restored(run, tmp_path):
    pruning, first, update, logits = run
    state, losses = first, []
    expected = [16, 32, 32, 64]
    sizes = []
    for layer, alive, kept in ((1, 12, 16), (1, 8, 8)):
        for _ in range(3):
            state, loss = update(state)
            losses.append(float(loss))
        coeff = float(state.opt_state.coeff)
        state = without(state, layer, alive)
        before = logits(state)
        state, facts = pruning.reconfigure(state)
        expected[layer] = kept
        np.testing.assert_allclose(logits(state), before, rtol=1e-4, atol=1e-5)
        assert json.loads(json.dumps(facts)) == facts
        assert facts["channels"] == dict(zip(CHANNELS, expected))
        shapes = zip([1, *expected], expected, (64, 16, 16, 4))
        weights, multiply_adds = zip(*((9 * cin * cout, 9 * cin * cout * places) for cin, cout, places in shapes))
        assert facts["conv_weights"] == sum(weights)
        assert facts["multiply_adds"] == sum(multiply_adds) + 10 * expected[3]
        assert facts["model_weights"] == models.parameter_count(state.params)
        assert float(state.opt_state.coeff) == coeff > 0 and int(state.opt_state.count) == int(state.step)
        sizes.append(facts["model_weights"])
        # A run that is killed now finds the shapes again from the whole net and the facts.
        checkpoints = Checkpoints(tmp_path / str(alive))
        checkpoints.save(1, state)
        template = pruning.template(first, json.loads(json.dumps(facts)))
        assert jax.tree.structure(template) == jax.tree.structure(state)
        _, restored = checkpoints.restore_newest(template)
        checkpoints.close()
        for (name, one), (_, other) in zip(named_leaves(restored), named_leaves(state), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 2
    state, loss = update(restored)
    assert losses[-1] < losses[0] and np.isfinite(float(loss))


def test_the_lasso_kills_channels_that_the_run_then_drops():
    """Nothing is silenced by hand: what a lasso alone does to groups of norms near 1."""
    settings = Settings(ratio=0.5, threshold=0.01, multiple=1)
    model = models.build("small", num_classes=10, width=0.25, conv=models.NarrowConv)
    abstract = models.abstract_variables(model, IMAGE)
    nodes = channel_nodes(lambda variables, x: model.apply(variables, x, train=False), abstract, IMAGE)
    pruning = ChannelPruning(model, abstract, IMAGE, settings)
    optimizer = pruning.optimizer(optax.sgd(0.02))
    variables = quick_jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, *IMAGE)))
    params = variables["params"]
    state = TrainState(jnp.int32(0), params, variables["batch_stats"], optimizer.init(params))

    # A coefficient of 0.5: each update takes 0.01 off a norm, so that 400 are more than any needs.
    value = 0.5 * channel_lasso(params, nodes)

    @quick_jit
    def decay(state):
        """Updates whose loss has no gradient of its own."""

        def once(_, state):
            nothing = jax.tree.map(jnp.zeros_like, state.params)
            change, opt_state = optimizer.update(nothing, state.opt_state, state.params, value=value)
            return state._replace(params=optax.apply_updates(state.params, change), opt_state=opt_state)

        return jax.lax.fori_loop(0, 400, once, state)

    _, whole = pruning.reconfigure(state)
    assert list(whole["channels"].values()) == [8, 16, 16, 32]
    _, facts = pruning.reconfigure(decay(state))
    assert list(facts["channels"].values()) == [1, 1, 1, 1]


def test_when_it_is_due(run):
    assert [epoch for epoch in range(10) if run[0].is_due(epoch)] == [3, 6, 9]


def test_a_net_of_fixed_widths_is_refused():
    model = models.build("small", num_classes=10, conv=nn.Conv)
    with pytest.raises(ValueError, match="conv=clicktrain_jax.models.NarrowConv"):
        ChannelPruning(model, models.abstract_variables(model, IMAGE), IMAGE, Settings())


def test_facts_of_another_net_are_refused(run):
    pruning, first, *_ = run
    other = {"params/Block_0/Conv_0/kernel": 8}
    for channels, reason in (({CHANNELS[0]: 17}, "expected 1 to 16"), (other, "no group")):
        with pytest.raises(ValueError, match=reason):
            pruning.template(first, {"channels": channels})
