"""The images of every example: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn."""

import argparse

import numpy as np
from sklearn.datasets import load_digits

BATCH = 32


def load():
    """Images float32 (N, 8, 8, 1) in [0, 1] and labels int32 (N,), for training and for testing."""
    found = load_digits()
    images = (found.images[..., None] / 16).astype(np.float32)
    labels = found.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1408], order[1408:]
    return (images[train], labels[train]), (images[test], labels[test])


def batches(images, labels, epochs):
    """Batches of 32 in a new order each epoch."""
    rng = np.random.default_rng(1)
    for _ in range(epochs):
        order = rng.permutation(len(labels))
        for first in range(0, len(labels) - BATCH + 1, BATCH):
            chosen = order[first : first + BATCH]
            yield images[chosen], labels[chosen]


def steps(labels, epochs):
    """How many batches that is."""
    return epochs * (len(labels) // BATCH)


def asked_epochs(what, default=8):
    """``--epochs N`` of the command line."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--epochs", type=int, default=default)
    return parser.parse_args().epochs
