"""Where the tests run.

``GENOPT_TEST_DEVICE=cuda`` puts every tensor on the GPU. ``GENOPT_TEST_CUDA_ON_CPU=path/_C.so`` takes the
extension that CMake builds with ``GENOPT_PYTHON=ON``: its CUDA kernels run on a CPU, and serve CPU tensors.
``GENOPT_TEST_SAMPLE=1`` takes a class of each kind, for what has been tested with all but for torch's version.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.register_assert_rewrite("cases", "low_precision", "recipe")

# Each worker of pytest-xdist has its share of the cores, and so have processes that it starts: with as many threads as
# cores in each, they mostly wait for one another.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

# Before anything imports genopt_ext.
if path := os.environ.get("GENOPT_TEST_CUDA_ON_CPU"):
    spec = importlib.util.spec_from_file_location("genopt_ext._C", path)
    assert spec is not None and spec.loader is not None
    sys.modules["genopt_ext._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["genopt_ext._C"])

if device := os.environ.get("GENOPT_TEST_DEVICE"):
    torch.set_default_device(device)


# Of each way in which rules differ one: states of a moment and of a number, totals of a row and of all, factors.
SAMPLE = ("AdamW", "SGD", "NAdam", "LAMB", "Prodigy", "Adafactor")
sampled = bool(path or os.environ.get("GENOPT_TEST_SAMPLE"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a class refuses: narrow state, complex parameters.

    Of a sample also all cases but those with the most states of its classes. On the CPU stand-in for CUDA test_bits.py
    has those of all classes: C++ tests try their options there.
    """
    from cases import CASES, Case, is_refused

    def is_left_out(item: pytest.Item) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if is_refused(given, item.get_closest_marker("narrow_state") is not None):
            return True
        case = given.get("case")
        if not sampled or not isinstance(case, Case) or case not in CASES:
            return False
        return not case.stateful or (item.path.name != "test_bits.py" and case.name not in SAMPLE)

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


@pytest.fixture(params=["auto"] if path else ["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """For tests that hold for kernels and reference alike, as ``cases.BACKENDS``."""
    return str(request.param)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(set_threads: Callable[[int], None]) -> None:
    set_threads(2)


# One process imports torch, which takes seconds, and forks for each piece of code.
SERVER = """
import json, os, sys, traceback
import torch, torch._dynamo  # what every optimizer's constructor would import
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            for fd, path in enumerate((os.devnull, job["out"], job["err"])):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
            os.environ.update(job["env"])
            sys.path[:0] = job["path"]
            exec(job["code"], {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Fresh = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """``fresh(code, **env)`` runs ``code`` in a process that has torch, and nothing of genopt_ext yet."""
    folder = tmp_path_factory.mktemp("fresh")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    count = itertools.count()

    def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
        out, err = (folder / f"{next(count)}" for _ in range(2))
        path = [os.path.dirname(__file__), *filter(None, sys.path)]
        job = dict(code=code, env=env, path=path, out=str(out), err=str(err))
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return subprocess.CompletedProcess(code, int(server.stdout.readline()), out.read_text(), err.read_text())

    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes, text=True) as server:
        yield run


@pytest.fixture(scope="session")
def succeeds(fresh: Fresh) -> Callable[..., str]:
    """What ``fresh(code, **env)`` prints, which must not fail."""

    def run(code: str, **env: str) -> str:
        out = fresh(code, **env)
        assert out.returncode == 0, out.stderr
        return out.stdout

    return run
