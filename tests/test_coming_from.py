"""docs/coming-from.md: every call in its right-hand columns is made, with the arguments it names."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn_masks, masked

import clicktrain_jax as ct

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"
RULES = {"Conv_0/kernel": None, "Conv_.*/kernel": 0.5}
# What stands for "..." after a name.
VALUES = {
    "prune_step": "1",
    "key": "jax.random.key(0)",
    "begin_step": "0",
    "end_step": "2",
    "every": "1",
    "output_sizes": '{"Conv_1/kernel": (8, 8)}',
    "schedule": "optax.linear_schedule(0.0, 1.0, 2)",
}
CLICKTRAIN = "ct.clicktrain(tx, plan, select_step=0, prune_step=1, coeff=1e-3)"
EXCHANGE = "(tx, plan, key=jax.random.key(0), every=1, end_step=2)"
# What is named without arguments, or with "..." for all of them.
WHOLE = {
    "ct.clicktrain(tx, plan, ...)": CLICKTRAIN,
    "ct.clicktrain(...)": CLICKTRAIN,
    "ct.clicktrain": CLICKTRAIN,
    "ct.methods.gradual_magnitude": "ct.methods.gradual_magnitude(tx, plan, begin_step=0, end_step=2, every=1)",
    "ct.methods.magnitude": "ct.methods.magnitude(tx, plan, prune_step=1)",
    "ct.methods.rigl": f"ct.methods.rigl{EXCHANGE}",
    "ct.methods.sparse_evolutionary": f"ct.methods.sparse_evolutionary{EXCHANGE}",
    "ct.methods.sr_ste": "ct.methods.sr_ste(tx, plan)",
    "ct.methods.straight_through": "ct.methods.straight_through(params, plan)",
    "ct.methods.prunetrain": "ct.methods.prunetrain(tx, nodes, prefix='', every=1, threshold=0.1)",
    "ct.masks_of": "ct.masks_of(opt_state)",
    "ct.apply_masks": "ct.apply_masks(params, masks)",
    "ct.export(...)": "ct.export('net', apply, params, masks, image_shape=(8, 8, 3))",
    "ct.channels": "ct.channels.channel_nodes(apply, params, (8, 8, 3))",
    "make_plan(quads=True)": "ct.make_plan(params, rules, quads=True)",
    "tile=(4, 1)": "ct.make_plan(params, rules, tile=(4, 1))",
    '{"Conv_0/kernel": None, ...}': "ct.make_plan(params, rules)",
    "ct.methods": "ct.methods",
    '"erk"': "ct.methods.densities(plan, 0.2, 'erk')",
    '"group_taylor"': CLICKTRAIN.replace(")", ", importance='group_taylor')"),
    '"magnitude"': CLICKTRAIN.replace(")", ", importance='magnitude')"),
}
# Arguments that are told alone: those of any of these.
OF = (ct.clicktrain, ct.make_plan, ct.methods.gradual_magnitude, ct.methods.magnitude)


def cells():
    rows = re.findall(r"^\| .* \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return sorted({code for row in rows for code in re.findall(r"`([^`]*)`", row)})


def expression(code):
    """The call that a cell's code stands for; None for the name of an argument."""
    if code in WHOLE:
        return WHOLE[code]
    if re.fullmatch(r"\w+=?", code) or code == "None":
        return None
    if code.startswith("importance="):
        return CLICKTRAIN.replace(")", f", {code})")
    if code.startswith("{"):
        return f"ct.make_plan(params, {code})"
    return re.sub(r"(\w+)=\.\.\.", lambda found: f"{found[1]}={VALUES[found[1]]}", code)


def apply(params, images):
    x = images
    for name in ("Conv_0", "Conv_1", "Conv_2"):
        kernel = params[name]["kernel"]
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
    return x.mean((1, 2))


@pytest.fixture(scope="module")
def names():
    rng = np.random.default_rng(0)
    shapes = {"Conv_0": (3, 3, 3, 16), "Conv_1": (3, 3, 16, 32), "Conv_2": (3, 3, 32, 32)}
    params = {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    tx, plan, patterns = optax.sgd(0.1), ct.make_plan(params, RULES), ct.patterns.fixed_set(4)
    scores = jax.tree.map(np.abs, params)
    masks = drawn_masks(params, plan)
    params = jax.tree.map(jnp.asarray, masked(params, masks))
    opt_state = ct.clicktrain(tx, plan, select_step=0, prune_step=1, coeff=1e-3).init(params)
    nodes = ct.channels.channel_nodes(apply, params, (8, 8, 3))
    return {**globals(), **locals(), "rules": RULES}


def test_every_argument_exists():
    for code in cells():
        name = code.removesuffix("=")
        if expression(code) is None and name != "None":
            assert any(name in inspect.signature(function).parameters for function in OF), name


@pytest.mark.parametrize("call", sorted({expression(code) for code in cells()} - {None}))
def test_every_call_is_made(call, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = eval(call, dict(names))  # the page's own code
    if isinstance(made, optax.GradientTransformation):
        params = names["params"]
        state = made.init(params)
        updates, state = jax.jit(made.update)(params, state, params, value=jnp.float32(1))
        assert jax.tree.structure(updates) == jax.tree.structure(params) and ct.status(state).count == 1
    elif callable(made):
        assert made(names["params"], jnp.ones((1, 8, 8, 3))).shape == (1, 32)
