"""Builds the compiled modules with CMake and puts them beside the Python code; CMakeLists.txt owns the targets.

Environment variables: GENCORE_CUDA ("on": the CUDA module for every architecture; "off"; by default it is built where
nvcc and a GPU are found, for that GPU alone), GENCORE_CUDA_ARCHITECTURES, which is asking for it too ("90",
"80-real;90"; as CMake's CMAKE_CUDA_ARCHITECTURES), and CMAKE_ARGS, which adds options to the configuration, such as
``-DGENCORE_WERROR=ON``.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """A build tool: the one installed beside this Python (build isolation puts it there), else the one on the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"gencore needs {name} to build; `pip install {name}` brings it")
    return found


class CMakeExtension(Extension):
    """A module that CMake builds: it has a name and no sources of setuptools' own."""

    def __init__(self, name: str):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures once, builds with ninja, installs the modules where setuptools expects them."""

    def run(self) -> None:
        import pybind11

        if shutil.which("c++") is None and "CXX" not in os.environ:
            raise SystemExit("gencore needs a C++20 compiler to build (GCC 11 or Clang 14 and later); none was found")
        # An editable install has the modules in the source tree, a wheel in the build tree. So have the objects, which
        # outlive the temporary folder of an editable install: the next one compiles only what changed.
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" if self.inplace else Path(self.build_temp).resolve()
        build = build / f"cmake-{sys.implementation.cache_tag}"
        # Compilers that were found, or were not, are looked for again.
        for found in (build / "CMakeCache.txt", *build.glob("CMakeFiles/*/CMake*Compiler.cmake")):
            found.unlink(missing_ok=True)
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGENCORE_CUDA={os.environ.get('GENCORE_CUDA', 'auto')}",
            f"-DGENCORE_CUDA_ARCHITECTURES={os.environ.get('GENCORE_CUDA_ARCHITECTURES', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build)], check=True)
        # What an earlier build with CUDA left must not become part of one without.
        (prefix / "gencore" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        subprocess.run(
            [tool("cmake"), "--install", str(build), "--component", "python", "--prefix", str(prefix)], check=True
        )

    def get_outputs(self) -> list[str]:
        return [self.get_ext_fullpath(extension.name) for extension in self.extensions]


setup(ext_modules=[CMakeExtension("gencore._cpu")], cmdclass={"build_ext": CMakeBuild})
