"""Builds genopt_ext._C with torch's BuildExtension; everything else stands in pyproject.toml."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = [line for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line and not line.startswith("#")]
# One rounding an operation, on every machine: see "Numbers" in csrc/README.md.
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]


def cuda_decision() -> tuple[bool, str]:
    """Whether to build CUDA kernels, and why."""
    wanted = os.environ.get("FORCE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"genopt_ext: FORCE_CUDA must be 0 or 1, got {wanted!r}")
    reason = "this version has no CUDA kernels"
    if wanted == "1":
        raise SystemExit(f"genopt_ext: CUDA was asked for (FORCE_CUDA=1), but {reason}; unset FORCE_CUDA")
    return False, reason


def build_command() -> type[build_ext]:
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        message = (
            f"genopt_ext: building needs torch ({error}); install torch, then `pip install --no-build-isolation .`"
        )

        class TorchMissing(build_ext):
            def run(self) -> None:
                raise SystemExit(message)

        return TorchMissing

    class Build(BuildExtension):
        def run(self) -> None:
            compiler = os.environ.get("CXX", "c++")
            if not shutil.which(compiler.split()[0]):
                raise SystemExit(f"genopt_ext: no C++ compiler found ({compiler}); install g++ 11 or newer, or set CXX")
            built, reason = cuda_decision()
            print(f"genopt_ext: CUDA kernels {'are' if built else 'are not'} built: {reason}")
            super().run()
            version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True)
            lines = {
                "TORCH": torch.__version__,
                "CUDA": built,
                "CUDA_REASON": reason,
                "COMPILER": version.stdout.splitlines()[0],
                "MACHINE": platform.machine(),
            }
            target = Path(self.get_ext_fullpath("genopt_ext._C")).parent / "_build_info.py"
            text = "".join(f"{name} = {value!r}\n" for name, value in lines.items())
            target.write_text('"""What setup.py built, and with what."""\n\n' + text)

    return Build


def extension() -> Extension:
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError:
        return Extension("genopt_ext._C", SOURCES)
    flags = FLAGS + WARNINGS + (["-Werror"] if os.environ.get("GENOPT_WERROR") == "1" else [])
    # -fopenmp only compiles: its runtime is the one that torch has loaded, so both share one thread pool.
    return CppExtension("genopt_ext._C", SOURCES, extra_compile_args=flags)


setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
