"""Drives CMake and Ninja for `layerpipe_kernels._C`; everything else is in pyproject.toml."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def fail(message: str) -> SystemExit:
    return SystemExit(f"layerpipe: {message}, or set LAYERPIPE_BUILD_EXT=0 to install without it.")


def find_tool(name: str, directory: str) -> str | None:
    """The program from this Python environment, else from PATH."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return shutil.which(name)
    return shutil.which(name, path=getattr(module, directory, None)) or shutil.which(name)


def find_pybind11() -> str | None:
    try:
        return str(importlib.import_module("pybind11").get_cmake_dir())
    except (ImportError, AttributeError):
        config = shutil.which("pybind11-config")
    return config and subprocess.check_output([config, "--cmakedir"], text=True).strip()


def why_not_built() -> str | None:
    """What keeps this machine from compiling, or None if it can."""
    candidates = [*shlex.split(os.environ.get("CXX", ""))[:1], "c++", "g++", "clang++"]
    if not any(map(shutil.which, candidates)):
        return "no C++ compiler found ($CXX, c++, g++, clang++)"
    # Debian's python3 comes without them, and a machine that has only those is still to be served.
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h found (Debian and Ubuntu: install python3-dev)"
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        tools = {
            "cmake": find_tool("cmake", "CMAKE_BIN_DIR"),
            "ninja": find_tool("ninja", "BIN_DIR"),
            "pybind11": find_pybind11(),
        }
        missing = [name for name, path in tools.items() if not path]
        if missing:
            raise fail(f"the C++ kernels need {', '.join(missing)}: pip install cmake ninja pybind11")

        abi = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build_dir = ROOT / "build" / f"cmake-{abi}"
        configure = [
            str(tools["cmake"]),
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
            f"-Dpybind11_DIR={tools['pybind11']}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *(["-DLP_CUDA=OFF"] if os.environ.get("LAYERPIPE_BUILD_CUDA") == "0" else []),
            *([f"-DLP_CUDA_ARCHITECTURES={archs}"] if (archs := os.environ.get("LAYERPIPE_CUDA_ARCHS")) else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]

        # CMake's cache keeps the first compiler, flags and tools; a later build may have others.
        variables = [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS")]
        tools_used = "\n".join(
            [*configure, *variables, sys.base_prefix, str(shutil.which("c++")), str(shutil.which("nvcc"))]
        )
        made_with = build_dir / "made_with.txt"
        if not made_with.exists() or made_with.read_text() != tools_used:
            shutil.rmtree(build_dir, ignore_errors=True)
        try:
            subprocess.run(configure, check=True)
            made_with.write_text(tools_used)
            subprocess.run([str(tools["cmake"]), "--build", str(build_dir)], check=True)
        except subprocess.CalledProcessError:
            raise fail("building the C++ kernels failed; correct the error above") from None

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(build_dir.glob("_C.*")), target)


class CleanBuildPy(build_py):
    def run(self) -> None:
        # setuptools would put modules that were deleted since the last build into the wheel.
        shutil.rmtree(ROOT / "build" / Path(self.build_lib).name, ignore_errors=True)
        super().run()


class PurePython(CleanBuildPy):
    def run(self) -> None:
        if os.environ.get("LAYERPIPE_BUILD_EXT") != "0":
            warnings.warn(f"{why_not_built()}: no C++ kernels are built", stacklevel=1)
        # An editable install would otherwise go on importing what an earlier one left there.
        if self.editable_mode:
            left = ROOT / f"layerpipe_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
            left.unlink(missing_ok=True)
        super().run()


if os.environ.get("LAYERPIPE_BUILD_EXT") == "0" or why_not_built():
    setup(cmdclass={"build_py": PurePython})
else:
    setup(
        cmdclass={"build_py": CleanBuildPy, "build_ext": CMakeBuild},
        ext_modules=[Extension("layerpipe_kernels._C", [])],
    )
