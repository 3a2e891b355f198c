import importlib.util
import sys
from pathlib import Path

# Under --import-mode=importlib a test cannot import its neighbours by name.
_SPEC = importlib.util.spec_from_file_location("compiled", Path(__file__).parent / "compiled.py")
sys.modules["compiled"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sys.modules["compiled"])
