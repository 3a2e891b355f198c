"""What pyproject.toml cannot say: a wheel has the native kernels where jaxlib's headers and a compiler are there.

Build it against the oldest jaxlib that is supported (``pip wheel --no-build-isolation .`` where that is installed):
older ones refuse what was built with newer headers. Else the wheel is pure, and the kernels are built at first use.
"""

import pathlib
import sys

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent
FOLDER = pathlib.Path("pallas_kernels", "native")


class BuildWithKernels(build_py):
    """The package's files, and the libraries if they can be built, one for each set of instructions."""

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


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfThisPlatform})
