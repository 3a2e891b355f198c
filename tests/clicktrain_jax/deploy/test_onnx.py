"""ONNX: calls that the converter knows compute the same; the model, where jax2onnx and onnxruntime are installed."""

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax import lax

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.deploy import onnx
from clicktrain_jax.deploy.channels_first import channels_first
from clicktrain_jax.deploy.fold import fold
from clicktrain_jax.deploy.tracing import flattened

missing = [name for name in ("jax2onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
converting = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
# Of other projects.
quiet = pytest.mark.filterwarnings("ignore")


def folded_net(name, width=0.125):
    model = models.build(name, num_classes=10, width=width)
    shape = models.default_image_shape(name)

    def apply(variables, pixels):
        return model.apply(variables, (pixels - 0.4) / 0.25, train=False)

    return fold(apply, drawn(model, shape), shape)


def pooling(variables, images):
    """Padded max pooling, padded sums, every second pixel, padded channels: what residual nets have."""
    x = lax.conv_general_dilated(
        images, variables["kernel"], (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jax.nn.relu(lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding) - 0.5)
    x = x + lax.reduce_window(x, 0.0, lax.add, window, (1, 1, 1, 1), padding)
    x = jnp.pad(lax.slice(x, (0, 0, 0, 0), x.shape, (1, 2, 2, 1)), ((0, 0), (0, 0), (0, 0), (1, 2)))
    return jnp.maximum(x, 0.1).mean(axis=(1, 2))


@pytest.fixture(scope="module")
def pooled():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 5)).astype(np.float32)
    return fold(pooling, {"kernel": kernel}, (16, 16, 3))


def said_in_known_calls(folded, batch=2):
    images = np.random.default_rng(1).random((batch, *folded.image_shape), np.float32)
    closed, _ = flattened(channels_first(folded.function, folded.arrays), images)
    return lambda images: onnx._in_known_calls(closed, images), jnp.asarray(images)


def test_known_calls_compute_the_same(pooled):
    function, images = said_in_known_calls(pooled)
    np.testing.assert_allclose(function(images), pooled.function(pooled.arrays, images), atol=1e-5)
    names = [equation.primitive.name for equation in jax.make_jaxpr(function)(images).jaxpr.eqns]
    # The slice is a maximum over windows of one pixel; ReLU alone is a call of its own, another maximum is not.
    assert "slice" not in names and names.count("reduce_window_max") == 2
    assert names.count("max") == 1 and names.count("custom_jvp_call") == 1


def test_what_has_no_known_call_stands_as_it_is():
    def function(variables, images):
        x = lax.conv_general_dilated(
            images, variables["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = lax.pad(x, jnp.float32(0), ((0, 0, 0), (0, 0, 1), (-1, 0, 0), (0, 0, 0)))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 2), (1, 1, 1, 1), "VALID")
        return x[:, 1::2].sum(axis=(1, 2))

    folded = fold(function, {"kernel": np.ones((3, 3, 3, 4), np.float32)}, (8, 8, 3))
    said, images = said_in_known_calls(folded)
    np.testing.assert_allclose(said(images), folded.function(folded.arrays, images), rtol=1e-6)
    names = [equation.primitive.name for equation in jax.make_jaxpr(said)(images).jaxpr.eqns]
    assert {"pad", "reduce_window_max", "slice"} <= set(names)


def test_without_the_converter(pooled, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ValueError, match=r"clicktrain-jax\[onnx\]"):
        onnx.to_onnx(pooled, (16, 16, 3))


@pytest.mark.parametrize(("opset", "said"), [(None, {}), (19, {"opset": 19})])
def test_the_version_of_the_operators(opset, said, monkeypatch, tmp_path):
    """A converter in the place of jax2onnx, which is handed the version and gives a model of it."""
    asked = []

    class Model:
        def SerializeToString(self):
            return b"a model"

    def to_onnx(function, images, **options):
        asked.append(options)
        return Model()

    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=to_onnx))
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 5)).astype(np.float32)
    settings = {"image_shape": (16, 16, 3), "stablehlo": False}
    ct.export(tmp_path / "net", pooling, {"kernel": kernel}, None, onnx=True, opset=opset, **settings)
    assert asked == [{"input_names": ["images"], "output_names": ["logits"], **said}]
    assert (tmp_path / "net" / "net.onnx").read_bytes() == b"a model"
    for bad in ({"onnx": True, "opset": "latest"}, {"onnx": True, "opset": 0}, {"opset": 17}):
        with pytest.raises(ValueError, match="opset=.*expected a version of ONNX's operators"):
            ct.export(tmp_path / "net", pooling, {"kernel": kernel}, None, **bad, **settings)


@quiet
@converting
def test_what_it_cannot_convert(pooled, monkeypatch):
    import jax2onnx

    def refuse(*args, **kwargs):
        raise NotImplementedError("no such operation")

    monkeypatch.setattr(jax2onnx, "to_onnx", refuse)
    with pytest.raises(ValueError, match="NotImplementedError: no such operation"):
        onnx.to_onnx(pooled, (16, 16, 3))


@quiet
@converting
@pytest.mark.parametrize("name", ["pooling", "small", "vgg11", "resnet18", "resnet32"])
def test_logits_and_graph(name, pooled):
    import onnx as package
    import onnxruntime

    folded = pooled if name == "pooling" else folded_net(name)
    data = onnx.to_onnx(folded, folded.image_shape)
    graph = package.load_model_from_string(data).graph
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, result.name) == (onnx.INPUT, onnx.OUTPUT)
    assert given.shape == ["batch", *folded.image_shape]
    for batch in (1, 3):
        images = np.random.default_rng(batch).random((batch, *folded.image_shape), np.float32)
        (logits,) = session.run(None, {onnx.INPUT: images})
        np.testing.assert_allclose(logits, folded.function(folded.arrays, images), atol=1e-4)
    # Clean: the images' transpose and a classifier's, pooling over the image alone, kernels as they are wanted.
    kinds = [node.op_type for node in graph.node]
    if name == "resnet32":
        return  # every n-th pixel of a symbolic batch is no plain slice: right, but gathered, with transposes around
    assert kinds.count("Transpose") <= 2 and "GatherND" not in kinds
    assert kinds.count("Max") == (name == "pooling")  # the one that is no ReLU
    pools = [node for node in graph.node if node.op_type in ("MaxPool", "AveragePool")]
    assert all(len(attribute.ints) <= 2 for node in pools for attribute in node.attribute)
    assert len(data) < 1.1 * sum(array.nbytes for array in folded.arrays.values()) + 20_000
