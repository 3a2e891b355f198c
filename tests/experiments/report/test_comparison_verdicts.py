"""The comparison's verdicts, claim by claim, from a whole study made up by hand."""

import json

import pytest

from experiments.records import RUNS, keep
from experiments.report import claims, comparison
from experiments.report import comparison_records as studies
from tests.experiments.report.made_study import CELLS, record_of, summary_of, wide


def test_time_against_dense(study):
    goal, limit = claims.against_dense(study).claims
    assert goal.verdict == claims.HOLDS and "0.80 (n=2; 8x, early; training alone 0.78)" in goal.text
    assert limit.verdict == claims.HOLDS and "3 of 3 cells; the most is 0.86" in limit.text


@pytest.mark.parametrize(
    ("seconds", "verdicts"),
    [(80.0, [claims.FAILS, claims.HOLDS]), (94.0, [claims.FAILS, claims.HOLDS]), (96.0, [claims.FAILS, claims.FAILS])],
)
def test_time_against_dense_at_the_limits(make_study, monkeypatch, seconds, verdicts):
    monkeypatch.setitem(CELLS, "early-8x", (*CELLS["early-8x"][:6], seconds, 2.0))
    found = claims.against_dense(studies.read(make_study(("dense", "early-8x")))).claims
    assert [claim.verdict for claim in found] == verdicts


def test_pat_is_read_at_the_smallest_budget_that_is_near_enough(study):
    part = claims.against_pat(study)
    # 200 s reach 78 - 0.3 points within 0.2, 160 s are 0.5 below: 200 / 80. The ADMM cell is compressed far more.
    [row] = part.rows
    assert row[0] == "8x, early" and row[1] == "3" and row[3] == claims.HOLDS
    assert row[2] == "-2.00 at 1.50, -0.50 at 2.00, -0.20 at 2.50"
    assert row[4] == "2.50"
    # Two thirds of the way from 2 to 2.5, in logarithms: 2 * 1.25 ** (2 / 3).
    assert row[5] == "2.32"
    assert part.claims[0].verdict == claims.HOLDS and "2.50 (8x, early)" in part.claims[0].text


def test_pat_whose_smallest_budget_is_enough_bounds_the_ratio_from_above(make_study):
    part = claims.against_pat(studies.read(make_study(("dense", "early-8x", "rewind-8"))))
    assert part.rows[0][4] == "at most 2.50" and part.rows[0][5] == ""
    assert part.claims[0].verdict == claims.UNTOLD  # a smaller budget might do


def test_pat_that_never_comes_near_is_said(make_study):
    part = claims.against_pat(studies.read(make_study(("dense", "early-8x", "rewind-2", "rewind-4"))))
    assert "not reached within 2.00 (8x, early)" in part.claims[0].text
    assert part.claims[0].verdict == claims.UNTOLD and part.rows[0][5] == ""


def test_pdt_is_read_at_like_compression_and_at_like_accuracy(study):
    part = claims.against_pdt(study)
    gradual, two_of_four = part.rows
    # 800,000 / 141,421 is halfway between 4x and 8x: 78.5 + 2 seed, less 77 + 2 seed; (86 + 80) / 2 s against 88 s.
    assert gradual[:5] == ("5.7x, gradual", "ClickTrain, early", "5.66x", "+1.50", "1.06")
    # Its 78 on average is a third of the way from 79 at 8x to 76 at 16x: 8 * 2 ** (1 / 3) = 10.08, over 5.657.
    assert gradual[5] == "1.78" and gradual[6] == "1.08"
    # 2x is no compression of ClickTrain's. Its accuracy, 82 on average, ClickTrain has nowhere: less than 4x, over 2x,
    # which says nothing about more or less than 1.
    assert two_of_four[3] == claims.OUTSIDE and two_of_four[5] == "less than 2.00 (outside the measured range)"
    assert [claim.verdict for claim in part.claims] == [claims.HOLDS, claims.HOLDS]


@pytest.mark.parametrize(
    ("top1", "seconds", "verdict"),
    [
        (77.0, 78.0, claims.HOLDS),
        (77.0, 150.0, claims.HOLDS),
        (77.0, 40.0, claims.UNTOLD),
        (78.9, 78.0, claims.FAILS),
        (78.9, 40.0, claims.FAILS),
        (78.9, 150.0, claims.UNTOLD),
    ],
)
def test_unequal_time_gives_a_verdict_only_where_it_speaks_against_it(make_study, monkeypatch, top1, seconds, verdict):
    monkeypatch.setitem(CELLS, "gradual", (*CELLS["gradual"][:5], top1, seconds, None))
    part = claims.against_pdt(studies.read(make_study(("dense", "early-4x", "early-8x", "gradual"))))
    assert part.claims[0].verdict == verdict
    assert ("not like" in part.rows[0][4]) == (seconds != 78.0)


@pytest.mark.parametrize(
    ("top1", "text", "verdict"),
    [
        (70.0, "more than 2.83 (outside the measured range)", claims.HOLDS),
        (79.9, "less than 0.71 (outside the measured range)", claims.FAILS),
    ],
)
def test_a_bound_is_enough_for_a_verdict(make_study, monkeypatch, top1, text, verdict):
    """16x and better, or 4x and worse, than a PDT cell of 5.657x at every compression."""
    monkeypatch.setitem(CELLS, "gradual", (*CELLS["gradual"][:5], top1, 78.0, None))
    part = claims.against_pdt(studies.read(make_study(("dense", "early-4x", "early-16x", "gradual"))))
    assert part.rows[0][5] == text and part.claims[1].verdict == verdict


