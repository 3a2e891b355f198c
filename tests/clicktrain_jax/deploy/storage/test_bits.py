"""Packed numbers: bytes by hand, and round trips."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clicktrain_jax.deploy.storage.bits import pack, packed_bytes, unpack, width_of


@pytest.mark.parametrize(
    ("count", "width"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (2**17, 17)]
)
def test_widths(count, width):
    assert width_of(count) == width


def test_bytes_by_hand():
    # Planes, lowest bits first: 1 0 1 1, then 0 1 1 0.
    assert pack(np.array([1, 2, 3, 1], np.uint8), 2) == bytes([0b10110110])
    # Three numbers of three bits: 101 001 111 in columns, 7 bits of the second byte are 0.
    assert pack(np.array([5, 1, 4], np.uint16), 3) == bytes([0b11000010, 0b10000000])
    assert pack(np.array([True, False, True]), 1) == bytes([0b10100000])
    assert pack(np.zeros(100, np.uint8), 0) == b""


def test_what_follows_is_not_read():
    data = pack(np.array([5, 1, 4], np.uint32), 3)
    assert unpack(data + b"\xff\xff", 3, 3).tolist() == [5, 1, 4]


@pytest.mark.parametrize(("width", "dtype"), [(1, "uint8"), (8, "uint8"), (9, "uint16"), (17, "uint32"), (0, "uint8")])
def test_dtypes(width, dtype):
    assert unpack(bytes(100), width, 5).dtype == dtype


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), max_size=40))))
def test_round_trip(case):
    width, values = case
    data = pack(np.array(values, np.uint32), width)
    assert len(data) == packed_bytes(len(values), width)
    assert unpack(data, width, len(values)).tolist() == values
