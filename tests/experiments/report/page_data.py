"""An example of the page's data, and a reader of pages; for the tests."""

import html.parser

from experiments.report import page

VOID = {"meta", "link", "br"}
A, B, C = "110/110/000", "011/011/000", "000/011/011"


class Reader(html.parser.HTMLParser):
    """Text by the id of its section, all tags, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], {"": []}
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = attributes["id"]
            self.words[self.section] = []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title", "desc"):
            self.words[self.section].append(data)

    def text(self, section=""):
        return " ".join(" ".join(self.words[section]).replace("\xa0", " ").split())


def read(data):
    return Reader(page.render(data))


def layer(name, shape, retained, counts):
    return {"name": name, "shape": shape, "retained": retained, "kernels_removed": 0, "pattern_counts": counts}


def seconds(median, spread=0.0):
    return {"median_s": median, "low_s": median * (1 - spread), "high_s": median * (1 + spread)}


def line(epoch, phases, eval_top1):
    known = {"epoch": epoch, "phases": list(phases), "eval_top1": eval_top1, "eval_loss": 0.5}
    return known | {"train_top1": 0.5, "train_loss": 1.5, "train_seconds": 61.0}


def example():
    """A run of two pruned layers, whose figures are easy to follow."""
    top1 = (0.40, 0.80, 0.75, 0.90, 0.9012)
    phases = (("dense",), ("dense",), ("select", "regularize"), ("prune", "pruned"), ("pruned",))
    return {
        "summary": {
            "name": "slim",
            "net": "vgg11",
            "width": 0.25,
            "seed": 7,
            "epochs": 5,
            "dataset": "cifar10",
            "encoding": "jpeg",
            "method": "clicktrain",
            "eval_split": "test",
            "eval_examples": 10_000,
            "final_top1": 0.9012,
            "conv_compression": 8.25,
            "layers": [
                layer("Conv_0/kernel", [3, 3, 3, 64], 1728, None),
                layer("Conv_1/kernel", [3, 3, 64, 128], 9216, {A: 1728, B: 576, C: 0}),
                layer("Conv_2/kernel", [3, 3, 128, 32], 4608, {A: 100, B: 1052, C: 0}),
            ],
        },
        "metrics": [line(epoch, names, eval_top1=value) for epoch, (names, value) in enumerate(zip(phases, top1))],
        "config": {"name": "slim", "data": {"name": "cifar10", "dir": "/home/somebody"}, "prune": {"tile": [64, 1]}},
        "setting": {
            "date": "2026-11-23T02:04:36+00:00",
            "commit": "abc1234",
            "python": "3.12.1",
            "versions": {"jax": "0.12.0"},
            "device": {"platform": "cpu"},
            "cpu": {"model": "EPYC", "cores": 2},
        },
        "manifest": {
            "format": "clicktrain-jax export",
            "version": 1,
            "dtype": "float32",
            "digest": "d" * 64,
            "masks": {"prefix": "params/", "sha256": "5" * 64},
            "facts": {
                "image_shape": [32, 32, 3],
                "normalise": {"mean": [0.5], "std": [0.25]},
                "accuracy": {"split": "test", "examples": 10_000, "top1": 0.9012, "run_top1": 0.9012},
            },
        },
        "sizes": {
            "dense_bytes": 1_000_000,
            "conv_dense_bytes": 800_000,
            "conv_bytes": 99_000,
            "conv_index_bytes": 9_000,
            "header_bytes": 1_000,
            "layers": {"params/Conv_1/kernel": 36_864},
            "files": {"manifest.json": 400, "weights.safetensors": 124_600, "net.stablehlo": 333_000},
        },
        "timing": {
            "device": "EPYC",
            "cores": 2,
            "versions": {"jax": "0.12.0", "onnxruntime": "1.32.0"},
            "batches": {
                "8": {"this net": seconds(0.010), "dense (XLA)": seconds(0.025)},
                "1": {"dense (XLA)": seconds(0.0062, 0.1), "this net": seconds(0.002, 0.1), "ORT": seconds(0.0041)},
            },
            "layers": [
                {"name": "params/Conv_0/kernel", "dense_s": 1e-3, "pattern_s": None, "runs": "dense", "why": "whole"},
                {"name": "params/Conv_1/kernel", "dense_s": 3e-3, "pattern_s": 1e-3, "runs": "pattern", "why": "timed"},
            ],
        },
    }
