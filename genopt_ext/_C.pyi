"""The native kernels of genopt_ext: csrc/bindings.cpp."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

_Pairs = list[tuple[int, int]]

class _Refusal(TypedDict):
    rows: dict[int, list[tuple[str, str]]]
    groups: list[int]
    overlaps: _Pairs
    grad_overlaps: _Pairs
    devices: list[int]
    of_processes: bool
    gradients_overlap: bool

class Stepper:
    def __init__(self, rule: str, backend: str) -> None: ...
    @property
    def launches(self) -> int: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        skipped: Sequence[int],
        *,
        grads: list[Any] | None = None,
        max_norm: float = -1.0,
        scale: float = 1.0,
        norm: int = 0,
        measure: bool = False,
        guard: bool = False,
        gradients: Literal["zeroed", "unscaled"] | None = None,
        only_measure: bool = False,
        only_check: bool = False,
        grad_scale: list[Any] | None = None,
        found_inf: list[Any] | None = None,
        group_scales: list[Any] | None = None,
        grad_norm: list[Any] | None = None,
        nonfinite: list[Any] | None = None,
        skipped_steps: list[Any] | None = None,
        shared: list[Any] | None = None,
        row_sums: list[Any] | None = None,
    ) -> _Refusal | None: ...

has_cuda: bool

def set_entrance(params: list[Any], enter: Callable[[int], None] | None) -> None: ...
def is_observed() -> bool: ...
def is_watched() -> bool: ...
def rules() -> dict[str, tuple[bool, list[str], list[tuple[str, int]]]]: ...
def cpu_capability() -> str: ...
def cpu_capabilities() -> list[str]: ...
def cpu_tuning() -> str: ...
def kernels_for(t: Any) -> str | None: ...
def quantize_blocks(x: Any, codes: Any, scale: Any, zero_point: Any, seed: Any, *, bits: int, run: int) -> None: ...
def find_scales(x: Any, scale: Any, zero_point: Any, ranges: Any, *, bits: int, run: int) -> None: ...
def encode(x: Any, codes: Any, scale: Any, zero_point: Any, seed: Any, *, bits: int, run: int) -> None: ...
def decode(codes: Any, scale: Any, zero_point: Any, out: Any, *, bits: int, run: int) -> None: ...
