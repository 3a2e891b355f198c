"""The training loop's epochs never wait for the host, in few kernels that move few bytes beside the convolutions."""

import importlib.util
import json
import pathlib

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flax") is None or importlib.util.find_spec("optax") is None,
    reason="the training loop needs flax and optax; `make test-gpu-compile` makes an environment that has them",
)
RECORD = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "gpu" / "epoch-programs.json"
# (kind, batch): kernels at most; bytes beside the convolutions as a share of what they were, at most.
BOUNDS = {("dense", 128): (133, 0.70), ("pruned", 128): (149, 0.53)}


@pytest.mark.parametrize(("kind", "batch"), BOUNDS, ids=str)
def test_an_epoch(kind, batch, h200, epochs):
    from tests.program_counts import epoch_loop

    loop = epoch_loop(epochs.compiled(h200, kind, batch))
    kernels, share = BOUNDS[kind, batch]
    before = json.loads(RECORD.read_text())["before"][f"{kind}-{batch}"]
    assert loop.trip_count == -(-epochs.IMAGES // batch)
    assert loop.conditionals == loop.inner_loops == 0
    assert len(loop.kernels) <= kernels
    assert loop.bytes_beside_convolutions <= share * before["bytes_beside_convolutions"]
    # Of ten layers all but the first have three; two weight gradients are products of matrices where all is dense, and
    # nine have a second kernel that adds their parts where they run by pattern.
    assert sum(kernel.is_convolution for kernel in loop.kernels) == {"dense": 27, "pruned": 38}[kind]
