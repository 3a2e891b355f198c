"""The list of `mutants.py` cannot rot: each mutant still applies, in one place, and its tests are there."""

import ast
import importlib.util
import pathlib

SPEC = importlib.util.spec_from_file_location("mutants", pathlib.Path(__file__).parent / "mutants.py")
mutants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutants)


def test_every_mutant_applies():
    known = mutants.symbols(mutants.ROOT)
    assert len(mutants.MUTANTS) >= 60 and len(set(mutants.MUTANTS)) == len(mutants.MUTANTS)
    for mutant in mutants.MUTANTS:
        path, at = mutants.place_of(mutant, known)
        text = path.read_text()
        ast.parse(text[:at] + mutant.new + text[at + len(mutant.old) :])
        assert mutants.tests_of(mutant, mutants.ROOT)
