"""Builds genopt_ext._C with torch's BuildExtension; everything else stands in pyproject.toml."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for kind in ("cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{kind}"))
# One rounding an operation, on every machine: see "Numbers" in csrc/README.md.
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wno-psabi"]  # vectors wider than the default has are passed nowhere: what takes them is inlined
# Python's own flags ask for debug symbols, which would be nine tenths of the file. The last -g counts.
DEBUG = os.environ.get("GENOPT_DEBUG") == "1"
FLAGS += ["-g" if DEBUG else "-g0"]
# Nor does anybody link to its symbols.
LINK_FLAGS = [] if DEBUG or sys.platform != "linux" else ["-Wl,--strip-all"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "--expt-relaxed-constexpr", "-lineinfo"]
# Registers that spill to memory are an error too.
NVCC_STRICT = ["-Werror=all-warnings", "-Xptxas=-Werror,--warn-on-spills,--warn-on-local-memory-usage"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]


def find_toolkit() -> None:
    """Sets CUDA_HOME to the toolkit of the nvcc on the PATH, which may be a wrapper or a link to it."""
    nvcc = shutil.which("nvcc")
    if nvcc and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        plan = subprocess.run([nvcc, "--dryrun", "any.cu"], capture_output=True, text=True)
        for line in plan.stderr.splitlines():
            if line.startswith("#$ TOP="):
                os.environ["CUDA_HOME"] = str(Path(line.removeprefix("#$ TOP=")).resolve())


def architectures(nvcc: tuple[int, ...]) -> str:
    """As torch reads them, for GPUs that this nvcc knows; PTX is for newer ones."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0;12.0+PTX" if nvcc >= (12, 8) else "8.0;9.0+PTX")
    names = {"kepler", "maxwell", "pascal", "volta", "turing"}
    for each in re.split(r"[;,\s]+", listed):
        number = re.match(r"\d+", each)
        if int(number[0]) < 8 if number else each.split("+")[0].lower() in names:
            raise SystemExit(
                f"genopt_ext: CUDA kernels need a GPU of architecture 8.0 or newer, TORCH_CUDA_ARCH_LIST has {each}; "
                "leave it out, or set FORCE_CUDA=0: the reference in plain torch serves older GPUs"
            )
    return listed


def cuda_decision() -> tuple[bool, str]:
    """Whether to build CUDA kernels, and why. Where it does, TORCH_CUDA_ARCH_LIST is set."""
    find_toolkit()
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = os.environ.get("FORCE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"genopt_ext: FORCE_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return False, "left out by FORCE_CUDA=0"
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    built = False
    if not torch.version.cuda:
        reason = f"torch {torch.__version__} has no CUDA; install a build of torch that has"
    elif not CUDA_HOME or not nvcc.exists():
        reason = "there is no CUDA toolkit; install one, or set CUDA_HOME to where it is"
    else:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        version = text.split("release ")[1].split(",")[0]
        ours, theirs = (tuple(map(int, v.split("."))) for v in (version, torch.version.cuda))
        built = ours[0] == theirs[0] and ours >= (12, 1)
        reason = f"nvcc {version}, and torch was built with CUDA {torch.version.cuda}"
        if not built:
            reason += "; the first numbers have to be the same, and nvcc 12.1 or newer: install such a toolkit"
    if wanted == "1" and not built:
        raise SystemExit(f"genopt_ext: CUDA was asked for (FORCE_CUDA=1), but {reason}, or unset FORCE_CUDA")
    if built:  # torch's own default asks for a GPU to look at
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(ours)
    return built, reason


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
                raise SystemExit(f"genopt_ext: no C++ compiler found ({compiler}); install g++ 12 or newer, or set CXX")
            print(f"genopt_ext: CUDA kernels {'are' if BUILDS_CUDA else 'are not'} built: {CUDA_REASON}")
            super().run()
            version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True)
            lines = {
                "TORCH": torch.__version__,
                "CUDA": BUILDS_CUDA,
                "CUDA_REASON": CUDA_REASON,
                "CUDA_ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if BUILDS_CUDA else "",
                "COMPILER": version.stdout.splitlines()[0],
                "DEBUG": DEBUG,
                "MACHINE": platform.machine(),
            }
            target = Path(self.get_ext_fullpath("genopt_ext._C")).parent / "_build_info.py"
            text = "".join(f"{name} = {value!r}\n" for name, value in lines.items())
            target.write_text('"""What setup.py built, and with what."""\n\n' + text)

    return Build


def extension() -> Extension:
    try:
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError:
        return Extension("genopt_ext._C", SOURCES)
    strict = os.environ.get("GENOPT_WERROR") == "1"
    flags = FLAGS + WARNINGS + (["-Werror"] if strict else [])
    # -fopenmp only compiles: its runtime is the one that torch has loaded, so both share one thread pool.
    if not BUILDS_CUDA:
        sources = [name for name in SOURCES if not name.endswith(".cu")]
        return CppExtension("genopt_ext._C", sources, extra_compile_args=flags, extra_link_args=LINK_FLAGS)
    return CUDAExtension(
        "genopt_ext._C",
        SOURCES,
        include_dirs=[str(ROOT / "csrc" / "cuda")],
        define_macros=[("GENOPT_CUDA", None)],
        extra_compile_args={"cxx": flags, "nvcc": NVCC_FLAGS + (NVCC_STRICT if strict else [])},
        extra_link_args=LINK_FLAGS,
    )


try:
    BUILDS_CUDA, CUDA_REASON = cuda_decision()
except ImportError:
    BUILDS_CUDA, CUDA_REASON = False, "torch is missing"

setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