def test_a_dip_that_a_higher_compression_makes_good_is_none(make_study, monkeypatch):
    # 76 at 8x, but 78.5 at 16x: what is that accurate at 16x beats gradual's 77 wherever it is read.
    for name, top1 in (("early-4x", 80.0), ("early-8x", 76.0), ("early-16x", 78.5)):
        monkeypatch.setitem(CELLS, name, (*CELLS[name][:5], top1, *CELLS[name][6:]))
    monkeypatch.setitem(CELLS, "gradual", (*CELLS["gradual"][:5], 77.0, 78.0, None))
    part = claims.against_pdt(studies.read(make_study(("dense", "early-4x", "early-8x", "early-16x", "gradual"))))
    assert part.rows[0][5].startswith("more than 2.83")  # 16 / 5.657


def test_narrow_nets_are_read_at_equal_latency(study):
    part = claims.against_narrow(study)
    rows = {row[0]: row[1:] for row in part.rows}
    # 2 ms is width 0.5's: 78 - 76. sqrt(8) ms is halfway between it and dense's 4 ms: 79 - 78.
    assert rows["8x, early"][0] == "+2.00" and rows["4x, early"][0] == "+1.00"
    assert rows["16x, early"][:2] == (claims.OUTSIDE, claims.UNKNOWN)
    # Equal multiply-adds: width 0.5 again; equal weights: width 0.35, 78 - 72. 50,000 weights no narrow net has.
    assert rows["8x, early"][2:] == ("+2.00", "+6.00") and rows["16x, early"][3] == claims.OUTSIDE
    assert [claim.verdict for claim in part.claims] == [claims.HOLDS, claims.HOLDS]
    said = "+1.00 to +2.00 points; true of 2 of 2 cells, 1 cannot be told (1 outside the measured range"
    assert said in part.claims[0].text


def test_a_claim_that_does_not_hold_says_so(make_study, monkeypatch):
    monkeypatch.setitem(CELLS, "narrow-0.5", (*CELLS["narrow-0.5"][:5], 78.5, 40.0, 2.0))
    study = studies.read(make_study(("dense", "early-8x", "narrow-0.5", "narrow-0.35")))
    assert claims.against_narrow(study).claims[0].verdict == claims.FAILS
    assert "- **does not hold**: ClickTrain is more accurate than a narrower" in comparison.generate(study)


def test_without_latencies_or_other_methods_nothing_is_claimed(make_study):
    study = studies.read(make_study(("dense", "early-8x"), latency=False))
    verdicts = [claim.verdict for part in claims.parts(study)[1:] for claim in part.claims]
    assert set(verdicts) == {claims.UNKNOWN}
    rows = wide(study)
    assert rows["8x, early"]["ms, N=1"] == "not measured" and rows["8x, early"]["of dense"] == "0.80"


def test_a_spread_larger_than_the_difference_is_said(make_study):
    folder = make_study(("dense", "early-8x", "narrow-0.5", "narrow-0.35"))
    summary = summary_of("narrow-0.5", 1) | {"final_top1": 0.815}
    assert keep(folder / RUNS, [record_of("narrow-0.5", 1, summary=summary)]) == 1
    part = claims.against_narrow(studies.read(folder))
    assert part.rows[0][1] == "+0.25 ± 2.47 (within the spread)"


def test_one_seed_tells_nothing_of_compression_or_budgets(make_study, monkeypatch):
    """What the other method's cell was run with counts, however many seeds ClickTrain's have."""
    monkeypatch.setitem(CELLS, "gradual", (*CELLS["gradual"][:5], 70.0, 78.0, None))
    folder = make_study(("dense", "early-4x", "early-16x", "gradual"))
    lines = (folder / RUNS).read_text().splitlines(keepends=True)
    (folder / RUNS).write_text("".join(line for line in lines if not _is(line, "gradual", 1)))
    part = claims.against_pdt(studies.read(folder))
    assert part.rows[0][5] == "more than 2.83 (outside the measured range) (one seed)"
    assert [claim.verdict for claim in part.claims] == [claims.UNTOLD, claims.UNTOLD]


def test_one_seed_tells_no_budget(make_study):
    folder = make_study(("dense", "early-8x", "rewind-2", "rewind-8"))
    lines = (folder / RUNS).read_text().splitlines(keepends=True)
    (folder / RUNS).write_text("".join(line for line in lines if not _is(line, "rewind-8", 1)))
    part = claims.against_pat(studies.read(folder))
    assert part.rows[0][4].endswith("(one seed)") and part.claims[0].verdict == claims.UNTOLD


def test_a_bound_within_the_spread_over_seeds_tells_nothing(make_study):
    folder = make_study(("dense", "early-4x", "early-16x", "gradual"))
    # 75 and 77 at 16x, on average above 71 and 80.
    for seed, top1 in ((0, 0.71), (1, 0.80)):
        keep(folder / RUNS, [record_of("gradual", seed, summary=summary_of("gradual", seed) | {"final_top1": top1})])
    part = claims.against_pdt(studies.read(folder))
    assert part.rows[0][5] == "more than 2.83 (outside the measured range) (within the spread)"
    assert part.claims[1].verdict == claims.UNTOLD


def _is(line, name, seed):
    record = json.loads(line)
    return (record["name"], record["seed"]) == (name, seed)
