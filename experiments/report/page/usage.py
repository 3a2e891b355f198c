"""How the files are used, and where they come from."""

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.report.page.facts import Facts
from experiments.report.page.markup import Html, el, items, join, pick
from experiments.report.page.overview import NOT_RECORDED, missing
from experiments.report.page.speed import BENCH

# Where things lay on the machine of the run says nothing about the run.
_LOCAL = ("data.dir", "data.cache_dir")
_STABLEHLO, _ONNX = "net.stablehlo", "net.onnx"
_LOAD = """import clicktrain_jax as ct

net = ct.load("EXPORT")
# images: {images}
logits = net(images)"""
_PORTABLE = """import jax.export

with open("EXPORT/net.stablehlo", "rb") as file:
    net = jax.export.deserialize(bytearray(file.read()))
# images: {images}
logits = net.call(images)"""
_COMMANDS = f"""python -m experiments evaluate EXPORT
{BENCH}"""


def usage(facts: Facts) -> Html:
    """Snippets to copy."""
    shape = pick(facts.exported, "image_shape")
    known = isinstance(shape, list | tuple) and len(shape) == 3
    sizes = ", ".join(map(str, shape)) if known else "rows, columns, channels"
    normalises = facts.exported.get("normalise", True) is not None
    pixels = "uint8, or float in [0, 1]" if normalises else "float, as the net's own function takes them"
    parts = [
        el("p", el("code", "EXPORT"), " stands for the folder that ", el("code", "manifest.json"), " lies in."),
        el("h3", "With this library: the fastest form for the device"),
        _code(_LOAD.format(images=f"(N, {sizes}), {pixels}")),
        el("h3", "With jax alone: the StableHLO artefact"),
    ]
    if facts.files and _STABLEHLO not in facts.files:
        parts.append(missing("This export holds no StableHLO artefact."))
    else:
        parts.append(_code(_PORTABLE.format(images=f"(N, {sizes}), {'uint8' if normalises else 'float32'}")))
    parts += [el("h3", "Accuracy and speed again, from the files"), _code(_COMMANDS)]
    if _ONNX in facts.files:
        parts.append(el("p", el("code", _ONNX), " is for onnxruntime and other ONNX engines."))
    return join(parts)


def _code(text: str) -> Html:
    return el("pre", el("code", text), tabindex="0")


def provenance(facts: Facts) -> Html:
    """Where it comes from."""
    setting, manifest = facts.setting, facts.manifest
    rows = {
        "commit": setting.get("commit"),
        "trained on": _device(setting),
        "versions": _versions({"python": setting.get("python"), **items(setting.get("versions"))}),
        "exported with": _versions(items(manifest.get("software"))),
        "images' fingerprint": setting.get("data_fingerprint") or pick(facts.exported, "data", "fingerprint"),
        "masks' digest": pick(manifest, "masks", "sha256"),
        "manifest's digest": manifest.get("digest"),
        "format": _format(manifest),
        "normalisation": _normalisation(facts),
    }
    settings = {name: value for name, value in _flat(facts.config) if name not in _LOCAL}
    whole = _settings(settings) if settings else missing(f"Config: {NOT_RECORDED}.")
    return join([_settings(rows), el("details", el("summary", "The whole config"), whole)])


def _device(setting: Mapping[str, Any]) -> str | None:
    device, cpu = items(setting.get("device")), items(setting.get("cpu"))
    if not device and not cpu:
        return None
    kind = cpu.get("model") if device.get("platform") in (None, "cpu") else device.get("kind")
    cores = f", {cpu['cores']} cores" if cpu.get("cores") not in (None, 1) else ", 1 core" if cpu.get("cores") else ""
    return f"{kind or NOT_RECORDED}{cores}"


def _versions(versions: Mapping[str, Any]) -> str | None:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None) or None


def _format(manifest: Mapping[str, Any]) -> str | None:
    if manifest.get("format") is None:
        return None
    return f"{manifest['format']}, version {manifest.get('version')}, weights {manifest.get('dtype')}"


def _normalisation(facts: Facts) -> str | None:
    if "normalise" not in facts.exported:
        return None
    normalise = items(facts.exported["normalise"])
    return ", ".join(f"{key} {value}" for key, value in normalise.items()) if normalise else "none"


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value is None else value


def _settings(rows: Mapping[str, Any]) -> Html:
    cells = (
        el("tr", el("th", name, scope="row"), el("td", NOT_RECORDED if value is None else str(value)))
        for name, value in rows.items()
    )
    return el("div", el("table", el("tbody", *cells), class_="settings"), class_="scroll")
