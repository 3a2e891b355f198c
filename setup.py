"""What pyproject.toml cannot say: the experiments' name once installed, and the native kernels.

Installed, the room `experiments` is the package `clicktrain_experiments`, so that it cannot collide with a user's own:
the files are the same, with the name changed wherever they import each other or tell a command.

A wheel has the native kernels where jaxlib's headers and a compiler are there. Build it against the oldest jaxlib that
is supported (``pip wheel --no-build-isolation .`` where that is installed): older ones refuse what was built with newer
headers. Else the wheel is pure, and the kernels are built at first use.
"""

import pathlib
import re
import sys

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent
FOLDER = pathlib.Path("pallas_kernels", "native")
INSTALLED = "clicktrain_experiments"
# Modules first: `python -m experiments.x` stays a module, `python -m experiments` becomes the command.
RENAMES = (
    (re.compile(r"\bexperiments(?=\.[a-z_])"), INSTALLED),
    (re.compile(r"python -m experiments\b"), "clicktrain"),
    (re.compile(r"^(\s*(?:from|import)) experiments\b", re.MULTILINE), rf"\1 {INSTALLED}"),
    (re.compile(r'"experiments"'), f'"{INSTALLED}"'),
)


class BuildWithKernels(build_py):
    """The packages' files, and the libraries if they can be built, one for each set of instructions."""

    def run(self):
        """As setuptools', then the libraries beside the sources of the wheel; not those of an editable install."""
        super().run()
        if self.editable_mode:
            return
        sys.path.insert(0, str(HERE))
        try:
            from pallas_kernels.native import build

            for instructions in build.instruction_sets():
                path = pathlib.Path(self.build_lib) / FOLDER / build.prebuilt(instructions).name
                build.build_library(path, instructions=instructions)
        except (ImportError, OSError, RuntimeError) as error:
            self.announce(f"the wheel is pure, native kernels are left to the first use: {error}", level=3)
        finally:
            sys.path.remove(str(HERE))

    def build_module(self, module, module_file, package):
        """As setuptools', under the installed name."""
        outfile, copied = super().build_module(module, module_file, package)
        if str(package).split(".")[0] == INSTALLED:
            path = pathlib.Path(outfile)
            text = pathlib.Path(module_file).read_text(encoding="utf-8")
            for pattern, name in RENAMES:
                text = pattern.sub(name, text)
            path.write_text(text, encoding="utf-8")
        return outfile, copied


class WheelOfThisPlatform(bdist_wheel):
    """Of any Python 3, and of this platform where it holds the library."""

    def run(self):
        """The files first: they decide what the wheel is called."""
        self.run_command("build")
        folder = pathlib.Path(self.get_finalized_command("build").build_lib) / FOLDER
        has_library = any(folder.glob("*.so"))
        self.root_is_pure = not has_library
        # Where the files of the wheel go: a library belongs among those of this platform.
        self.distribution.has_ext_modules = lambda: has_library
        super().run()

    def get_tag(self):
        """The library calls no Python: it goes with every version."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfThisPlatform},
    packages=[
        *find_packages(str(HERE), include=["clicktrain_jax*", "pallas_kernels*"]),
        *(INSTALLED + name.removeprefix("experiments") for name in find_packages(str(HERE), include=["experiments*"])),
    ],
    package_dir={INSTALLED: "experiments"},
)
