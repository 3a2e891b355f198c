"""The house rules that a program can check: who imports whom, who opens files, and the docstring examples."""

import ast
import doctest
import graphlib
import pathlib
import subprocess
import sys

import pytest

import clicktrain_jax.transform

ROOT = pathlib.Path(__file__).parents[1]
# A room may import itself and what stands before it.
ORDER = ("pallas_kernels", "clicktrain_jax", "experiments", "tests")
# Rooms of experiments/, from the ground up: a room imports itself and those before it.
EVIDENCE = ("data", "configs", "records", "train", "report", "bench", "studies", "commands", "__main__")
METHOD_NEEDS = {"jax", "optax", "numpy", "chex", "clicktrain_jax"}
KERNELS_NEED = {"jax", "numpy", "pallas_kernels"}
FILE_ROOMS = {"storage", "deploy"}
CLOCKS = {"time", "datetime", "timeit"}


def files_of(room):
    return sorted((ROOT / room).rglob("*.py"))


def imports(tree, module_level_only=False):
    """Top names of the absolute imports in a module; function bodies are left out when asked."""
    pending, found = [tree], set()
    while pending:
        node = pending.pop()
        if module_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        pending += ast.iter_child_nodes(node)
    return found


def calls(tree):
    """Names called as plain functions."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {node.func.id for node in nodes if isinstance(node.func, ast.Name)}


def parse(path):
    return ast.parse(path.read_text(), str(path))


every_file = pytest.mark.parametrize(
    "path", [path for room in ORDER for path in files_of(room)], ids=lambda path: str(path.relative_to(ROOT))
)
method_files = pytest.mark.parametrize("path", files_of("clicktrain_jax"), ids=lambda path: str(path.relative_to(ROOT)))


@every_file
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    later = set(ORDER[ORDER.index(room) + 1 :])
    assert not imports(parse(path)) & later, f"{room} must not import what stands on it"


@pytest.mark.parametrize("path", files_of("experiments"), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_of_the_evidence_stand_on_each_other(path):
    room = path.relative_to(ROOT / "experiments").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    used = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "experiments":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments."):
            used.add(node.module.split(".")[1])
    above = used - set(EVIDENCE[: EVIDENCE.index(room) + 1])
    assert not above, f"{room} must not import {sorted(above)}"


def test_nothing_lies_loose_in_the_evidence():
    assert {path.name for path in (ROOT / "experiments").glob("*.py")} == {"__init__.py", "__main__.py", "records.py"}


@pytest.mark.parametrize(
    "path", [path for room in ORDER[:-1] for path in files_of(room)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_is_pickled(path):
    assert not imports(parse(path)) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert "allow_pickle=True" not in path.read_text()


@method_files
def test_the_method_needs_little(path):
    allowed = METHOD_NEEDS | set(sys.stdlib_module_names)
    if path.parent.name == "models":
        allowed |= {"flax"}
    foreign = imports(parse(path), module_level_only=True) - allowed
    assert not foreign, f"import {sorted(foreign)} where it is used, not when clicktrain_jax is imported"


@pytest.mark.parametrize("path", files_of("pallas_kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_kernels_need_jax_alone(path):
    assert not imports(parse(path)) - KERNELS_NEED - set(sys.stdlib_module_names)


@method_files
def test_only_the_deploy_room_knows_kernels(path):
    if path.parent.name != "deploy":
        assert "pallas_kernels" not in imports(parse(path))


def test_kernels_are_imported_when_they_are_used():
    """The method runs where the kernels, or flax, cannot be imported."""
    code = """
import sys
sys.modules["pallas_kernels"] = sys.modules["flax"] = None
import clicktrain_jax as ct
ct.accelerate(lambda params: None, {"kernel": __import__("numpy").ones((3, 3, 1, 1), bool)})
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_kernels_have_one_user():
    """A check of nothing would pass: the deploy room does import them."""
    users = {path.parent.name for path in files_of("clicktrain_jax") if "pallas_kernels" in imports(parse(path))}
    assert users == {"deploy"}


@method_files
def test_models_know_nothing_of_pruning(path):
    if path.parent.name == "models":
        modules = {node.module or "" for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom)}
        inside = {module for module in modules if module.startswith("clicktrain_jax")}
        assert all(module.startswith("clicktrain_jax.models") for module in inside)


@method_files
def test_no_printing_no_clock_no_files(path):
    tree = parse(path)
    assert "print" not in calls(tree)
    assert not imports(tree) & CLOCKS
    if path.parent.name not in FILE_ROOMS:
        assert "open" not in calls(tree)
        assert not imports(tree) & {"pathlib", "shutil", "tempfile", "io"}
        assert not {"save", "savez", "load"} & {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in {"np", "jnp", "numpy"}
        }


def test_modules_of_the_method_form_no_circle():
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files_of("clicktrain_jax")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    arrows = {name: set() for name in paths}
    for name, path in paths.items():
        for node in parse(path).body:
            if isinstance(node, ast.ImportFrom) and node.module in paths:
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                arrows[name] |= {part if part in paths else node.module for part in parts}
    # Raises a CycleError that names it.
    assert len(list(graphlib.TopologicalSorter(arrows).static_order())) == len(paths)


def test_rooms_are_found():
    """A check of nothing would pass: the room is where it is looked for."""
    assert {path.name for path in files_of("clicktrain_jax")} >= {"transform.py", "masks.py", "plan.py"}


def test_docstring_examples_run():
    module = clicktrain_jax.transform
    tests = doctest.DocTestFinder().find(module.clicktrain, "clicktrain", module=module)
    assert sum(len(test.examples) for test in tests) >= 5
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_public_names_exist():
    for name in clicktrain_jax.__all__:
        assert hasattr(clicktrain_jax, name)
