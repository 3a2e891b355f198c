import importlib.util
import sys
from pathlib import Path

import pytest

# Under --import-mode=importlib a test cannot import its neighbours by name: load the shared module once, here.
_PATH = Path(__file__).parent / "tiny.py"
_SPEC = importlib.util.spec_from_file_location("tiny", _PATH)
_TINY = importlib.util.module_from_spec(_SPEC)
sys.modules["tiny"] = _TINY
_SPEC.loader.exec_module(_TINY)


@pytest.fixture(scope="session")
def tiny_dataset():
    from experiments.data import load

    return load(_TINY.CONFIG.data)


@pytest.fixture(scope="session")
def tiny_trainer(tiny_dataset):
    """Its programs are compiled once for the whole session."""
    from experiments.train.step import Trainer

    return Trainer(_TINY.CONFIG, tiny_dataset)
