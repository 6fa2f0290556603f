"""What a step costs on the host, for callgrind to count: ``step()`` from Python to the last version counter.

``instructions.py`` runs this under ``valgrind --tool=callgrind --instr-atstart=no`` with the library that speaks to
callgrind as its argument. Parameters have one element, so that kernels have next to nothing to do.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import sys

import torch

from genopt_ext import _C, _build_info, optim

TENSORS = 2000


def parameters(tensors: int) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.ones(1)
    return params


def main(library: str) -> None:
    callgrind = ctypes.CDLL(library)
    torch.set_num_threads(1)
    print("compiler", _build_info.COMPILER, sep="\t")
    print("capability", _C.cpu_capability(), sep="\t")
    print("python", platform.python_version(), sep="\t")
    print("torch", torch.__version__, sep="\t")
    cases = {
        "host: AdamW 1x1": (1, optim.AdamW(parameters(1))),
        "host: AdamW 2000x1": (TENSORS, optim.AdamW(parameters(TENSORS))),
        "host: AdamW clipped 2000x1": (TENSORS, optim.AdamW(parameters(TENSORS), max_grad_norm=1.0)),
        "host: AdamW 200 groups of 10x1": (
            TENSORS,
            optim.AdamW([{"params": parameters(10)} for _ in range(TENSORS // 10)]),
        ),
    }
    gc.disable()
    for name, (elements, optimizer) in cases.items():
        for _ in range(20):  # until the state is there and the interpreter has specialized its instructions
            optimizer.step()
        # Counts of one and of three steps: their difference is free of what a count itself costs.
        for steps in (1, 3):
            callgrind.start()
            callgrind.zero()
            for _ in range(steps):
                optimizer.step()
            callgrind.dump(f"{name}@{steps}".encode())
            callgrind.stop()
        print("case", name, elements, sep="\t")


if __name__ == "__main__":
    main(sys.argv[1])
