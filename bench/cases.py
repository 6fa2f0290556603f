"""The cases that are timed: which tensors, which optimizer, how its state is stored, and the bytes that this moves."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from genopt_ext.reference import codecs

Shape = tuple[int, ...]
BLOCK = 256  # elements that share a scale of 8-bit state, and of quantize


@dataclass(frozen=True)
class Move:
    """Something of ``width`` bytes an element that is read and written so many times."""

    width: float
    read: int
    written: int


@dataclass(frozen=True)
class Case:
    """One row of the table. ``state``: how moments are stored; None: in the parameter's dtype, as torch does.

    ``kind``: ``step``, the optimizer's; ``clip``, ``clip_grad_norm_`` alone; ``quantize``, ``dequantize``;
    ``training``, whole steps of the demo's model; ``save``, ``load``, the optimizer's checkpoint.
    ``amp``: a GradScaler looks for infinities. ``warm``: tensors are few enough for the caches, and not rotated.
    ``graph``: on CUDA, steps are replays of a captured one. ``offset``: elements by which parameters and gradients
    stand behind an allocation's start. ``gradients``: without them, every ``.grad`` is None.
    ``main``: the README shows it. ``goal``: what it is to reach, where somebody said so.
    """

    name: str
    optimizer: str
    shapes: tuple[Shape, ...]
    kind: str = "step"
    dtype: torch.dtype = torch.float32
    state: torch.dtype | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    clip: float | None = None
    ema: float | None = None
    amp: bool = False
    rounding: str = "nearest"
    master: bool = False
    warm: bool = False
    graph: bool = False
    offset: int = 0
    gradients: bool = True
    main: bool = False
    goal: str = ""

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def moments(self) -> int:
        on = [name for name in ("momentum", "centered", "amsgrad") if self.kwargs.get(name)]
        of_class = {"SGD": 0, "LARS": 0, "RMSprop": 1, "Adagrad": 1, "ASGD": 1, "SGDScheduleFree": 1}
        of_class |= {"AdEMAMix": 3, "Adan": 4, "Prodigy": 4, "Adafactor": 0}  # of matrices: next to none
        return of_class.get(self.optimizer, 2) + len(on)

    @property
    def stored(self) -> tuple[float, ...]:
        """Bytes an element of each thing that the optimizer keeps."""
        moment = self.code_bytes if self.state == torch.int8 else float((self.state or self.dtype).itemsize)
        extra = {"kahan": self.rounding == "kahan", "master": self.master, "ema": self.ema is not None}
        widths = {"kahan": self.dtype.itemsize, "master": 4, "ema": self.dtype.itemsize}
        return (moment,) * self.moments + tuple(float(widths[name]) for name, kept in extra.items() if kept)

    @property
    def code_bytes(self) -> float:
        """Bytes an element of 8-bit state: a code, and its share of a scale."""
        scales = (codecs.scales_shapes(torch.empty(shape, device="meta"))[0].numel() for shape in self.shapes)
        return 1 + 4 * sum(scales) / self.elements

    @property
    def state_bytes(self) -> float:
        """An element."""
        return sum(self.stored)

    @property
    def moves(self) -> tuple[Move, ...]:
        """The least that must go through memory; nothing where no bound is known or nothing moves."""
        width = self.dtype.itemsize
        coded = 1 + 4 / BLOCK
        if not self.gradients:
            return ()
        if self.kind == "step":
            # The norm, and the search for infinities, must be through with all gradients before the first update.
            gradient = Move(width, 1 + (self.clip is not None or self.amp), 0)
            # So must what a rule needs to know of a whole tensor.
            moments = self.stored[: self.moments]
            totaled = {"LARS": (width, width), "LAMB": (width, width, *moments), "StableAdamW": (width, *moments[1:])}
            totaled["Prodigy"] = (width, width, *moments[:2])
            totaled["Adafactor"] = (width, width, width)  # the gradient twice: squares, and the update's norm
            if self.kwargs.get("cautious") == "update":
                totaled[self.optimizer] = width, moments[0]
            before = (Move(each, 1, 0) for each in totaled.get(self.optimizer, ()))
            read_only = 1 if self.optimizer == "Prodigy" else None  # where weights began
            kept = (Move(each, 1, int(i != read_only)) for i, each in enumerate(self.stored))
            return Move(width, int(not self.master), 1), gradient, *before, *kept
        return {
            "clip": (Move(width, 1, 0),),
            "quantize": (Move(width, 1, 0), Move(coded, 0, 1)),
            "dequantize": (Move(coded, 1, 0), Move(width, 0, 1)),
            "save": (Move(self.state_bytes, 1, 1),),
            "load": (Move(self.state_bytes, 1, 1),),
            "training": (),
        }[self.kind]

    @property
    def bytes(self) -> float:
        """Moved by one round."""
        return self.elements * self.bytes_an_element

    @property
    def bytes_an_element(self) -> float:
        return sum(move.width * (move.read + move.written) for move in self.moves)

    @property
    def ours(self) -> dict[str, Any]:
        """Options that only our classes have."""
        options: dict[str, Any] = {}
        if self.clip is not None:
            options["max_grad_norm"] = self.clip
        if self.ema is not None:
            options["ema_decay"] = self.ema
        if self.state is not None:
            options["state_dtype"] = self.state
        if self.state == torch.int8:
            options["min_int8_size"] = 0
        if self.rounding != "nearest":
            options["param_rounding"] = self.rounding
        if self.master:
            options["master_weights"] = True
        return options


def short(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _gpt2() -> tuple[Shape, ...]:
    norm, width = (768,), 768
    attention = [norm, norm, (width, 3 * width), (3 * width,), (width, width), norm]
    mlp = [norm, norm, (width, 4 * width), (4 * width,), (4 * width, width), norm]
    return ((50257, width), (1024, width), *(attention + mlp) * 12, norm, norm)


LLAMA = {"width": 2048, "keys": 512, "hidden": 8192, "layers": 16, "words": 128256}


def _llama_linears() -> list[Shape]:
    width, keys, hidden = (LLAMA[name] for name in ("width", "keys", "hidden"))
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    return attention + [(hidden, width), (hidden, width), (width, hidden)]


def _llama() -> tuple[Shape, ...]:
    norm = (LLAMA["width"],)
    return ((LLAMA["words"], LLAMA["width"]), *[*_llama_linears(), norm, norm] * LLAMA["layers"], norm)


def _lora(layers: int = 32, ranks: tuple[int, ...] = (8, 16), adapters: int = 2) -> tuple[Shape, ...]:
    """A and B of every linear layer, for ``adapters`` adapters of each rank."""
    pairs = [((rank, n), (m, rank)) for m, n in _llama_linears() for rank in ranks]
    return tuple(shape for pair in pairs for shape in pair) * layers * adapters


def shrunk(shapes: tuple[Shape, ...], scale: float) -> tuple[Shape, ...]:
    """As many tensors, with ``scale`` of the elements each."""
    return shapes if scale >= 1 else tuple((max(1, int(math.prod(shape) * scale)),) for shape in shapes)


def _fraction(scale: float) -> str:
    return f" /{round(1 / scale)}" if scale < 1 else ""


def cases(scale: float, memory: float) -> list[Case]:
    """The table. ``scale`` shrinks the large cases from 64M elements, and the many small tensors from 0.01 on.

    ``memory``: bytes that are free, of which the 1B list takes a fraction that lets ten subjects stand side by side.
    """
    large: tuple[Shape, ...] = ((max(1, int((1 << 14) * scale)) * 4096,),)  # whole blocks, which torchao needs
    m = f"{large[0][0] / 2**20:.3g}M"
    gpt2, gpt2_name = shrunk(_gpt2(), scale), "GPT-2" + _fraction(scale)
    llama = _llama()
    share = min(scale, 0.4 * memory / (160 * sum(map(math.prod, llama))))
    share = 2.0 ** math.floor(math.log2(share)) if share < 1 else 1.0
    few = min(1.0, 100 * scale)
    lora = shrunk(_lora(max(1, int(32 * few))), scale)

    def many(count: int, size: int) -> tuple[tuple[Shape, ...], str]:
        return ((size,),) * max(1, int(count * few)), f"{max(1, int(count * few))}x{size}"

    (small, small_name), (tiny, tiny_name), (single, single_name) = many(2000, 1024), many(20000, 64), many(2000, 1)
    bf16, fp32, int8 = torch.bfloat16, torch.float32, torch.int8
    momentum, centered = {"momentum": 0.9}, {"centered": True, "momentum": 0.9}
    return [
        Case(f"AdamW {m}", "AdamW", large, main=True),
        Case(f"Adam {m}", "Adam", large),
        Case(f"SGD momentum {m}", "SGD", large, kwargs=momentum, main=True),
        Case(f"RMSprop {m}", "RMSprop", large, main=True),
        Case(f"RMSprop centered momentum {m}", "RMSprop", large, kwargs=centered),
        Case(f"Adagrad {m}", "Adagrad", large, main=True),
        *(
            Case(f"{name} {m}", name, large)
            for name in (
                "Adadelta",
                "Adamax",
                "RAdam",
                "Rprop",
                "NAdam",
                "ASGD",
                "AdEMAMix",
                "ADOPT",
                "Adan",
                "AdamWScheduleFree",
            )
        ),
        *(Case(f"{name} {m}", name, large) for name in ("LAMB", "StableAdamW", "Prodigy")),
        Case(f"Adafactor {m}", "Adafactor", ((large[0][0] // 4096, 4096),)),
        Case(f"LARS {m}", "LARS", large, kwargs={**momentum, "weight_decay": 0.01}),
        Case(f"AdamW cautious update {m}", "AdamW", large, kwargs={"cautious": "update"}),
        Case(f"AdamW cautious update {small_name}", "AdamW", small, kwargs={"cautious": "update"}),
        Case(f"AdamW {gpt2_name}", "AdamW", gpt2, main=True),
        Case(f"AdamW Llama 1B{_fraction(share)}", "AdamW", shrunk(llama, share), main=True),
        Case(f"AdamW LoRA{_fraction(scale)} ({len(lora)})", "AdamW", lora, main=True),
        Case(f"AdamW {small_name}", "AdamW", small, main=True),
        Case(f"AdamW {small_name} warm", "AdamW", small, warm=True),
        Case(f"AdamW {tiny_name}", "AdamW", tiny, main=True),
        Case(f"AdamW {tiny_name} warm", "AdamW", tiny, warm=True),
        Case(f"AdamW {single_name}", "AdamW", single, main=True),
        Case(f"SGD momentum {small_name}", "SGD", small, kwargs=momentum),
        Case(f"Adagrad {small_name}", "Adagrad", small),
        Case(f"AdamW bf16 {m}", "AdamW", large, dtype=bf16, main=True),
        Case(f"AdamW bf16 kahan {m}", "AdamW", large, dtype=bf16, rounding="kahan"),
        Case(f"AdamW mixed {m}", "AdamW", large, dtype=bf16, state=fp32, main=True),
        Case(f"AdamW mixed stochastic {m}", "AdamW", large, dtype=bf16, state=fp32, rounding="stochastic", main=True),
        Case(f"AdamW mixed master {m}", "AdamW", large, dtype=bf16, state=fp32, master=True),
        Case(f"AdamW bf16 state {m}", "AdamW", large, state=bf16),
        Case(f"AdamW int8 {m}", "AdamW", large, state=int8, main=True),
        Case(f"AdamW int8 bf16 {m}", "AdamW", large, dtype=bf16, state=int8, main=True),
        Case(f"AdamW int8 {small_name}", "AdamW", small, state=int8),
        Case(f"RMSprop int8 {m}", "RMSprop", large, state=int8),
        Case(f"AdamW clipped {gpt2_name}", "AdamW", gpt2, clip=1.0, main=True),
        Case(f"AdamW clipped {small_name}", "AdamW", small, clip=1.0),
        Case(f"AdamW AMP {gpt2_name}", "AdamW", gpt2, amp=True),
        Case(f"AdamW AMP clipped {gpt2_name}", "AdamW", gpt2, amp=True, clip=1.0, main=True),
        Case(f"AdamW EMA {m}", "AdamW", large, ema=0.999, main=True),
        Case(f"clip_grad_norm_ {gpt2_name}", "AdamW", gpt2, kind="clip"),
        Case(f"quantize int8 {m}", "AdamW", large, kind="quantize", main=True),
        Case(f"dequantize int8 {m}", "AdamW", large, kind="dequantize", main=True),
        Case(f"save AdamW {gpt2_name}", "AdamW", gpt2, kind="save"),
        Case(f"load AdamW {gpt2_name}", "AdamW", gpt2, kind="load"),
        Case("training step of the demo's GPT", "AdamW", gpt_shapes(), kind="training", main=True),
    ]


def gpt_shapes() -> tuple[Shape, ...]:
    from examples.train_gpt import load_text

    from .training import small_gpt

    with torch.device("meta"):
        return tuple(tuple(p.shape) for p in small_gpt(load_text()[1]).parameters())


def selected(table: list[Case], wanted: list[str]) -> list[Case]:
    """Those whose name contains, or matches as a regular expression, any of ``wanted``; all where it is empty.

    Raises:
        ValueError: none does.
    """

    def fits(name: str, pattern: str) -> bool:
        try:
            return pattern.lower() in name.lower() or re.search(pattern, name, re.IGNORECASE) is not None
        except re.error:
            return False

    found = [case for case in table if not wanted or any(fits(case.name, pattern) for pattern in wanted)]
    if not found:
        raise ValueError(f"no case is called {' or '.join(map(repr, wanted))}; python -m bench list shows them")
    return found
