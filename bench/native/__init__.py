"""The benchmarks' own C++: a loop that moves bytes and computes nothing, built on first use into ``build/bench``."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build" / "bench"
ARRAYS = 8  # that the loop takes


def build() -> Path:
    """The library, compiled anew where its sources, the compiler or torch have changed."""
    compiler = os.environ.get("CXX", "c++").split()
    if not shutil.which(compiler[0]):
        raise SystemExit(
            f"bench: the limit needs a C++ compiler, and there is no {compiler[0]}; install g++ or set CXX"
        )
    torch_folder = Path(torch.__file__).parent / "lib"
    # OpenMP's threads are those of torch, as with the kernels: -fopenmp compiles, and linking leaves its runtime out.
    compile_flags = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
    link_flags = ["-shared", "-Wl,--no-as-needed", f"-L{torch_folder}", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}"]
    made_of = [*(path.read_bytes() for path in sorted(HERE.glob("*.[ch]*"))), repr([compiler, torch_folder]).encode()]
    library = BUILD / f"memory_loop-{hashlib.sha256(b''.join(made_of)).hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, and then moved : another process may be building it too.
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made, object_file = Path(folder) / library.name, str(Path(folder) / "memory_loop.o")
            for command in (
                [*compiler, *compile_flags, "-c", str(HERE / "memory_loop.cpp"), "-o", object_file],
                [*compiler, object_file, *link_flags, "-o", str(made)],
            ):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"bench: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
            made.replace(library)
    return library


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    addresses, flag = ctypes.POINTER(ctypes.c_size_t), ctypes.c_bool
    numbers = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    library.move_bytes.argtypes = [ctypes.c_char_p, addresses, *numbers, flag, flag, flag]
    library.move_bytes.restype = None
    return library


# How the fastest loop moves memory, by what it was asked for.
_fastest: dict[tuple[tuple[bool, ...], int, int, bool], tuple[bool, bool, str]] = {}


class MemoryLoop:
    """Reads ``bytes`` (a multiple of 64) of every array together, front to back, and writes back some, when called.

    ``arrays``: an address, aligned to 64, and whether it is written, for each. ``fresh``: those written are not read.
    ``capability``: whose vectors it has; None: those of the kernels.
    """

    def __init__(
        self,
        arrays: Sequence[tuple[int, bool]],
        bytes: int,
        threads: int,
        fresh: bool = False,
        prefetches: bool = True,
        non_temporal: bool = False,
        capability: str | None = None,
    ) -> None:
        from genopt_ext import _C  # not above: what only shows results needs no extension

        if len(arrays) > ARRAYS:
            raise ValueError(f"the loop takes {ARRAYS} arrays, got {len(arrays)}")
        addresses = [address for address, _ in sorted(arrays, key=lambda array: not array[1])]
        kept = (ctypes.c_size_t * len(addresses))(*addresses)
        written = sum(written for _, written in arrays)
        how = fresh, prefetches, non_temporal
        capability = capability or _C.cpu_capability()
        self._arguments = (capability.encode(), kept, len(arrays), written, bytes, threads, *how)
        self._call = _library().move_bytes

    @classmethod
    def fastest(
        cls, arrays: Sequence[tuple[int, bool]], bytes: int, threads: int, fresh: bool = False, rounds: int = 5
    ) -> MemoryLoop:
        """The fastest on this machine, measured once for arrays of a kind.

        Loops prefetch or do not, store non-temporally or do not, and have the two widest vectors.
        """
        from genopt_ext import _C

        kind = tuple(written for _, written in arrays), bytes, threads, fresh
        if kind in _fastest:
            return cls(arrays, bytes, threads, fresh, *_fastest[kind])
        # Wide vectors are not always faster: AMD's Zen 4 reads 8 % more with those of 32 bytes than of 64.
        vectors = _C.cpu_capabilities()[:2]
        hows = list(itertools.product((False, True), (False, True) if any(kind[0]) else (False,), vectors))
        loops = [cls(arrays, bytes, threads, fresh, *how) for how in hows]
        times: list[list[float]] = [[] for _ in loops]
        for _ in range(rounds):
            for loop, taken in zip(loops, times, strict=True):
                begin = time.perf_counter()
                loop()
                taken.append(time.perf_counter() - begin)
        best = min(range(len(loops)), key=lambda i: statistics.median(times[i]))
        _fastest[kind] = hows[best]
        return loops[best]

    def __call__(self) -> None:
        self._call(*self._arguments)
