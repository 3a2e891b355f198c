"""What all tests of the comparison's tables read."""

import pytest

from experiments.report import comparison_records as studies
from tests.experiments.report.made_study import CELLS, write


@pytest.fixture
def make_study(tmp_path):
    """Writes a whole study, or one of some cells, and returns its folder."""

    def make(cells=tuple(CELLS), *, latency=True, name="compare-made"):
        return write(tmp_path / name, cells, latency)

    return make


@pytest.fixture
def study(make_study):
    return studies.read(make_study())
