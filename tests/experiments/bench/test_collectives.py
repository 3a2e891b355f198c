import pytest

from experiments.bench import collectives
from experiments.report.exports import collectives_table


def test_reductions_are_read_from_a_program():
    text = """
  %a = f32[12,3]{1,0} all-reduce(%x), channel_id=1
  %b = (f32[5]{0}, bf16[2,2]{1,0}) all-reduce-start(%y, %z), channel_id=2
  %c = f32[100]{0} add(%p, %q)
"""
    assert collectives.reduced(text) == (4 * 36 + 4 * 5 + 2 * 4, 2)
    with pytest.raises(ValueError, match="all-reduce of s32"):
        collectives.reduced("%a = s32[] all-reduce(%x)")


def test_one_device_sends_nothing():
    with pytest.raises(ValueError, match="one device sends nothing"):
        collectives.measure([])


def test_the_table_says_what_is_in_the_record():
    row = {
        "name": "vgg13-cifar10-9.0x",
        "net": "vgg13",
        "convolutions": {"dense": 90_000_000, "compact": 10_000_000},
        "float32": {"dense": 92_000_000, "compact": 12_000_000},
    }
    setting = {"versions": {"jax": "0.12.0"}, "date": "2026-11-27T10:00:00"}
    text = collectives_table({"setting": setting, "devices": 2, "rows": [row]})
    line = text.splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [row["name"], "92.00", "12.00", "7.67x", "9.00x"]
