"""What README and the pages say, done: every snippet is run, every option, config, command and file named exists."""

import functools
import inspect
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn, drawn_masks, masked
from flax import nnx

import clicktrain_jax as ct
from experiments import configs

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
BATCHES = 8


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def with_snippets():
    found = [page for page in PAGES if snippets(page)]
    return pytest.mark.parametrize("page", found, ids=lambda page: page.stem)


class Net(nn.Module):
    """Three convolutions: large enough for a target of 8x with the first one dense."""

    @nn.compact
    def __call__(self, x, train):
        for width in (16, 32, 32):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=4, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(nnx.relu(self.stem(x)))).mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def pruned():
    """Variables of the net with its masks applied, and the masks."""
    variables = drawn(Net(), (32, 32, 3))
    plan = ct.make_plan(variables["params"], {"Conv_0/kernel": None, "Conv_.*/kernel": 0.5}, tile=(16, 1))
    masks = drawn_masks(variables["params"], plan)
    return jax.tree.map(jnp.asarray, variables | {"params": masked(variables["params"], masks)}), masks


@pytest.fixture
def run_page(pruned, tmp_path, monkeypatch):
    """Runs a page's snippets in their order, and returns the names they end with."""
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    variables, masks = pruned
    images = jnp.asarray(np.random.default_rng(0).random((2, 32, 32, 3)), jnp.float32)
    labels, model = jnp.arange(2), Net()

    def loss(params, images, labels):
        logits = model.apply({"params": params, "batch_stats": variables["batch_stats"]}, images, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def run(page):
        names = {
            "ct": ct,
            "jax": jax,
            "optax": optax,
            "model": model,
            "masks": masks,
            "variables": variables,
            **variables,
            "images": images,
            "labels": labels,
            "batches": [(images, labels)] * BATCHES,
            "loss": loss,
            "Stack": Stack,
        }
        names["plan"] = ct.make_plan(names["params"], {"Conv_0/kernel": None, "Conv_.*/kernel": 0.5})
        names["opt_state"] = ct.clicktrain(optax.sgd(0.1), names["plan"], select_step=2, prune_step=4, coeff=1e-4).init(
            names["params"]
        )
        trained = any("in batches" in code for code in snippets(page))
        for code in snippets(page):
            # Runs of a few updates rather than of thousands.
            for many, few in (("2_000", "2"), ("5_000", "4"), ("10_000", "20")) if trained else ():
                code = code.replace(many, few)
            exec(code, names)  # the page's own code
        return names

    return run


predicted = jax.jit(functools.partial(Net().apply, train=False))


def check_readme(names, printed):
    kernel = names["params"]["Conv_1"]["kernel"]
    assert int((kernel != 0).sum()) == (512 - 333) * 4  # ceil(0.65 * 512) kernels go, the others keep 4 taps
    assert "all convolutions" in printed
    variables = {"params": names["params"], "batch_stats": names["batch_stats"]}
    wanted = predicted(variables, names["images"])
    assert jnp.abs(names["logits"] - wanted).max() < 1e-5
    assert jnp.abs(names["net"](names["images"]) - wanted).max() < 1e-4


def check_deploying(names, printed):
    mean, std = (np.float32(each) for each in ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]))
    wanted = predicted(names["variables"], (names["images"] - mean) / std)
    assert jnp.abs(names["logits"] - wanted).max() < 1e-4
    assert jnp.abs(names["net"](names["images"][:1]) - wanted[:1]).max() < 1e-4
    assert "kernel" in printed


def check_options(names, printed):
    state = names["optimizer"].init(names["params"])
    assert set(state.scores) == {"Conv_1/kernel", "Conv_2/kernel"} and names["plan"].target.ratio == 8


CHECKS = {"README": check_readme, "deploying": check_deploying, "options": check_options}


@with_snippets()
def test_every_snippet_runs(run_page, page, capsys):
    names = run_page(page)
    CHECKS.get(page.stem, lambda names, printed: None)(names, capsys.readouterr().out)


def test_readme_is_short_and_has_its_picture():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert any("](docs/pictures/" in line for line in lines)


def test_every_option_in_the_table_exists():
    text = (DOCS / "options.md").read_text()
    table = text[text.index("| to choose | option |") : text.index("`python -m experiments patterns RUN`")]
    known = {
        name
        for function in (ct.make_plan, ct.clicktrain, ct.patterns.Generated)
        for name in inspect.signature(function).parameters
    }
    named = set(re.findall(r"`?\b([a-z_]+)=", table)) | set(re.findall(r"`([a-z]+_step)`", table))
    assert named and named <= known, named - known


def test_every_config_named_exists():
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"\b(?:vgg|resnet|slim|digits)[\w.]*-\w+-(?:[\d.]+x|dense)\b", text))
    assert named and all(name in configs.all_configs() for name in named), named


def test_every_file_named_exists():
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"`((?:tests|examples|experiments|docs|clicktrain_jax|pallas_kernels)/[\w/.]*)`", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_command_named_exists():
    from experiments.__main__ import USAGE

    for page in PAGES:
        for command in re.findall(r"python -m experiments ([a-z][a-z-]*)", page.read_text()):
            assert re.search(rf"^  {command}\b", USAGE, re.MULTILINE), f"{page.name}: {command}"
        for target in re.findall(r"\bmake ([a-z-]+)\b(?!_)", page.read_text()):
            if f"make {target}`" in page.read_text() or f"    make {target}" in page.read_text():
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^([\w-]+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} == set(listed)


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text()
    listed = set(re.findall(r":: (?:clicktrain_jax\.)?(?:methods\.)?(\w+)$", text, re.MULTILINE))
    missing = (set(ct.__all__) | set(ct.methods.__all__)) - listed
    assert not missing, f"docs/api.md lacks {sorted(missing)}"
