"""README's table and picture: from the records, and honest where there are none."""

import json

import pytest

from experiments.report import readme


def engine(seconds):
    return {"forms": {}, "refused": {}, "form": "f", "median_s": seconds}


def write_export(folder, name, tile, ours, cores=2, **dense):
    record = {
        "quick": False,
        "tile": tile,
        "net": {"net": {"name": name, "width": 1.0}},
        "setting": {"device": {"platform": "cpu"}, "cpu": {"cores": cores}},
        "batches": {"1": {"this net": engine(ours), **{f"dense ({key})": engine(one) for key, one in dense.items()}}},
    }
    folder.mkdir(exist_ok=True)
    (folder / f"bench-{name}-{cores}-{tile}.json").write_text(json.dumps(record))


def test_without_records_it_says_so(tmp_path):
    lines = readme.status(tmp_path).splitlines()[2:]
    assert len(lines) == 9
    assert all("**not measured**" in line for line in lines if "your own loop" not in line)
    readme.draw(tmp_path / "picture.png", tmp_path)
    assert not (tmp_path / "picture.png").exists()


def test_the_fastest_dense_engine_counts_and_one_core_does_not(tmp_path):
    write_export(tmp_path / "deploy", "vgg13", [32, 1], 1.0, XLA=9.0, PyTorch=2.5)
    write_export(tmp_path / "deploy", "vgg13", [32, 1], 1.0, cores=1, XLA=99.0)
    assert "| **in tiles of 32 2.5 times**" in readme.status(tmp_path) and "C file" not in readme.status(tmp_path)
    readme.draw(tmp_path / "pictures" / "speed.png", tmp_path)
    assert (tmp_path / "pictures" / "speed.png").stat().st_size > 1000


def test_the_same_net_in_c_is_told_beside_it_and_is_no_dense_engine(tmp_path):
    write_export(tmp_path / "deploy", "vgg13", [1, 1], 1.0, XLA=3.0)
    path = next((tmp_path / "deploy").iterdir())
    record = json.loads(path.read_text())
    record["batches"]["1"][readme.deploy.IN_C] = engine(0.75)
    path.write_text(json.dumps(record))
    found = readme.status(tmp_path)
    assert "| **kernel by kernel 3.0 times**" in found and "as one C file: kernel by kernel 4.0 times" in found


def test_cards_are_not_mixed(tmp_path):
    (tmp_path / "gpu").mkdir()
    for kind, dense_ms in (("NVIDIA H100 80GB HBM3", 2.0), ("NVIDIA H200", 8.0)):
        ways = {"dense": dense_ms, "ours": 2.0}
        steps = [{"net": "vgg13", "batch": 128, "way": way, "ms": ms} for way, ms in ways.items()]
        record = {"ok": True, "smoke": False, "steps": steps, "setting": {"device": {"kind": kind}}}
        (tmp_path / "gpu" / f"steps-{dense_ms:g}.json").write_text(json.dumps(record))
    found = readme.status(tmp_path)
    assert "1.00 times on an H100 and 4.00 times on an H200" in found


@pytest.mark.parametrize(
    ("gaps", "answer"),
    [
        ([], "not measured"),
        (["+0.20 ± 0.30 (within the spread)"], "no difference seen"),
        (["+2.76 ± 0.10", "-0.10 ± 0.22 (within the spread)"], "yes"),
        (["+2.8 (one seed)", "-0.10 ± 0.22 (within the spread)"], "yes (one seed)"),
        (["+2.8 (one seed)", "+0.90 ± 0.22"], "yes"),
        (["+0.0 (one seed)"], "no difference seen"),
        (["-1.20 ± 0.22"], "no"),
        (["-1.20 ± 0.22", "+2.76"], "it depends"),
    ],
)
def test_a_verdict_counts_what_is_clear(gaps, answer):
    assert readme._verdict(gaps) == answer


def test_what_stands_around_the_table_stays():
    assert readme.generate(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n").startswith(
        f"before\n{readme.BEGIN}\n| "
    )
    text = readme.README.read_text()
    assert readme.generate(text) == text
    with pytest.raises(ValueError, match="expected <!-- written"):
        readme.generate("no marks")
