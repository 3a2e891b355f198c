"""The page about an export: its parts, its numbers, its words."""

import itertools
import math
import re

import numpy as np
import pytest

from experiments.report import page
from experiments.report.page.facts import Timed, compare
from experiments.report.plots import accuracy_range
from tests.experiments.report.page_data import example, read, seconds


@pytest.fixture
def data():
    return example()


def test_every_section_is_there_and_linked(data):
    found = read(data)
    assert found.section == "" and list(found.words)[1:] == list(page.SECTIONS)
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert links == [f"#{key}" for key in page.SECTIONS]
    assert ("meta", {"charset": "utf-8"}) in found.tags and found.tags[0] == ("html", {"lang": "en"})


def test_the_head_tells_the_figures(data):
    words = read(data).text()
    for expected in (
        "slim",
        "vgg11, 0.25 of its full width",
        "cifar10, JPEG-coded: lossy",
        "seed 7",
        "2026-11-23 02:04:36 UTC",
        "Top-1 accuracy at export 90.12 % test set of 10,000 images masked net in training: 90.12 %, the same",
        "Convolutions 8.00× smaller than dense float32: 800 kB in 100 kB, indices and headers included",
        "8.25× fewer weights",
        "File 8.00× smaller than dense float32: 1.00 MB in 125 kB",
        "3.10× faster than dense XLA (2.00 ms, dense 6.20 ms) on EPYC, 2 cores",
    ):
        assert expected in words


@pytest.mark.parametrize(("encoding", "lossy"), [("png", False), ("lossy webp", True), ("jpeg+png", True)])
def test_what_lost_pixels_is_told_whatever_its_coding(data, encoding, lossy):
    data["summary"]["encoding"] = encoding
    assert ("lossy, accuracies do not compare" in read(data).text()) == lossy


def test_accuracy_lost_at_the_export_is_told(data):
    data["manifest"]["facts"]["accuracy"]["top1"] = 0.8962
    assert "89.62 % test set of 10,000 images masked net in training: 90.12 %, -0.50 points" in read(data).text()


def test_phases_and_epochs(data):
    found = read(data)
    words = found.text("accuracy")
    assert "1 dense: epochs 1 to 2 2 regularize: epoch 3 3 pruned: epochs 4 to 5" in words
    assert "select: masks chosen, in epoch 3 prune: masked weights set to zero, in epoch 4" in words
    assert "Last 90.12, best 90.12." in words
    assert "3 select, regularize 75.00 % 50.00 % 0.5000 1.5000 61.0" in words


def drawn(found, identity):
    """The points of the path in a drawing's part of that name, in the drawing's units."""
    begin = next(index for index, (_, attributes) in enumerate(found.tags) if attributes.get("id") == identity)
    path = next(attributes["d"] for tag, attributes in found.tags[begin:] if tag == "path")
    return np.array(re.findall(r"([\d.]+) ([\d.]+)", path), float)


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_a_curve_goes_through_its_points(data, size):
    found = read(data)
    x, y = drawn(found, f"accuracy-{size}-curve-0").T
    across, up = x[1] - x[0], (y[3] - y[0]) / (90 - 40)
    np.testing.assert_allclose(x, x[0] + across * np.arange(5), atol=1e-3)
    np.testing.assert_allclose(y, y[0] + up * (np.array([40, 80, 75, 90, 90.12]) - 40), atol=1e-3)
    assert across > 0 > up
    # Behind it, the third epoch is shaded: it begins where the second one's point stands.
    edges = drawn(found, f"accuracy-{size}-band-2").T[0]
    np.testing.assert_allclose((edges.min(), edges.max()), (x[1], x[2]), atol=1e-3)


def test_drawings_follow_the_theme(data):
    """Each colour is a variable of the style sheet, and each text is text."""
    text = page.render(data)
    inline = re.findall(r'<svg viewBox="[^"]*" class="drawing.*?</svg>', text, re.DOTALL)
    assert len(inline) == 4 and not re.search("#[0-9a-f]{6}", "".join(inline))
    assert all(word in drawing for drawing in inline[:2] for word in (">90.12 %<", ">1 dense<", ">epochs trained<"))


def test_file_sizes(data):
    found = read(data)
    words = found.text("sizes")
    assert "dense float32 1.00 MB , the whole net, unpruned this export 125 kB , 8.00× smaller" in words
    parts = ("weights: 90.0 kB", "(indices): 9.00 kB", "classifier): 25.0 kB", "manifest: 1.00 kB")
    assert all(part in words for part in parts)
    assert "net.stablehlo 333 kB" in words and "With 1 further file the folder takes 458 kB" in words
    bars = [attributes for _, attributes in found.tags if attributes.get("class") in ("bar-dense", "bar-file")]
    assert [bar["style"] for bar in bars[:2]] == ["width: 100.0%", "width: 33.3%"]


