"""The training loop beside PyTorch's: both are the same net, epochs are asked for in turns, figures follow by hand."""

import dataclasses
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.bench import torch_epochs as bench_torch
from experiments.bench.worker import Failed
from experiments.records import read_json
from experiments.report import benchmarks
from experiments.train.step import Trainer

with_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
# Speaks the protocol, and computes nothing.
FAKE = """
import json, sys
print(json.dumps({"version": "torch 0"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "logits":
        answer = {"logits": [[0.0] * 10] * asked["count"]}
    elif asked["form"] == "one fixed batch":
        answer = {"error": "no such form"}
    else:
        answer = {"seconds": 2.0, "images": 8, "loss": 1.0}
    print(json.dumps(answer), flush=True)
"""


def drawn(trainer, seed):
    """What `Trainer.init` returns, of other numbers: compiling that takes long."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim > 1:
            return (rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(leaf.dtype)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)

    state = jax.tree.map(draw, jax.eval_shape(trainer.fresh, jax.random.key(seed)))
    return state._replace(opt_state=jax.tree.map(np.zeros_like, state.opt_state), step=np.int32(0))


@pytest.fixture(scope="module")
def trainer():
    return bench_torch.make_trainer("vgg11", 0.125, 8, 12)


@pytest.fixture(scope="module")
def state(trainer):
    return drawn(trainer, 0)


@pytest.fixture
def folder(trainer, state, tmp_path):
    bench_torch.hand_over(trainer, state, tmp_path, threads=1, workers=0)
    return tmp_path


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    with bench_torch.TorchLoop([sys.executable, str(path)]) as process:
        yield process


def test_what_is_handed_over(trainer, state, folder):
    job = json.loads((folder / "job.json").read_text())
    assert job["net"] == {
        "channels": 3,
        "stages": [[8], [16], [32, 32], [64, 64], [64, 64]],
        "hidden": [64, 64],
        "classes": 10,
        "dropout": 0.5,
    }
    config = trainer.config
    assert (config.momentum, config.weight_decay, config.crop_padding, config.flip) == (0.9, 5e-4, 4, True)
    assert all(job[name] == getattr(config, name) for name in ("momentum", "weight_decay", "crop_padding", "flip"))
    assert config.mixup_epoch is None and config.prune is None
    with np.load(folder / "weights.npz") as arrays:
        assert len(arrays) == len(jax.tree.leaves((state.params, state.batch_stats)))
        np.testing.assert_array_equal(arrays["params/Conv_3/kernel"], state.params["Conv_3"]["kernel"])
    with np.load(folder / "images.npz") as arrays:
        assert arrays["images"].dtype == np.uint8 and arrays["labels"].dtype == np.int64
        np.testing.assert_array_equal(arrays["images"], trainer.dataset.train_images)


def test_epochs_are_asked_for_in_turns(monkeypatch):
    monkeypatch.setattr(bench_torch, "_REST_S", 0)
    asked = []
    seconds = iter(range(100))

    def way(name):
        def epoch():
            asked.append(name)
            return next(seconds)

        return epoch

    found = bench_torch.alternate({name: way(name) for name in "abc"}, 2)
    assert "".join(asked) == "abcbcacab"
    # The first three seconds are those of the epochs that are left out.
    assert found == {"a": [5, 7], "b": [3, 8], "c": [4, 6]}


def test_figures_by_hand():
    ours, other = bench_torch.rows_of({bench_torch.OURS: [1.0, 2.0, 4.0], "b": [4.0, 8.0, 4.0]}, 80)
    assert (ours["images_per_s"], ours["slower"]) == (40.0, 1.0)
    assert (other["images_per_s"], other["slower"], other["samples"]) == (20.0, 2.0, [4.0, 8.0, 4.0])


def test_the_process(fake, trainer, state):
    assert fake.version == "torch 0"
    ways = bench_torch.ways(trainer, state, fake)
    assert list(ways) == [bench_torch.OURS, *bench_torch.FORMS.values()]
    with pytest.raises(ValueError, match="an epoch had 8 images"):
        ways["PyTorch, with its loader"]()
    with pytest.raises(Failed, match="no such form"):
        ways["PyTorch, one fixed batch, no loader"]()
    with pytest.raises(ValueError, match="differ from ours by 1 of the largest"):
        bench_torch.check_logits(trainer, state, fake)


def test_a_diverged_net_is_not_timed():
    with pytest.raises(ValueError, match="the loss is nan"):
        bench_torch._check_loss("a loop", float("nan"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--net", "resnet18"), "only the VGGs"),
        (("--net", "vgg99"), "unknown net 'vgg99'"),
        (("--images", "0"), "images=0"),
        (("--workers", "-1"), "workers=-1"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    assert main(["bench", "torch", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_interpreter_without_torch(monkeypatch, capsys, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(Trainer, "init", drawn)
    assert main(["bench", "torch", "--net", "vgg11", "--width", "0.125", "--images", "4", "--batch-size", "4"]) == 2
    assert "no torch here" in capsys.readouterr().err


class FakeLoop:
    """In the place of the process: logits are ours, an epoch takes as long as is said here."""

    version = "torch 0"
    SECONDS = {"with its loader": 8.0, "one fixed batch": 4.0}

    def __init__(self, command):
        assert command[1:3] == ["-m", "experiments.bench.torch_loop"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, do, form):
        assert do == "epoch"
        return {"seconds": self.SECONDS[form.partition(",")[0]], "images": 4, "loss": 2.3}


def test_the_record_and_its_table(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_torch, "TorchLoop", FakeLoop)
    monkeypatch.setattr(bench_torch, "check_logits", lambda *_: 1e-6)
    monkeypatch.setattr(bench_torch, "_REST_S", 0)
    monkeypatch.setattr(Trainer, "init", drawn)
    monkeypatch.setattr(Trainer, "run_epoch", lambda _, state, *rest: (state, np.ones((1, 2), np.float32)))
    path = tmp_path / "bench" / "torch-vgg11.json"
    printed = bench_torch.run(net="vgg11", width=0.125, batch_size=4, images=4, rounds=3, workers=2, out=path)
    record = read_json(path)
    assert [row["name"] for row in record["results"]] == [bench_torch.OURS, *bench_torch.FORMS.values()]
    assert record["torch"]["workers"] == 2 and record["net"]["convolution"] == "dense_conv"
    ours, loader, *_ = record["results"]
    assert loader["images_per_s"] == 0.5 and len(loader["samples"]) == 3
    assert loader["slower"] == pytest.approx(8 / np.median(ours["samples"]))
    for form, images_per_s in (("with its loader", "0.5"), ("one fixed batch", "1.0")):
        line = next(line for line in printed.splitlines() if line.startswith(f"| {bench_torch.FORMS[form]} "))
        assert line.split(" | ")[1].strip() == images_per_s
    document = benchmarks.generate(tmp_path)
    assert printed in document and f"`{record['command']}`" in document and "torch: not measured" not in document


def test_what_is_not_measured_is_said(tmp_path):
    assert "## torch" in benchmarks.generate(tmp_path)
    assert "not measured" in benchmarks.generate(tmp_path).partition("## torch")[2].partition("##")[0]


@pytest.fixture
def torch_loop():
    pytest.importorskip("torch", reason="torch does not work here", exc_type=ImportError)
    from experiments.bench import torch_loop

    return torch_loop


@with_torch
def test_both_nets_compute_the_same(torch_loop, trainer, state, folder):
    served = torch_loop.Served(folder)
    served.ask = lambda do, **details: getattr(served, do)(**details)
    assert bench_torch.check_logits(trainer, state, served) < 1e-5
    params = state.params | {"Conv_1": {"kernel": -state.params["Conv_1"]["kernel"]}}
    with pytest.raises(ValueError, match="differ from ours"):
        bench_torch.check_logits(trainer, state._replace(params=params), served)
    with pytest.raises(ValueError, match="no place for.*Conv_9"):
        torch_loop.VGG(served.job["net"]).load({**served.arrays, "params/Conv_9/kernel": np.zeros(1)})


@with_torch
def test_images_are_cropped_and_flipped(torch_loop, trainer, folder):
    served = torch_loop.Served(folder)
    padded = np.pad(served.images.images[3], ((4, 4), (4, 4), (0, 0)))
    places = {(top, left): padded[top : top + 32, left : left + 32] for top in range(9) for left in range(9)}
    found = set()
    for _ in range(20):
        tensor, label = served.images[3]
        pixels = np.rint((tensor.permute(1, 2, 0).numpy() * 0.25 + 0.5) * 255).astype(np.uint8)
        found |= {
            (*place, flip)
            for place, crop in places.items()
            for flip in (1, -1)
            if np.array_equal(crop[:, ::flip], pixels)
        }
        assert label == served.images.labels[3] and tensor.is_contiguous()
    assert 10 < len(found) <= 20 and {flip for *_, flip in found} == {1, -1}


@with_torch
def test_forms_train(torch_loop, folder):
    served = torch_loop.Served(folder)
    for form in served.FORMS:
        first, second = served.epoch(form), served.epoch(form)
        assert first["images"] == second["images"] == 12 and first["loss"] != second["loss"]
    assert set(served.FORMS) == set(bench_torch.FORMS)


@with_torch
@pytest.mark.slow
def test_two_updates_are_alike(torch_loop, trainer, tmp_path):
    """Momentum, weight decay and the gradients through BatchNorm; running variances count otherwise there."""
    config = dataclasses.replace(trainer.config, dropout=0.0, crop_padding=0, flip=False, batch_size=12)
    ours = Trainer(config, trainer.dataset)
    state = jax.device_put(drawn(ours, 0))
    bench_torch.hand_over(ours, state, tmp_path, threads=1, workers=0)
    served = torch_loop.Served(tmp_path)
    before = jax.device_get(state.params)
    loop = torch_loop.Loop(served.job, served.arrays, served.images, loader=False)
    for epoch in range(2):
        state, metrics = ours.run_epoch(state, epoch, 0)
        assert loop.epoch()["loss"] == pytest.approx(metrics[0, 0], rel=1e-4)
    parts = (*loop.net.features, *loop.net.classifier)
    kernels = [part.weight.detach().numpy() for part in parts if getattr(part, "weight", np.ones(1)).ndim > 1]
    for index, name in enumerate([*(f"Conv_{index}" for index in range(8)), *(f"Dense_{index}" for index in range(3))]):
        axes = (2, 3, 1, 0) if kernels[index].ndim == 4 else (1, 0)
        was, now = (np.asarray(params[name]["kernel"]) for params in (before, state.params))
        np.testing.assert_allclose(kernels[index].transpose(axes) - was, now - was, atol=1e-3 * np.abs(now - was).max())


@with_torch
@pytest.mark.slow
def test_for_real(tmp_path):
    path = tmp_path / "record.json"
    bench_torch.run(net="vgg11", width=0.125, batch_size=8, images=20, rounds=1, workers=1, out=path)
    rows = read_json(path)["results"]
    assert len(rows) == 5 and all(row["images_per_s"] > 0 for row in rows)
