"""Skips this folder's tests, with the reason, where nothing here compiles for an H200; loads the helpers by path."""

import importlib.util
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).parent


def _load(name):
    spec = importlib.util.spec_from_file_location(f"gpu_compile_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def h200():
    """`h200.py`: compile for an H200; nothing is kept from before, as what the compiler writes on the way is read."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield _load("h200")
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def matmul():
    """`matmul.py`: a small kernel that the harness is tried on."""
    return _load("matmul")


@pytest.fixture(scope="session")
def epochs():
    """`epochs.py`: the training loop's programs."""
    return _load("epochs")


def pytest_collection_modifyitems(items):
    mine = [item for item in items if HERE in item.path.parents]
    reason = _load("toolchain").why_not() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu_compile)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
