"""Every script and notebook of examples/, run in small as a user runs them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# What each comes to in few epochs: least top-1 in percent, and convolutions so many times smaller.
EXPECTED = {
    "linen_net": (90, 6.0),
    "nnx_net": (90, 4.4),
    "equinox_net": (90, 4.4),
    "pretrained": (90, 6.0),
    "several_devices": (90, 6.0),
    "deploy": (80, 6.0),
    "hooks": (80, 7.9),
}
EPOCHS = 4
SLOW = ("pretrained", "several_devices", "deploy")


def run(command, tmp_path):
    settings = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "JAX_PLATFORMS": "cpu"}
    environment = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=tmp_path,
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_all_are_expected_and_short():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    assert scripts == set(EXPECTED)
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES.glob("*.py"))
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in listed for path in (*EXAMPLES.glob("*.ipynb"),)), "examples/README.md"
    assert all(f"`{name}.py`" in listed for name in scripts)


def named(names):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]
    )


@named(EXPECTED)
def test_scripts(name, tmp_path):
    if name == "equinox_net" and importlib.util.find_spec("equinox") is None:
        pytest.skip("equinox is not installed: pip install equinox")
    printed = run([str(EXAMPLES / f"{name}.py"), "--epochs", str(EPOCHS)], tmp_path)
    least, compression = EXPECTED[name]
    top1, times = re.findall(r"top-1 ([\d.]+)%, ([\d.]+)x fewer", printed)[-1]
    assert float(top1) >= least, printed
    assert float(times) == pytest.approx(compression, abs=0.1)
    if name == "several_devices":
        assert re.search(r"2 devices, zeros in Conv_2 on each: \[(\d+), \1\]", printed)
    for difference in re.findall(r"largest difference ([\d.e+-]+)", printed):
        assert float(difference) < 1e-3


@named(["getting_started", "deploy"])
def test_notebooks(name, tmp_path):
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]["name"]) == (4, "python")
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "commit notebooks without outputs"
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    script = tmp_path / f"{name}.py"
    code = re.sub(r"EPOCHS = \d+", f"EPOCHS = {EPOCHS}", code)
    script.write_text(f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n{code}\n")
    printed = run([str(script)], tmp_path)
    top1 = float(re.findall(r"top-1 ([\d.]+)%", printed)[-1])
    assert top1 >= EXPECTED["linen_net" if name == "getting_started" else "deploy"][0], printed
