"""What the README says, done."""

import inspect
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import clicktrain_jax as ct
from clicktrain_jax import models
from experiments import configs

README = Path(__file__).parents[1] / "README.md"


def snippets():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_example_runs_and_prunes(capsys):
    code = snippets()[0]
    # A run of 8 updates rather than of thousands.
    code = code.replace("2_000", "2").replace("5_000", "4")
    key = jax.random.key(0)
    params = {
        f"Conv_{index}": {"kernel": jax.random.normal(jax.random.fold_in(key, index), shape)}
        for index, shape in enumerate([(3, 3, 3, 8), (3, 3, 8, 16)])
    }

    def loss(params, images, labels):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)) * images.mean() + labels.mean()

    names = {"params": params, "loss": loss, "batches": [(jnp.ones(3), jnp.ones(3))] * 8}
    exec(code, names)  # the README's own code
    kernel = names["params"]["Conv_1"]["kernel"]
    assert int((kernel != 0).sum()) == (128 - 84) * 4  # ceil(0.65 * 128) kernels go, the others keep 4 taps
    assert "all convolutions" in capsys.readouterr().out


def test_the_accelerated_net_computes_what_the_masked_one_does(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    code = snippets()[2]
    model = nn.Conv(128, (3, 3), use_bias=False)
    images = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    params = model.init(jax.random.key(1), images)["params"]
    plan = ct.make_plan(params, {"kernel": 0.5}, tile=(64, 1))
    masks = ct.select_masks(jax.tree.map(jnp.abs, params), plan, ct.patterns.fixed_set(4))

    class Model:
        @staticmethod
        def apply(variables, x, train):
            return model.apply(variables, x)

    names = {"ct": ct, "jax": jax, "model": Model, "masks": masks, "params": params, "images": images}
    exec(code, names)  # the README's own code
    wanted = model.apply({"params": ct.apply_masks(params, masks)}, images)
    assert jnp.abs(names["logits"] - wanted).max() < 1e-5
    assert "kernel" in capsys.readouterr().out


def test_the_exported_net_answers_as_the_masked_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code = snippets()[3]
    model = models.build("small", num_classes=10, width=0.25)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    variables = model.init(jax.random.key(1), jnp.zeros(images.shape), train=False)
    plan = ct.make_plan(variables["params"], {"Conv_2/kernel": 0.5}, tile=(16, 1))
    masks = ct.select_masks(jax.tree.map(jnp.abs, variables["params"]), plan, ct.patterns.fixed_set(4))
    variables["params"] = ct.apply_masks(variables["params"], masks)
    names = {"ct": ct, "model": model, "masks": masks, "images": images, **variables}
    exec(code, names)  # the README's own code
    mean, std = (np.float32(each) for each in ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]))
    wanted = model.apply(variables, (images.astype(np.float32) / 255 - mean) / std, train=False)
    assert jnp.abs(names["logits"] - wanted).max() < 1e-4
    assert jnp.abs(names["net"](images[:1]) - wanted[:1]).max() < 1e-4


def test_the_options_example_makes_an_optimizer():
    code = snippets()[1]
    shapes = [(3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 32)]
    params = {f"Conv_{index}": {"kernel": jnp.ones(shape)} for index, shape in enumerate(shapes)}
    names = {"params": params, "ct": ct, "optax": optax}
    exec(code, names)  # the README's own code
    state = names["optimizer"].init(params)
    assert set(state.scores) == {"Conv_1/kernel", "Conv_2/kernel"} and names["plan"].target.ratio == 8


def test_every_option_in_the_table_exists():
    text = README.read_text()
    table = text[text.index("| to choose | option |") : text.index("`python -m experiments patterns RUN`")]
    known = {
        name
        for function in (ct.make_plan, ct.clicktrain, ct.patterns.Generated)
        for name in inspect.signature(function).parameters
    }
    named = set(re.findall(r"`?\b([a-z_]+)=", table)) | set(re.findall(r"`([a-z]+_step)`", table))
    assert named and named <= known, named - known


def test_every_config_it_names_exists():
    named = set(re.findall(r"\b(?:vgg|resnet|slim|digits)[\w.]*-\w+-[\d.]+x\b", README.read_text()))
    assert named and all(name in configs.all_configs() for name in named)


def test_every_room_it_names_exists():
    text = README.read_text()
    for room in ("clicktrain_jax/", "clicktrain_jax/deploy/", "clicktrain_jax/deploy/storage/",
                 "clicktrain_jax/channels/", "clicktrain_jax/models/", "clicktrain_jax/patterns/",
                 "clicktrain_jax/selection/", "pallas_kernels/", "experiments/", "tests/"):
        assert f"`{room}`" in text and (README.parent / room).is_dir()
    for module in ("plan", "targets", "importance", "masks", "states", "shares", "convolutions", "regularization",
                   "phases", "transform", "accounting"):
        assert f"`{module}`" in text and (README.parent / "clicktrain_jax" / f"{module}.py").exists()
