"""The rules, one function each, in the order of operations of ``csrc/rules/*.h``, so that both give the same bits.

``p``, ``g`` and the state tensors are real and of the compute dtype (float32, or float64 for float64 parameters). A
function writes the new states into ``state`` and returns the new parameter. Its keyword arguments are the options of
``struct Options`` there, and ``t``, the step count. ``running``: states that are one number each, which it advances.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .adafactor import adafactor
from .adams import adam, adamax, adan, ademamix, adopt, nadam, radam
from .others import adadelta, adagrad, asgd, lion, muon_momentum, muon_update, rmsprop, rprop, sgd
from .prodigy import prodigy, prodigy_shares
from .schedule_free import adamw_schedule_free, radam_schedule_free, sgd_schedule_free
from .trust import lamb, lars, stable_adamw

# Those that are given `total`.
TOTALED = frozenset({"adam", "lion", "lars", "lamb", "stable_adamw", "adafactor"})
# Of these, those whose totals are no sums of squares.
PLAIN = frozenset({"stable_adamw"})
# Those that are given `shared` and `totals` of all tensors together, and what each element adds to these.
SHARES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"prodigy": prodigy_shares}
RULES: dict[str, Callable[..., Tensor]] = {
    rule.__name__: rule
    for rule in (
        adam,
        sgd,
        rmsprop,
        adagrad,
        lion,
        adamax,
        adadelta,
        radam,
        rprop,
        ademamix,
        nadam,
        asgd,
        adopt,
        adan,
        lars,
        lamb,
        stable_adamw,
        adamw_schedule_free,
        sgd_schedule_free,
        radam_schedule_free,
        prodigy,
        adafactor,
        muon_momentum,
        muon_update,
    )
}