def test_the_page_itself_is_no_file_of_the_export(data):
    data["sizes"]["files"]["report.html"] = 44_000
    assert "report.html" not in read(data).text("sizes")


def test_latency(data):
    words = read(data).text("latency")
    assert "on EPYC, 2 cores" in words and "onnxruntime 1.32.0" in words
    assert words.index("N = 1: one image") < words.index("N = 8")
    assert "against dense (XLA): 3.10× faster; against ORT, the fastest other engine here: 2.05× faster" in words
    assert "this net 2.00 ms (1.80 to 2.20)" in words
    assert "dense (XLA) 25.0 ms (25.0 to 25.0) 320 images/s, 2.50× this net's time" in words


def test_layers(data):
    words = read(data).text("layers")
    assert "Conv_0 3×3, 3 → 64 not pruned 100.0 % not recorded 1.00 – dense whole" in words
    assert "Conv_1 3×3, 64 → 128 (64, 1) 12.5 % 36.9 kB 8.00× smaller 3.00 1.00 3.00× faster pattern timed" in words
    # A tile is never wider than the layer.
    assert "Conv_2 3×3, 128 → 32 (32, 1) 12.5 % not recorded not measured – not recorded –" in words
    assert "for N = 1" in words and "all 3" in words


def test_a_removal_tile_of_its_own_is_shown(data):
    data["config"]["prune"] |= {"tile": [None, 1], "removal_tile": [8, 1]}
    assert "(128, 1), removal (8, 1)" in read(data).text("layers")


def test_patterns(data):
    found = read(data)
    words = found.text("patterns")
    assert "2 patterns in use by 3,456 kept kernels of 2 layers. 1 further pattern of the set: never used." in words
    assert "52.9 % 1,828 47.1 % 1,628" in words
    assert "Conv_2: 1,152 kept kernels, 2 patterns 91.3 % 1,052 8.7 % 100" in words
    kept = next(attributes["d"] for tag, attributes in found.tags if attributes.get("class") == "kept")
    assert kept == "".join(f"M{x} {y}h8v8h-8z" for y in (1, 11) for x in (1, 11))


def test_many_patterns_do_not_flood_the_page(data):
    chosen = itertools.combinations(range(9), 4)
    bits = ("".join("1" if tap in taps else "0" for tap in range(9)) for taps in chosen)
    counts = {"/".join((text[:3], text[3:6], text[6:])): 127 - rank for rank, text in enumerate(bits)}
    data["summary"]["layers"][1]["pattern_counts"] = counts
    found = read(data)
    assert "102 more patterns" in found.text("patterns") and "114 other patterns: " in found.text("patterns")
    glyphs = sum(attributes.get("class") == "kept" for _, attributes in found.tags)
    assert glyphs == 126 + 12 + 2


@pytest.mark.parametrize(
    "tile, removal, said",
    [
        ([64, 1], None, "up to 64 filters share each pattern and each removal (1 layer by 64, 1 layer by 32)"),
        ([None, 1], None, "Blocks of up to 128 filters"),
        ([16, 1], None, "but a narrow one"),
        ([1, 1], None, "Every kernel chose its own pattern"),
        ([64, 1], [1, 1], "Patterns are shared by up to 64 filters, but kernels are removed one at a time"),
    ],
)
def test_the_words_follow_the_shape(data, tile, removal, said):
    data["config"]["prune"] |= {"tile": tile, "removal_tile": removal}
    words = read(data).text("shape")
    assert said in words
    advised = min(tile[0] or 128, (removal or tile)[0] or 128) < 64
    assert ("tile=(64, 1)" in words) == advised
    assert "Measured on EPYC, 2 cores, this net against dense XLA: N = 1: 3.10× faster; N = 8: 2.50× faster." in words
    assert "Of 2 convolutions, 1 runs by pattern and 1 runs dense." in words


def test_the_words_follow_what_was_measured(data):
    data["config"]["prune"]["tile"] = [1, 1]
    timing = data["timing"]
    timing["layers"] = timing["layers"][:1]
    assert "No convolution runs by its pattern, so that gain comes from elsewhere." in read(data).text("shape")
    timing["batches"] = {"1": {"dense (XLA)": seconds(0.002), "this net": seconds(0.00201)}}
    words = read(data).text("shape")
    assert "N = 1: as fast (1.00×)." in words and "smaller here, not faster" in words
    assert "as fast as dense XLA" in read(data).text()
    timing["batches"]["1"]["this net"] = seconds(0.004)
    assert "2.00× slower than dense XLA (4.00 ms, dense 2.00 ms)" in read(data).text()
    del data["timing"]
    words = read(data).text("shape")
    assert "is not measured" in words and "faster here" not in words


