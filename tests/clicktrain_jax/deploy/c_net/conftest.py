import importlib.util
import sys
from pathlib import Path

# Under --import-mode=importlib a test cannot import its neighbours by name.
for name in ("compiled",):
    _SPEC = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules[name])
