"""Loads this folder's helper module by path: under importlib mode a test folder is on no import path."""

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope="session")
def exports():
    """`exports.py`: small nets and their masks."""
    path = pathlib.Path(__file__).parent / "exports.py"
    spec = importlib.util.spec_from_file_location("clicktrain_jax_tests_exports", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
