"""The compiled kernels: nvcc's cubins, kept under build/ by a hash of their sources, as nvdisasm reads them."""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .disassembly import Program, parse
from .launches import kernel_name

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sass"
# With what bench.instructions builds: the CPU kernels take minutes to compile.
NATIVE = ROOT / "build" / "instructions"
ARCHITECTURE = "90"


@dataclass(frozen=True)
class Kernel:
    program: Program
    registers: int
    spilled_bytes: int
    shared_bytes: int


def run(command: Iterable[str | Path]) -> subprocess.CompletedProcess[str]:
    words = [str(each) for each in command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench.sass: {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done


def nvdisasm() -> str | None:
    """On the PATH, or in the package triton: installed, or where ``make sass`` puts it."""
    if found := shutil.which("nvdisasm"):
        return found
    for folder in (Path(sysconfig.get_path("platlib")), BUILD / "triton"):
        if (program := folder / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm").exists():
            return str(program)
    return None


def missing() -> str | None:
    """Why nothing can be run here, or None."""
    for tool in ("nvcc", "cmake", "ninja", "nm", "c++filt"):
        if not shutil.which(tool):
            return f"there is no {tool}; install it"
    return None if nvdisasm() else "there is no nvdisasm; install the CUDA toolkit's, or triton with pip, which has one"


@cache
def compiler() -> str:
    return run(["nvcc", "--version"]).stdout.strip().splitlines()[-1]


@cache
def flags() -> tuple[str, ...]:
    """Those of setup.py."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "NVCC_FLAGS":
            code = f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"
            return (*ast.literal_eval(statement.value), code, "-Xptxas=-v", "-cubin")
    raise SystemExit("bench.sass: setup.py has no NVCC_FLAGS")


def included(source: Path, found: dict[Path, bytes] | None = None) -> dict[Path, bytes]:
    """The source and all that it includes with quotes, with their text."""
    found = {} if found is None else found
    if source not in found and source.exists():
        found[source] = source.read_bytes()
        for name in re.findall(rb'^#include "(.*)"', found[source], re.M):
            for folder in (source.parent, ROOT / "csrc", ROOT / "csrc" / "cuda"):
                included((folder / name.decode()).resolve(), found)
    return found


def sources() -> str:
    """A hash of all that decides what is recorded, but for nvcc: what is compiled, launched, compared and emulated."""
    hashed = hashlib.sha256(" ".join(flags()).encode())
    for folder, left_out in ((ROOT / "csrc", ROOT / "csrc" / "torch"), (Path(__file__).parent, None)):
        for path in sorted(folder.rglob("*.*")):
            if (
                path.is_file()
                and path.suffix != ".pyc"
                and left_out not in path.parents
                and path.name != "bindings.cpp"
            ):
                hashed.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:16]


def compiled(source: Path) -> tuple[str, str]:
    """What nvdisasm tells of a source's kernels, and what ptxas told."""
    text = b"".join(content for _, content in sorted(included(source).items()))
    key = hashlib.sha256(b"\0".join([text, compiler().encode(), " ".join(flags()).encode()])).hexdigest()[:16]
    name = "_".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
    cubin, listing, log = (BUILD / f"{name}-{key}{suffix}" for suffix in (".cubin", ".sass", ".log"))
    if not log.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{name}-*"):
            old.unlink()
        done = run(["nvcc", *flags(), f"-I{ROOT / 'csrc' / 'cuda'}", "-o", cubin, source])
        listing.write_text(run([nvdisasm() or "", "-c", cubin]).stdout)
        log.write_text(done.stderr)  # last: it tells that all are there
    return listing.read_text(), log.read_text()


def kernels_in(source: Path) -> dict[str, Kernel]:
    """By their names as C++ writes them, without parameters."""
    listing, log = compiled(source)
    told = {}
    for part in log.split("Compiling entry function '")[1:]:
        registers, memory = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        spills = [int(each) for each in re.findall(r"(\d+) bytes spill", part)]
        told[part.split("'")[0]] = int(registers[1]) if registers else 0, sum(spills), int(memory[1]) if memory else 0
    programs = parse(listing)
    names = run(["c++filt", *programs]).stdout.splitlines() if programs else []
    return {
        kernel_name(name): Kernel(program, *told[mangled])
        for name, (mangled, program) in zip(names, programs.items(), strict=True)
    }


class Kernels:
    """All compiled kernels; sources are compiled when they are first needed."""

    def __init__(self) -> None:
        self._found: dict[Path, dict[str, Kernel]] = {}

    def compile(self, sources: Iterable[Path], jobs: int = 1) -> None:
        wanted = [each for each in dict.fromkeys(sources) if each not in self._found and each.exists()]
        with ThreadPoolExecutor(jobs) as pool:
            self._found.update(zip(wanted, pool.map(kernels_in, wanted), strict=True))

    def find(self, name: str) -> Kernel:
        for sources in ([], sorted((ROOT / "csrc").glob("**/*.cu"))):
            self.compile(sources)
            for kernels in self._found.values():
                if name in kernels:
                    return kernels[name]
        raise SystemExit(f"bench.sass: no source has the kernel {name}")


def recorder() -> Path:
    """The program that launches.cpp becomes."""
    run(["cmake", "-S", ROOT, "-B", NATIVE, "-G", "Ninja"])
    run(["cmake", "--build", NATIVE, "--target", "launches"])
    return NATIVE / "launches"
