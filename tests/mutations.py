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


def build(program: str | None) -> bool:
    """The extension, or one of the C++ tests."""
    if program is None:
        return run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", FORCE_CUDA="0").returncode == 0
    configured = run("cmake", "-S", ".", "-B", "build/cmake", "-G", "Ninja").returncode == 0
    return configured and run("cmake", "--build", "build/cmake", "--target", program).returncode == 0


def catches(test: str) -> bool:
    """Whether the test, a pytest argument or ``cpp:`` and a program of the C++ tests, can be run and fails."""
    program = test.removeprefix("cpp:") if test.startswith("cpp:") else None
    if not build(program):
        raise RuntimeError(f"with the defect, {program or 'the extension'} can not be built")
    if program is not None:
        return any(
            run(f"build/cmake/{program}", GENOPT_CPU_CAPABILITY=each).returncode not in (0, 77)
            for each in ("default", "avx2", "avx512")
        )
    result = run(sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", test)
    if result.returncode in (2, 3, 4, 5):  # pytest's: it did not come to run the test
        raise RuntimeError(result.stdout + result.stderr)
    return result.returncode != 0


def main(names: list[str]) -> int:
    defects = read()
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split("\n")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            write(COPY / file, (ROOT / file).read_bytes())
    survivors = []
    for name in names or defects:
        start, defect = time.monotonic(), defects[name]
        path = COPY / defect["file"]
        original = path.read_bytes()
        write(path, planted(original.decode(), name, defect).encode())
        try:
            caught = [test for test in defect["tests"] if catches(test)]
        finally:
            write(path, original)
        survivors += [name] * (not caught)
        verdict = f"caught by {', '.join(caught)}" if caught else "SURVIVES"
        passed = ", ".join(set(defect["tests"]) - set(caught))
        print(f"{name}: {verdict}{passed and f'; passes {passed}'} ({time.monotonic() - start:.0f} s)", flush=True)
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
