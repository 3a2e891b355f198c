"""From a mask to its structure and back: tiles, lists and pieces against plain loops, and what does not recompile."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels.pattern_conv import cases, make_structure, mask_of, pieces

small = pytest.mark.parametrize("case", cases.SMALL, ids=str)
more_examples = settings(max_examples=60, deadline=None, derandomize=True)


def mask_by_tiles(seed, window, cin, cout, tile, density):
    """A random mask that tiles of (filters, channels) share."""
    filters, channels = tile
    blocks = np.random.default_rng(seed).random((*window, -(-cin // channels), -(-cout // filters))) < density
    return np.repeat(np.repeat(blocks, channels, axis=2)[:, :, :cin], filters, axis=3)[..., :cout]


@st.composite
def masks(draw):
    """(mask, a tile that it is shared by)."""
    window = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2), (3, 2)]))
    cin, cout, filters, channels = (draw(st.integers(1, most)) for most in (11, 13, 6, 5))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    tile = (filters, channels)
    return mask_by_tiles(draw(st.integers(0, 2**16)), window, cin, cout, tile, density), tile


def holds(mask, axis, size):
    """Whether runs of so many along the axis are alike, plainly."""
    lines = np.moveaxis(mask, axis, 0)
    return all((lines[index] == lines[index - index % size]).all() for index in range(len(lines)))


def check_lists(structure, mask):
    """`pairs` and `pairs_by_channel` against a loop over tiles."""
    kh, kw, cin, cout = mask.shape
    filters, channels = structure.tile
    by_filter = [[] for _ in range(0, cout, filters)]
    by_channel = [[] for _ in range(0, cin, channels)]
    for block, tile in itertools.product(range(len(by_channel)), range(len(by_filter))):
        for row, column in itertools.product(range(kh), range(kw)):
            if mask[row, column, block * channels, tile * filters]:
                by_filter[tile].append((block * kh + row) * kw + column)
                by_channel[block].append((tile * kh + row) * kw + column)
    for lists, counts, wanted in (
        (structure.pairs, structure.pair_counts, by_filter),
        (structure.pairs_by_channel, structure.pair_counts_by_channel, by_channel),
    ):
        assert lists.dtype == counts.dtype == np.int32
        assert counts.tolist() == [len(line) for line in wanted]
        assert [line[:count].tolist() for line, count in zip(lists, counts)] == wanted
        assert not any(line[count:].any() for line, count in zip(lists, counts))


def check_pieces(structure, mask):
    """Every retained weight is read by exactly one piece, and no other weight by any; both views of a piece agree."""
    kh, kw, cin, cout = mask.shape
    read = np.zeros(mask.shape, int)
    for piece in structure.pieces:
        (high, wide), filters = piece.window, structure.tile[0]
        tiles = -(-cout // (filters * piece.merged))
        assert len(piece.rooms) == len(piece.channels) == tiles and piece.channels.shape[1] == max(piece.rooms)
        for tile in range(tiles):
            used = set()
            places = itertools.product(range(high), range(wide), range(max(piece.rooms)), range(piece.merged))
            for i, j, entry, member in places:
                if not piece.valid[tile, i * wide + j, entry, member]:
                    continue
                assert entry < piece.rooms[tile], "beyond the room that the program reads"
                used.add(entry)
                first = (tile * piece.merged + member) * filters
                assert first < cout, "a tile that does not exist"
                row, column = piece.rows[tile, entry] + i, piece.columns[tile, entry] + j
                assert 0 <= row < kh and 0 <= column < kw
                read[row, column, piece.channels[tile, entry], first : first + filters] += 1
            named = {}
            for order, channel in itertools.product(range(len(piece.entry_of)), range(cin)):
                entry = int(piece.entry_of[order, tile, channel])
                if entry < 0:
                    continue
                assert entry not in named
                named[entry] = (channel, piece.row_of[order, tile, channel], piece.column_of[order, tile, channel])
            assert used <= set(named)
            for entry, name in named.items():
                assert name == (piece.channels[tile, entry], piece.rows[tile, entry], piece.columns[tile, entry])
    np.testing.assert_array_equal(read, mask)


def check_all(mask, tile):
    structure = make_structure(mask, tile=tile)
    kh, kw, cin, cout = mask.shape
    filters, channels = tile
    expected = (min(cout if filters is None else filters, cout), min(cin if channels is None else channels, cin))
    assert structure.tile == expected and structure.shape == mask.shape and structure.num_taps == kh * kw
    assert structure.grid == structure.pattern_ids.shape == (-(-cin // expected[1]), -(-cout // expected[0]))
    assert structure.retained() == pytest.approx(mask.mean())
    found = {tuple(np.flatnonzero(taps).tolist()) for taps in mask.reshape(kh * kw, -1).T} - {()}
    assert structure.patterns == tuple(sorted(found))
    np.testing.assert_array_equal(mask_of(structure), mask)
    check_lists(structure, mask)
    check_pieces(structure, mask)
    # How many tiles are merged is an estimate's choice; any number must do.
    for merged in range(1, min(3, structure.grid[1]) + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "_best_merge", lambda *args, merged=merged: merged)
            made = make_structure(mask, tile=tile)
        assert {piece.merged for piece in made.pieces} <= {merged}
        check_pieces(made, mask)


@small
def test_lists_and_pieces_of_every_case(case):
    check_all(cases.make_mask(case, np.random.default_rng(0)), case.tile)


@more_examples
@given(drawn=masks())
def test_lists_and_pieces_of_any_mask(drawn):
    check_all(*drawn)


def test_layers_of_real_nets_have_lists_too():
    case = next(case for case in cases.PORTABLE if case.name == "tile64-n1-16x16-256")
    mask = cases.make_mask(case, np.random.default_rng(0))
    check_lists(make_structure(mask, tile=case.tile), mask)
    case = next(case for case in cases.GPU if case.name == "vgg16-n128-8x8-256-256-8x")
    mask = cases.make_mask(case, np.random.default_rng(0))
    check_lists(make_structure(mask, tile=case.tile), mask)


@more_examples
@given(drawn=masks())
def test_the_widest_tile_is_found(drawn):
    mask, _ = drawn
    tile = make_structure(mask).tile
    for size, axis in zip(tile, (3, 2)):
        assert size == max(size for size in range(1, mask.shape[axis] + 1) if holds(mask, axis, size))
    check_all(mask, tile)


def test_none_in_a_tile_stands_for_all_and_wider_than_all_is_all():
    mask = mask_by_tiles(0, (3, 3), 6, 10, (10, 2), 0.5)
    for tile in ((None, 2), (10, 2), (64, 2), (np.int64(10), np.int32(2))):
        assert make_structure(mask, tile=tile).tile == (10, 2)
    assert make_structure(np.ones((3, 3, 6, 10), bool), tile=(None, None)).tile == (10, 6)


def test_a_finer_tile_than_the_widest_may_be_given():
    mask = mask_by_tiles(1, (3, 3), 9, 12, (4, 3), 0.5)
    assert make_structure(mask).tile == (4, 3)
    for tile in ((1, 1), (2, 3), (4, 1)):
        check_all(mask, tile)


def test_the_mask_comes_back_from_traced_arrays():
    mask = mask_by_tiles(2, (3, 3), 7, 11, (4, 3), 0.3)
    structure = make_structure(mask)
    back = jax.jit(mask_of)(structure)
    assert isinstance(mask_of(structure), np.ndarray) and back.dtype == bool
    np.testing.assert_array_equal(back, mask)
    np.testing.assert_array_equal(mask_of(jax.tree.map(jnp.asarray, structure)), mask)


@pytest.mark.parametrize("tile", [(8, 3), (4, 6), (3, 3), (4, 2), (12, 3), (None, 3), (4, None)])
def test_a_tile_that_does_not_hold_is_refused_and_one_that_does_is_named(tile):
    mask = mask_by_tiles(1, (3, 3), 9, 12, (4, 3), 0.5)
    with pytest.raises(ValueError, match="is not shared by tiles of") as refused:
        make_structure(mask, tile=tile)
    message = str(refused.value)
    assert str(mask.shape) in message and f"tiles of {tile}" in message
    named = re.search(r"the largest tile that holds is \((\d+), (\d+)\)", message)
    check_all(mask, (int(named[1]), int(named[2])))
    assert (int(named[1]), int(named[2])) == (4, 3)
    axis = "filters" if tile[1] == 3 else "channels"
    assert f"its {axis} are alike in runs of {(4, 3)[axis == 'channels']} at most" in message


@pytest.mark.parametrize(
    ("mask", "tile", "message"),
    [
        (np.ones((3, 3, 2), bool), None, r"bool \(kh, kw, cin, cout\), got bool \(3, 3, 2\)"),
        (np.ones((3, 3, 2, 2), np.float32), None, r"got float32 \(3, 3, 2, 2\)"),
        (np.ones((3, 3, 0, 2), bool), None, r"got bool \(3, 3, 0, 2\)"),
        (np.ones((3, 3, 2, 2), bool), (0, 1), r"positive or None, got \(0, 1\)"),
        (np.ones((3, 3, 2, 2), bool), (1, -1), r"positive or None, got \(1, -1\)"),
        (np.ones((3, 3, 2, 2), bool), (1.0, 1), r"positive or None, got \(1.0, 1\)"),
        (np.ones((3, 3, 2, 2), bool), (1,), r"tile holds \(filters, channels\), positive or None, got \(1,\)"),
        (np.ones((3, 3, 2, 2), bool), (1, 1, 1), r"tile holds \(filters, channels\), .*, got \(1, 1, 1\)"),
        (np.ones((3, 3, 2, 2), bool), 4, r"tile holds \(filters, channels\), positive or None, got 4"),
        (np.ones((8, 8, 1, 1), bool), None, r"at most 62 taps, got \(8, 8\)"),
    ],
)
def test_what_is_no_mask_or_no_tile_is_refused(mask, tile, message):
    with pytest.raises(ValueError, match=message):
        make_structure(mask, tile=tile)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_large_windows_are_covered_in_bounded_time(density):
    before = pieces.cover.cache_info().currsize
    # A search over all windows looks at thousands of remainders for 5x5, and would not end for 7x7.
    for window in ((5, 5), (7, 7))[: None if density == 1 else 1]:
        check_all(mask_by_tiles(3, window, 6, 8, (4, 2), density), (4, 2))
    assert pieces.cover.cache_info().currsize - before < 100


def test_windows_that_overlap_read_a_tap_once():
    mask = np.zeros((9, 3, 16), bool)
    mask[[1, 3, 4, 5, 7]] = True
    structure = make_structure(mask.reshape(3, 3, 3, 16), tile=(None, 1))
    # For 16 filters a cross is cheapest as its column and its row; both windows hold the tap in the middle.
    assert sorted(piece.window for piece in structure.pieces) == [(1, 3), (3, 1)]
    check_pieces(structure, mask.reshape(3, 3, 3, 16))


def test_cover_takes_the_cheapest_windows():
    corner, scattered, all_nine = (0, 1, 3, 4), (0, 8), tuple(range(9))
    # A corner is one 2x2 window; two far taps are two reads; a whole kernel is one.
    assert [piece[0] for piece in pieces.cover(corner, (3, 3), 64)[1]] == [(0, 0, 2, 2)]
    assert sorted(piece[0] for piece in pieces.cover(scattered, (3, 3), 64)[1]) == [(0, 0, 1, 1), (2, 2, 1, 1)]
    assert [piece[0] for piece in pieces.cover(all_nine, (3, 3), 64)[1]] == [(0, 0, 3, 3)]
    # For a single filter reading is dear: one window over everything is less work.
    assert [piece[0] for piece in pieces.cover(scattered, (3, 3), 1)[1]] == [(0, 0, 3, 3)]
    assert pieces.cover((), (3, 3), 64) == (0.0, ())


def random_corners(seed, removed, cin=32, cout=256, tile=64):
    """Every tile of (64, 1) has one of four corners; so many channels are removed of each tile of filters."""
    rng = np.random.default_rng(seed)
    case = cases.Case("corners", (4, 4), 1, cin, cout, tile=(tile, 1))
    mask = cases.make_mask(case, rng)
    for first, count in zip(range(0, cout, tile), removed):
        mask[:, :, rng.permutation(cin)[:count], first : first + tile] = False
    return mask


def test_masks_of_like_size_run_one_program_and_others_are_right_too():
    traces = []

    @jax.jit
    def convolve(x, w, structure):
        traces.append(structure.pieces[0].rooms)
        return pk.pattern_conv(x, w, structure, backend="xla")

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 4, 32)).astype(np.float32)

    def check(mask):
        w = np.where(mask, rng.standard_normal(mask.shape), np.nan).astype(np.float32)
        y = convolve(x, w, make_structure(mask, tile=(64, 1)))
        wanted = pk.pattern_conv(x, w, make_structure(mask, tile=(64, 1)), backend="reference")
        np.testing.assert_allclose(y, wanted, atol=1e-4)

    # Retained channels of a tile: between 9 and 16, in any order.
    for seed, removed in enumerate([(16, 18, 20, 22), (16, 16, 16, 16), (22, 16, 23, 17)]):
        check(random_corners(seed, removed))
    assert traces == [(16,) * 4]
    check(random_corners(3, (4, 6, 2, 0)))
    assert traces == [(16,) * 4, (32,) * 4]
    check(random_corners(4, (16, 20, 17, 20)))
    assert len(traces) == 2


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 127, 128, 129, 1000, 4097])
def test_room_is_enough_and_at_most_an_eighth_too_much(count):
    room = pieces.round_up(count)
    assert count <= room <= max(count + 7, count * 9 / 8) and room % 8 == 0
    assert pieces.round_up(room) == room
    # What asks for little is not given the room of what asks for much.
    assert pieces.room_for([count, count]) == (room, room)
    assert pieces.room_for([8 * room, 0, 0]) == (pieces.round_up(8 * room), 0, 0)


def test_a_structure_is_a_tree_of_arrays():
    structure = make_structure(mask_by_tiles(0, (3, 3), 4, 6, (2, 2), 0.5))
    leaves, definition = jax.tree.flatten(structure)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    again = jax.tree.unflatten(definition, leaves)
    assert (again.shape, again.tile, again.patterns) == (structure.shape, structure.tile, structure.patterns)
    # The definition is what a compiled program is found by.
    assert hash(definition) == hash(jax.tree.structure(again)) and definition == jax.tree.structure(again)
