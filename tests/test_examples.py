"""Every script and notebook of examples/, run in small with a user's interpreter."""

import functools
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
NOTEBOOKS = ("getting_started", "deploy")
# Run by one interpreter one after another, which imports once; hooks last, as the experiments' loop has settings of its
# own, and several devices alone, as they must be asked for first.
TOGETHER = (
    ("linen_net.py", "getting_started.ipynb", "nnx_net.py", "equinox_net.py", "hooks.py"),
    ("pretrained.py", "deploy.py", "deploy.ipynb"),
    ("several_devices.py",),
)
# Each writes what it prints into a file of its own, and the reason where it ends with one.
DRIVER = """
import contextlib, runpy, sys, traceback
epochs, *scripts = sys.argv[1:]
for script in scripts:
    sys.argv = [script] if script.endswith("notebook.py") else [script, "--epochs", epochs]
    name = script.rpartition("/")[2]
    with open(name + ".printed", "w") as file, contextlib.redirect_stdout(file):
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            with open(name + ".failed", "w") as failed:
                traceback.print_exc(file=failed)
"""


def as_script(notebook, folder):
    """A notebook's code as a script, of few epochs."""
    read = json.loads((EXAMPLES / notebook).read_text())
    assert (read["nbformat"], read["metadata"]["language_info"]["name"]) == (4, "python")
    cells = [cell for cell in read["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "commit notebooks without outputs"
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    script = folder / f"{notebook}.notebook.py"
    script.write_text(re.sub(r"EPOCHS = \d+", f"EPOCHS = {EPOCHS}", code))
    return script


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What an example prints, by the name of its file; it runs with those beside it when the first is asked for."""

    @functools.cache
    def run(names):
        folder = tmp_path_factory.mktemp("examples")
        found = importlib.util.find_spec("equinox") is not None
        scripts = [
            as_script(name, folder) if name.endswith(".ipynb") else EXAMPLES / name
            for name in names
            if found or name != "equinox_net.py"
        ]
        path = os.pathsep.join([str(EXAMPLES), str(ROOT), *sys.path[1:]])
        environment = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", DRIVER, str(EPOCHS), *map(str, scripts)],
            cwd=folder,
            env=environment | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    def of(name):
        folder = run(next(names for names in TOGETHER if name in names))
        script = f"{name}.notebook.py" if name.endswith(".ipynb") else name
        failed = folder / f"{script}.failed"
        assert not failed.exists(), failed.read_text()[-3000:]
        return (folder / f"{script}.printed").read_text()

    return of


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
def test_scripts(name, printed):
    if name == "equinox_net" and importlib.util.find_spec("equinox") is None:
        pytest.skip("equinox is not installed: pip install equinox")
    text = printed(f"{name}.py")
    least, compression = EXPECTED[name]
    top1, times = re.findall(r"top-1 ([\d.]+)%, ([\d.]+)x fewer", text)[-1]
    assert float(top1) >= least, text
    assert float(times) == pytest.approx(compression, abs=0.1)
    if name == "several_devices":
        assert re.search(r"2 devices, zeros in Conv_2 on each: \[(\d+), \1\]", text)
    for difference in re.findall(r"largest difference ([\d.e+-]+)", text):
        assert float(difference) < 1e-3


@named(NOTEBOOKS)
def test_notebooks(name, printed):
    text = printed(f"{name}.ipynb")
    top1 = float(re.findall(r"top-1 ([\d.]+)%", text)[-1])
    assert top1 >= EXPECTED["linen_net" if name == "getting_started" else "deploy"][0], text
