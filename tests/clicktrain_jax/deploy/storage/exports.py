"""Small nets and exports of them, for the tests of this folder."""

import numpy as np

import clicktrain_jax as ct


def variables(seed=0, cin=8, cout=16):
    """A tree as linen makes it: two 3x3 convolutions, a 1x1 one, BatchNorm, a classifier, a step counter."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "params": {
            "Conv_0": {"kernel": normal(3, 3, 3, cin)},
            "Conv_1": {"kernel": normal(3, 3, cin, cout), "bias": normal(cout)},
            "Conv_2": {"kernel": normal(1, 1, cout, 8)},
            "BatchNorm_0": {"scale": normal(cin), "bias": normal(cin)},
            "Dense_0": {"kernel": normal(8, 10), "bias": normal(10)},
        },
        "batch_stats": {"BatchNorm_0": {"mean": normal(cin), "var": normal(cin) ** 2}},
        "step": np.int32(7),
    }


def masks(tree, seed=0, removed=0.5):
    """Masks in the paper's form of the last two convolutions below ``params``."""
    rng = np.random.default_rng(seed)
    patterns = np.asarray(ct.patterns.fixed_set(4))
    pattern, kernel = ({layer: dict.fromkeys(leaves) for layer, leaves in tree["params"].items()} for _ in range(2))
    for layer in ("Conv_1", "Conv_2"):
        shape = tree["params"][layer]["kernel"].shape
        stays = rng.random(shape[2:]) >= removed
        kernel[layer]["kernel"] = np.broadcast_to(stays, shape)
        if shape[0] == 3:
            ids = rng.integers(0, 4, shape[2:])
            pattern[layer]["kernel"] = np.moveaxis(patterns[ids], (2, 3), (0, 1))
    return ct.Masks(pattern, kernel)
