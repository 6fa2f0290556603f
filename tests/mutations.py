"""Plants defects into a copy of the sources, one at a time, and says which the tests named beside them let pass.

    python tests/mutations.py [NAME ...]

``mutations.toml`` lists them; without names, all are planted. The copy and what is built of it stay in
``build/mutations``, so that a later run compiles little. Not part of the tests: most defects take a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutations"


def read() -> dict[str, dict[str, Any]]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


def planted(text: str, name: str, defect: dict[str, Any]) -> str:
    """``text`` with the defect, whose place has to be found once."""
    if text.count(defect["old"]) != 1:
        raise ValueError(f"{name}: {defect['file']} has {text.count(defect['old'])} places with {defect['old']!r}")
    return text.replace(defect["old"], defect["new"])


def write(path: Path, content: bytes) -> None:
    """Leaves the time of a file alone that has not changed."""
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(COPY), **env}
    return subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)


def build(target: str | None) -> None:
    """One of the programs that CMake builds, or the extension."""
    if target is None:
        commands = [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]
    else:
        torch_path = run(sys.executable, "-c", "import torch; print(torch.utils.cmake_prefix_path)").stdout.strip()
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_PREFIX_PATH={torch_path}", "-DGENOPT_PYTHON=ON"]
        commands = [["cmake", "-S", ".", "-B", "build/cmake", "-G", "Ninja", *options]]
        commands += [["cmake", "--build", "build/cmake", "--target", target]]
    for command in commands:
        if (result := run(*command, FORCE_CUDA="0")).returncode:
            raise RuntimeError(result.stdout + result.stderr)


def catches(test: str) -> bool:
    """Whether a test fails: pytest's argument, after ``cuda:`` with the CUDA kernels on a CPU; or ``cpp:PROGRAM``."""
    if test.startswith("cpp:"):
        build(program := test.removeprefix("cpp:"))
        sets = ("default", "avx2", "avx512")  # 77: this processor lacks it
        return any(run(f"build/cmake/{program}", GENOPT_CPU_CAPABILITY=c).returncode not in (0, 77) for c in sets)
    on_cuda = test.startswith("cuda:")
    build("_C" if on_cuda else None)
    env = {"GENOPT_TEST_CUDA_ON_CPU": "build/cmake/_C.so"} if on_cuda else {}
    result = run(sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", test.removeprefix("cuda:"), **env)
    if result.returncode in (2, 3, 4, 5):  # it did not come to run the test
        raise RuntimeError(result.stdout + result.stderr)
    return result.returncode != 0


def main(names: list[str]) -> int:
    defects = read()
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    files = [file for file in listed if (ROOT / file).is_file()]
    for file in files:
        write(COPY / file, (ROOT / file).read_bytes())
    for path in (COPY / "csrc").rglob("*"):  # of an earlier run: the build takes every source that is there
        if path.is_file() and str(path.relative_to(COPY)) not in files:
            path.unlink()
    survivors = []
    for name in names or defects:
        start, defect = time.monotonic(), defects[name]
        path = COPY / defect["file"]
        original = path.read_bytes()
        write(path, planted(original.decode(), name, defect).encode())
        try:
            caught = next((test for test in defect["tests"] if catches(test)), None)
        finally:
            write(path, original)
        survivors += [name] * (caught is None)
        print(
            f"{name}: {f'caught by {caught}' if caught else 'SURVIVES'}, {time.monotonic() - start:.0f} s", flush=True
        )
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
