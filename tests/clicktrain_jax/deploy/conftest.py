import importlib.util
import sys
from pathlib import Path

# Under --import-mode=importlib a test cannot import its neighbours by name: load the shared module once, here.
_SPEC = importlib.util.spec_from_file_location("own_nets", Path(__file__).parent / "own_nets.py")
sys.modules["own_nets"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sys.modules["own_nets"])
