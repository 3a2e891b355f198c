"""The picture of a pattern set: its figures by hand, and that any kind of run can be drawn."""

import numpy as np
import pytest

from clicktrain_jax import patterns
from experiments.report import pattern_sheet

A, B, C = "110/110/000", "011/011/000", "000/011/011"


def summary(*counts):
    layers = [{"name": f"Conv_{index}/kernel", "pattern_counts": each} for index, each in enumerate(counts)]
    return {"name": "slim", "seed": 3, "layers": layers}


def test_usage_by_hand():
    used = pattern_sheet.usage(summary(None, {A: 1, B: 3}, {B: 0, C: 4}, {A: 0, B: 0}))
    assert used.layers == ["Conv_1", "Conv_2", "Conv_3"]
    assert used.patterns == [C, B, A]
    np.testing.assert_array_equal(used.shares, [[np.nan, 0.75, 0.25], [1, 0, np.nan], [np.nan, 0, 0]])
    np.testing.assert_array_equal(used.totals, [4 / 8, 3 / 8, 1 / 8])


def test_many_patterns_end_in_one_column():
    texts = [patterns.to_text(pattern) for pattern in patterns.candidates((3, 3), 4)]
    used = pattern_sheet.usage(summary({text: 126 - rank for rank, text in enumerate(texts)}, {texts[0]: 5}))
    assert used.patterns[:-1] == texts[: len(used.patterns) - 1]
    assert used.patterns[-1] == f"{126 - len(used.patterns) + 1} others"
    np.testing.assert_allclose(np.nansum(used.shares, axis=1), 1)
    assert used.shares[1, 0] == 1 and used.totals.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "counts",
    [
        ({A: 5},),
        (None, {A: 1, B: 3}, {B: 0, C: 4, "10000/01000/00100/00010/00000": 1}),
        ({patterns.to_text(each): 3 for each in patterns.candidates((3, 3), 4)}, {A: 0}),
    ],
)
def test_a_picture_is_drawn(tmp_path, counts):
    import matplotlib.image

    pattern_sheet.draw(summary(*counts), tmp_path / "sheet.png")
    picture = matplotlib.image.imread(tmp_path / "sheet.png")
    colours = np.unique((255 * picture[..., :3]).round().astype(int).reshape(-1, 3), axis=0).tolist()
    # Taps that are kept, and taps that are not.
    assert [0x1F, 0x6F, 0xB4] in colours and [0xE4, 0xE4, 0xE4] in colours


def test_a_dense_run_has_no_sheet(tmp_path):
    with pytest.raises(ValueError, match="slim: no layer of this run has patterns"):
        pattern_sheet.draw(summary(None, None), tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())
