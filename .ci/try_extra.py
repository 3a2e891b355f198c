"""Tries what an extra is for, as a user who has only installed it.

    cd EMPTY; python -P try_extra.py EXTRA

It exits with 0 when all of that works.
"""

import importlib.resources
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax

import clicktrain_jax as ct

BIN = pathlib.Path(sys.executable).parent


def clicktrain(*arguments, code=0):
    """Run the installed program; returns its stdout and stderr."""
    done = subprocess.run([BIN / "clicktrain", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def refuses(extra, action):
    """What needs an extra that is not there names it."""
    try:
        action()
    except (ModuleNotFoundError, ValueError) as error:
        assert f"pip install 'clicktrain-jax[{extra}]'" in str(error), error
    else:
        raise AssertionError(f"it works without the extra {extra}: try it elsewhere")


def pruned():
    """A net of one convolution, pruned by the wrapper: its parameters and masks."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 8)), "bias": jnp.zeros(8)}
    plan = ct.make_plan(params, {"kernel": 0.5})
    optimizer = ct.clicktrain(optax.sgd(0.1), plan, select_step=1, prune_step=2, coeff=1e-3)
    state = optimizer.init(params)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    for _ in range(4):
        grads = jax.grad(lambda params: (net(params, images) ** 2).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    masks = ct.masks_of(state)
    assert ct.report(params, masks).conv_compression > 4
    return params, masks


def net(params, images):
    """A convolution and the mean over the image."""
    kernel = params["kernel"]
    out = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return (out + params["bias"]).mean((1, 2))


def export(**options):
    """The pruned net, exported into this folder and loaded again."""
    params, masks = pruned()
    ct.export("net", net, params, masks, image_shape=(8, 8, 4), **options)
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 4))
    assert jnp.allclose(ct.load("net", net)(images), net(params, images), atol=1e-4)


def none():
    """jax, optax and numpy alone: the wrapper works, the rest says what it needs."""
    pruned()
    refuses("deploy", export)

    def models():
        import clicktrain_jax.models  # noqa: F401

    refuses("models", models)
    for package in ("clicktrain_jax", "pallas_kernels"):
        assert (importlib.resources.files(package) / "py.typed").is_file(), package
    assert ct.__version__ in clicktrain("--version") and "train NAME" in clicktrain("--help")
    assert "pip install 'clicktrain-jax[experiments]'" in clicktrain("demo", code=2)


def deploy():
    """Exports."""
    export()
    refuses("onnx", lambda: export(onnx=True))


def onnx():
    """ONNX files that onnxruntime runs."""
    export(onnx=True)
    import onnxruntime

    onnxruntime.InferenceSession("net/net.onnx", providers=["CPUExecutionProvider"])


def models():
    """The nets."""
    from clicktrain_jax import models

    model = models.build("small", num_classes=10, width=0.25)
    assert models.prunable_convs(model, (8, 8, 1))
    assert "pip install 'clicktrain-jax[experiments]'" in clicktrain("list", code=2)


_TINY = ("--width", "0.125", "--data.train-examples", "140", "--epochs", "2", "--workdir", "run")


def experiments():
    """The program, far from any checkout."""
    assert "digits-clicktrain" in clicktrain("list", "digits")
    for command in ("train", "evaluate", "export", "list", "demo", "compare", "bench", "bench conv", "table"):
        assert "usage: clicktrain" in clicktrain(*command.split(), "--help"), command
    assert "epoch 2/2" in clicktrain("train", "digits-dense", *_TINY)
    assert "clicktrain train" in clicktrain("train", "--colour", code=2)
    assert "is finished" in clicktrain("train", "digits-dense", *_TINY)
    assert "top-1" in clicktrain("evaluate", "run")
    assert "page: " in clicktrain("export", "run", "--no-timing")
    assert "checkout" in clicktrain("table", code=2)
    assert "pip install 'clicktrain-jax[tensorboard]'" in clicktrain(
        "train", "digits-dense", *_TINY[:-1], "logged", "--loop.tensorboard", code=2
    )
    assert not {"experiments", "tests"} & {path.stem for path in pathlib.Path(ct.__file__).parents[1].iterdir()}


def tensorboard():
    """Event files."""
    clicktrain("train", "digits-dense", *_TINY[:-1], "logged", "--loop.tensorboard")
    assert list(pathlib.Path("logged/events").iterdir())
    assert json.loads(pathlib.Path("logged/config.json").read_text())["loop"]["tensorboard"]


if __name__ == "__main__":
    {one.__name__: one for one in (none, deploy, onnx, models, experiments, tensorboard)}[sys.argv[1]]()
