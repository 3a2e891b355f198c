"""Everything here is for `make test-gpu` on a machine with a GPU; without one it runs in small, to test the tests."""

import pathlib

import jax
import pytest

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def small():
    """Whether this is a trial without a GPU."""
    return jax.default_backend() != "gpu"


@pytest.fixture(scope="module", autouse=True)
def _a_trial_is_quick(small, request):
    if small:
        request.getfixturevalue("quick")
