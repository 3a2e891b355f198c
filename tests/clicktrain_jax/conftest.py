"""Loads this folder's two helper modules by path: under importlib mode a test folder is on no import path."""

import importlib.util
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent


def _load(name):
    spec = importlib.util.spec_from_file_location(f"clicktrain_jax_tests_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracle():
    """`oracle.py`: the method once more, in plain numpy loops."""
    return _load("oracle")


@pytest.fixture(scope="session")
def toy():
    """`toy.py`: a small problem without convolutions, and loops over it."""
    return _load("toy")
