"""Writes states_of_an_old_jax.npz, by the oldest Python and jax that are supported: what newer ones must go on with.

PYTHONPATH=. python tests/clicktrain_jax/make_old_states.py
"""

import pathlib
import pickle
import sys

import flax.serialization
import jax
import numpy as np
import optax
import toy

import clicktrain_jax as ct

FILE = pathlib.Path(__file__).with_name("states_of_an_old_jax.npz")
STEPS = (1, 4, 7)  # in the middle of each phase


def transformation():
    """One that keeps scores, over two updates."""
    return ct.clicktrain(optax.adam(0.01), toy.plan(), **toy.SCHEDULE, importance_steps=2)


if __name__ == "__main__":
    history = toy.run(transformation())
    made = {"versions": np.array([sys.version.split()[0], jax.__version__])}
    for step in STEPS:
        pair = history.params[step], history.states[step]
        for name, data in {"pickle": pickle.dumps(pair), "msgpack": flax.serialization.to_bytes(pair)}.items():
            made[f"{name} {step}"] = np.frombuffer(data, np.uint8)
    made |= {f"end {name}": leaf for name, leaf in ct.trees.named_leaves(history.params[-1])}
    np.savez_compressed(FILE, **made)
