"""One of each kind is added to a copy of the tree, in as many files as CONTRIBUTING.md says, and run."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("pallas_kernels", "clicktrain_jax", "experiments")

# {kind: {file: its text, or (what stands there, what comes in its place, ...) for a file that exists}}
CHANGES = {
    "method": {
        "clicktrain_jax/methods/least.py": '''"""Weights below a magnitude go, once."""

from clicktrain_jax.methods.sparse import magnitudes, one_shot


def least(inner, plan, *, prune_step, magnitude):
    """Masks from the weights after update ``prune_step``."""
    return one_shot(
        "least", inner, plan, prune_step,
        lambda weights: {name: magnitudes(weight) >= magnitude for name, weight in weights.items()},
    )
''',
        "clicktrain_jax/methods/__init__.py": (
            "from clicktrain_jax.methods.magnitude import",
            "from clicktrain_jax.methods.least import least\nfrom clicktrain_jax.methods.magnitude import",
        ),
        "experiments/configs/methods.py": (
            "from experiments.configs.run import Run, check",
            "from experiments.configs.run import Run, check, masks_in_state",
            "MethodConfig = (\n    PruneConfig",
            '''@dataclasses.dataclass(frozen=True)
class LeastConfig:
    """Weights below a magnitude go at an epoch's begin."""

    kind: ClassVar[str] = "least"
    epochs_after: ClassVar[int] = 0

    magnitude: float
    prune_epoch: int

    def check(self, epochs: int) -> None:
        """It fits every run."""

    def begins_at(self, steps_per_epoch: int) -> int:
        """At its epoch."""
        return self.prune_epoch * steps_per_epoch

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.least`."""
        step = self.begins_at(run.steps_per_epoch)
        optimizer = methods.least(run.inner, run.plan, prune_step=step, magnitude=self.magnitude)
        return Method(optimizer, masks=masks_in_state, begins_at=step)


MethodConfig = (
    LeastConfig
    | PruneConfig''',
        ),
    },
    "criterion": {
        "clicktrain_jax/importance.py": (
            "CRITERIA: dict[str, Criterion] = {",
            '''def fourth_power(params: Tree, grads: Tree | None = None) -> Tree:
    """``w**4``."""
    return map_named(lambda _, w: None if w is None else jnp.asarray(w, jnp.float32) ** 4, params)


CRITERIA: dict[str, Criterion] = {"fourth_power": fourth_power, ''',
        )
    },
    "net": {
        "clicktrain_jax/models/plain.py": '''"""Three convolutions and nothing else."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clicktrain_jax.models.norm import Norm


class Plain(nn.Module):
    """Of one width."""

    num_classes: int
    width: float = 1.0
    dtype: Any = jnp.float32
    conv: Any = nn.Conv
    norm: Any = Norm
    layout: str = "NHWC"

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Logits."""
        for index in range(3):
            x = self.conv(8, (3, 3), use_bias=False, dtype=self.dtype, name=f"Conv_{index}")(x)
            x = nn.relu(x)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2))).astype(jnp.float32)
''',
        "clicktrain_jax/models/__init__.py": (
            '    "small": _Net(SmallCNN, {}, (8, 8, 1)),',
            '    "small": _Net(SmallCNN, {}, (8, 8, 1)),\n    "plain": _Net(Plain, {}, (8, 8, 1)),',
            "from clicktrain_jax.models.resnet import ResNet",
            "from clicktrain_jax.models.plain import Plain\nfrom clicktrain_jax.models.resnet import ResNet",
        ),
    },
    "backend": {
        "pallas_kernels/pattern_conv/again.py": '''"""The meaning once more."""

from pallas_kernels.pattern_conv.reference import forward, input_gradient, weight_gradient, why_not
''',
        "pallas_kernels/pattern_conv/api.py": ("BACKENDS = (", 'BACKENDS = ("again", '),
    },
}
AT_MOST = {"method": 3, "criterion": 1, "net": 2, "backend": 2}
RUN = """
import sys
from pathlib import Path

import jax, jax.numpy as jnp, numpy as np
import pallas_kernels as pk
from experiments.configs import LoopConfig, PruneConfig, TrainConfig, from_dict, to_dict
from experiments.configs.methods import LeastConfig
from experiments.data import DataConfig
from experiments.train import loop

fields = dict(
    net="plain", data=DataConfig("digits", train_examples=64), epochs=2, batch_size=32, crop_padding=1, flip=False,
    loop=LoopConfig(progress=False, eval_every_epochs=2),
)
config = TrainConfig("least", method=LeastConfig(0.05, prune_epoch=1), **fields)
assert from_dict(to_dict(config)) == config
summary = loop.train(config, Path(sys.argv[1]) / "least")
assert summary["method"] == "least" and 1.0 < summary["conv_compression"] < 9.0, summary
pruned = TrainConfig("fourth", method=PruneConfig((0.5,), 1e-3, 0, 1, importance="fourth_power"), **fields)
assert 3.0 < loop.train(pruned, Path(sys.argv[1]) / "fourth")["conv_compression"] < 4.5
structure = pk.make_structure(np.ones((3, 3, 4, 8), bool))
x, w = jnp.ones((1, 4, 4, 4)), jnp.ones((3, 3, 4, 8))
y, again = (pk.pattern_conv(x, w, structure, backend=backend) for backend in ("reference", "again"))
np.testing.assert_array_equal(y, again)
print("one of each")
"""


def apply(tree, file, change):
    path = tree / file
    if isinstance(change, str):
        assert not path.exists()
        path.write_text(change)
        return
    text = path.read_text()
    for old, new in zip(change[::2], change[1::2]):
        assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("results", "__pycache__"))
    return tree


def test_one_of_each_is_added_and_runs(tree, tmp_path):
    for kind, files in CHANGES.items():
        assert len(files) <= AT_MOST[kind]
        for file, change in files.items():
            apply(tree, file, change)
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=tree,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("one of each")


def test_the_guide_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:clicktrain_jax|experiments|pallas_kernels|tests)/[\w/]+\.py)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    counts = dict(re.findall(r"### A (?:kernel )?(\w+)[^:\n]*: (\d) file", text))
    assert {kind: int(counts[kind]) for kind in AT_MOST} == AT_MOST
    for kind, files in CHANGES.items():
        for file, change in files.items():
            told = file if isinstance(change, tuple) else re.sub(r"\w+\.py$", "NAME.py", file)
            assert f"`{told}`" in text, f"{kind}: {told}"