def test_two_levels_and_quads_have_their_own_words(data):
    data["config"]["prune"]["superset"] = 6
    assert "share 6 taps and each removal" in read(data).text("shape")
    data["config"]["prune"] |= {"superset": None, "tile": [1, 1], "quads": True}
    assert "2:4 sparse at every tap" in read(data).text("shape")


@pytest.mark.parametrize("kind", ["clicktrain", "pruning after training"])
def test_configs_of_one_field_for_the_method_are_read(data, kind):
    """The example has the older form, in which ClickTrain's part stood at the top."""
    expected = read(data).text("shape")
    part = data["config"].pop("prune")
    data["config"]["method"] = {"kind": kind, **(part if kind == "clicktrain" else {"prune": part})}
    assert read(data).text("shape") == expected
    data["config"]["method"] = None
    assert "This run pruned nothing" in read(data).text("shape")


def test_a_dense_run_is_called_dense(data):
    data["summary"]["method"], data["config"]["prune"] = "dense", None
    for entry in data["summary"]["layers"]:
        entry |= {"retained": math.prod(entry["shape"]), "pattern_counts": None}
    assert "This run pruned nothing" in read(data).text("shape")


def test_noise_is_not_called_a_difference(data):
    noisy = {"median_s": 0.002, "low_s": 0.0019, "high_s": 0.009}
    data["timing"]["batches"]["1"]["this net"] = noisy
    found = read(data)
    assert "N = 1) 2.00 ms no clear difference to dense XLA's" in found.text() and "unclear" not in found.text()
    assert "N = 1: no clear difference (3.10× by medians, within the spread)" in found.text("shape")
    del data["timing"]["batches"]["8"]
    assert "that they make it faster here is not shown" in read(data).text("shape")
    assert compare(Timed(3, 2.9, 3.1), Timed(2, 1.9, 2.1)).word == "faster"
    assert compare(Timed(3, 2.9, 3.1), Timed(2, 1.9, 3.0)).word == "unclear"
    assert compare(Timed(2, 1.9, 2.1), Timed(2.05, 1.9, 2.1)).word == "as fast"
    assert compare(Timed(1, 1, 1), Timed(1.5, 1.5, 1.5)).text == "1.50× slower"


def test_usage_and_provenance(data):
    found = read(data)
    words = found.text("usage")
    assert 'net = ct.load("EXPORT")' in words and "(N, 32, 32, 3), uint8, or float in [0, 1]" in words
    assert "jax.export.deserialize" in words and "python -m experiments evaluate EXPORT" in words
    words = found.text("provenance")
    for expected in ("abc1234", "EPYC, 2 cores", "python 3.12.1, jax 0.12.0", "5" * 64, "prune.tile [64, 1]"):
        assert expected in words
    assert "/home/somebody" not in page.render(data)


def test_without_normalisation_images_are_the_nets_own(data):
    data["manifest"]["facts"]["normalise"] = None
    words = read(data).text("usage")
    assert "uint8" not in words and "(N, 32, 32, 3), float32" in words
    del data["sizes"]["files"]["net.stablehlo"]
    assert "This export holds no StableHLO artefact." in read(data).text("usage")


def test_an_export_without_a_run_has_its_layers_from_the_manifest(data):
    leaves = {
        "params/Conv_1/kernel": {"shape": [3, 3, 64, 128], "mask": {"kept": 9216}},
        "params/Conv_9/kernel": {"shape": [3, 3, 2, 2], "mask": None},
        "params/Dense_0/kernel": {"shape": [64, 10]},
    }
    found = read({"manifest": {"facts": {"net": None}, "leaves": leaves}, "timing": data["timing"]})
    assert "Conv_1 3×3, 64 → 128 – 12.5 %" in found.text("layers") and "Dense_0" not in found.text("layers")
    assert "Conv_9 3×3, 2 → 2 not pruned 100.0 %" in found.text("layers")
    assert "a net of the user's own" in found.text() and "3.10× faster" in found.text()
    assert "In which shape this net was pruned is not recorded" in found.text("shape")


@pytest.mark.parametrize("empty", [{}, {"summary": None, "metrics": None, "timing": None, "sizes": {}, "manifest": []}])
def test_nothing_known_is_said_so(empty):
    found = read(empty)
    assert "Top-1 accuracy at export not measured" in found.text() and "N = 1) not measured" in found.text()
    for section in ("accuracy", "sizes", "layers", "patterns", "shape", "provenance"):
        assert "not recorded" in found.text(section), section
    assert "not measured for this export" in found.text("latency")


def test_the_axis_shows_the_dip_after_the_prune():
    curve = [10.0, 70.0, *[90.0] * 14]
    curve[8] = 31.0  # the prune
    assert accuracy_range([curve]) == (30.0, 95.0)  # the first eighth may lie below
    assert accuracy_range([[50.0]]) == (45.0, 55.0)
