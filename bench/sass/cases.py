"""What is run: signatures, by what a row is made of, times shapes. Which kernel serves one the plan decides.

A case is a line of key=value for launches.cpp. A new signature is one entry here.
"""

from __future__ import annotations

from dataclasses import dataclass

# Tiles have 256 elements, spans of norms and totals 8192, those of a tensor's range 4096.
SHAPES = {"whole": 2 * 256, "tail": 256 + 232, "small": 64}
SPAN_SHAPES = {"whole": 2 * 8192, "tail": 8192 + 1000, "small": 64}
_OF_SPANS = ("measures=1", "totals=1", "blocks=0")

# Options in the order of the rule's kOptions.
_ADAMW = "rule=adam options=1e-3,0.9,0.999,1e-8,0.01,0,0,1"
_SGD = "rule=sgd options=1e-2,0.9,0,0.01,0,0"
_RMSPROP = "rule=rmsprop options=1e-3,0.99,1e-8,0.01,0,0,0"
_ADAGRAD = "rule=adagrad options=1e-2,0,1e-10,0.01,0"
_LION = "rule=lion options=1e-4,0.9,0.99,0.01,0"
_ADAMAX = "rule=adamax options=2e-3,0.9,0.999,1e-8,0.01,0"
_ADADELTA = "rule=adadelta options=1,0.9,1e-6,0.01,0"
_RADAM = "rule=radam options=1e-3,0.9,0.999,1e-8,0.01,0,1"
_RPROP = "rule=rprop options=0.5,1.2,1e-6,50,0"
_NADAM = "rule=nadam options=2e-3,0.9,0.999,1e-8,0.01,4e-3,0,1"
_ASGD = "rule=asgd options=1e-2,1e-4,0.75,100,0.01,0"
_ADOPT = "rule=adopt options=1e-3,0.9,0.9999,1e-6,0.01,1,0.25,0"
_ADAN = "rule=adan options=1e-3,0.98,0.92,0.99,1e-8,0.01,0,0"
_ADEMAMIX = "rule=ademamix options=1e-3,0.9,0.999,0.9999,2,2000,2000,1e-8,0.01,0"
_ADAMW_FREE = "rule=adamw_schedule_free options=2.5e-3,0.9,0.999,1e-8,0.01,2000,0.5,2,0"
_SGD_FREE = "rule=sgd_schedule_free options=1,0.9,0.01,2000,0,2,0"
_RADAM_FREE = "rule=radam_schedule_free options=2.5e-3,0.9,0.999,1e-8,0.01,0,2,1,0"
_LARS = "rule=lars options=1,0.9,0,0.01,0,1e-3,1e-8,0,0,0"
_LAMB = "rule=lamb options=1e-3,1,0.9,0.999,1e-6,0.01,1,0,0,0,0"
_STABLE = "rule=stable_adamw options=1e-3,0.9,0.99,1e-6,0.01,0"
_PRODIGY = "rule=prodigy options=1,0.9,0.999,-1,1e-8,0.01,1,0,0,1e-6,1,inf,0"
_ADAFACTOR = "rule=adafactor options=1e-2,-0.8,1e-30,1e-3,1,0,0"
_MUON_MOMENTUM = "rule=muon_momentum options=0.95,1"
_MUON_UPDATE = "rule=muon_update options=1e-3,1,0.1,0"
_HALVES = "weights=bfloat16 gradient=bfloat16"

SIGNATURES = {
    "AdamW fp32": f"kind=step {_ADAMW}",
    "AdamW fp32, zeros": f"kind=step {_ADAMW} zeros=1",  # but for the weights, as in unused rows of an embedding
    "AdamW bf16, fp32 state": f"kind=step {_ADAMW} {_HALVES}",
    "AdamW fp32, cautious": f"kind=step {_ADAMW},1",
    "AdamW fp32, cautious update": f"kind=step {_ADAMW},2",
    "AdamW fp32, cautious update, totals": f"kind=step totals=1 {_ADAMW},2",
    "AdamW fp32, int8 state, cautious": f"kind=step {_ADAMW},1 states=int8",
    "AdamW bf16 stochastic, fp32 state": f"kind=step {_ADAMW} {_HALVES} unbiased=weights",
    "AdamW bf16 with masters": f"kind=step {_ADAMW} {_HALVES} extra=master",
    "AdamW bf16 with Kahan sums": f"kind=step {_ADAMW} {_HALVES} extra=compensation",
    "AdamW fp32, bf16 state": f"kind=step {_ADAMW} states=bfloat16",  # which no lean kernel serves
    "AdamW all bf16": f"kind=step {_ADAMW} {_HALVES} states=bfloat16",
    "AdamW all bf16, NaN": f"kind=step {_ADAMW} {_HALVES} states=bfloat16 nans=1",
    "AdamW all fp16, NaN": f"kind=step {_ADAMW} weights=float16 gradient=float16 states=float16 nans=1",
    "AdamW all bf16, bf16 state by thresholds": f"kind=step {_ADAMW} {_HALVES} states=bfloat16 unbiased=states",
    "AdamW fp32, int8 state": f"kind=step {_ADAMW} states=int8",
    "AdamW bf16, int8 state": f"kind=step {_ADAMW} {_HALVES} states=int8",
    "AdamW bf16, int8 state, blocks of 160": f"kind=step {_ADAMW} {_HALVES} states=int8 block=160",
    "SGD momentum fp32": f"kind=step {_SGD}",
    "RMSprop fp32": f"kind=step {_RMSPROP}",
    "RMSprop bf16 with Kahan sums": f"kind=step {_RMSPROP} {_HALVES} extra=compensation",
    "RMSprop fp32, bf16 state": f"kind=step {_RMSPROP} states=bfloat16",
    "Adagrad fp32": f"kind=step {_ADAGRAD}",
    "Lion fp32": f"kind=step {_LION}",
    "Adamax fp32": f"kind=step {_ADAMAX}",
    "NAdam fp32": f"kind=step {_NADAM}",
    "ASGD fp32": f"kind=step {_ASGD}",
    "ADOPT fp32": f"kind=step {_ADOPT}",
    "Adan fp32": f"kind=step {_ADAN}",
    "Adan fp32, int8 state": f"kind=step {_ADAN} states=int8",
    "Adadelta fp32": f"kind=step {_ADADELTA}",
    "RAdam fp32": f"kind=step {_RADAM}",
    "Rprop fp32": f"kind=step {_RPROP}",
    "AdEMAMix fp32": f"kind=step {_ADEMAMIX}",
    "AdEMAMix fp32, int8 state": f"kind=step {_ADEMAMIX} states=int8",
    "AdamW schedule-free fp32": f"kind=step {_ADAMW_FREE}",
    "SGD schedule-free fp32": f"kind=step {_SGD_FREE}",
    "RAdam schedule-free fp32": f"kind=step {_RADAM_FREE}",
    "LARS fp32": f"kind=step {_LARS}",
    "LAMB fp32": f"kind=step {_LAMB}",
    "LAMB bf16, fp32 state": f"kind=step {_LAMB} {_HALVES}",
    "LAMB fp32, int8 state": f"kind=step {_LAMB} states=int8",
    "StableAdamW fp32": f"kind=step {_STABLE}",
    "Prodigy fp32": f"kind=step {_PRODIGY}",
    "Adafactor fp32, matrix": f"kind=step {_ADAFACTOR} columns=8",
    "Adafactor fp32, vector": f"kind=step {_ADAFACTOR}",
    # Where matrices of bf16 are made orthogonal, whatever the parameter's dtype.
    "Muon momentum fp32": f"kind=step {_MUON_MOMENTUM} weights=bfloat16",
    "Muon momentum bf16": f"kind=step {_MUON_MOMENTUM} {_HALVES} states=bfloat16",
    "Muon update fp32": f"kind=step {_MUON_UPDATE} gradient=bfloat16",
    "Muon update bf16": f"kind=step {_MUON_UPDATE} {_HALVES}",
    "LARS fp32, totals": f"kind=step totals=1 {_LARS}",
    "LAMB fp32, totals": f"kind=step totals=1 {_LAMB}",
    "LAMB bf16, fp32 state, totals": f"kind=step totals=1 {_LAMB} {_HALVES}",
    "LAMB fp32, int8 state, totals": f"kind=step totals=1 {_LAMB} states=int8",
    "StableAdamW fp32, totals": f"kind=step totals=1 {_STABLE}",
    "Prodigy fp32, totals": f"kind=step totals=1 {_PRODIGY}",
    "Adafactor fp32, matrix, squares": f"kind=step totals=1 {_ADAFACTOR} columns=8",
    "norm fp32": f"kind=step measures=1 {_ADAMW}",
    "norm bf16": f"kind=step measures=1 {_ADAMW} {_HALVES}",
    "quantize fp32 in blocks of 256": "kind=quantize",
    "ranges fp32 by tensor": "kind=quantize blocks=0 run=1048576",
    "codes fp32 by tensor": "kind=quantize blocks=0 run=1048576 counts=codes",
    "dequantize fp32 in blocks of 256": "kind=dequantize",
}


@dataclass(frozen=True)
class Case:
    name: str
    shape: str
    line: str

    def value(self, key: str) -> str | None:
        return dict(word.split("=", 1) for word in self.line.split()).get(key)

    @property
    def source(self) -> str:
        """Where its kernel is to be looked for first, below csrc."""
        if self.value("measures"):
            return "cuda/norm.cu"
        rule = self.value("rule")
        return f"cuda/{rule}.cu" if rule else "quant/cuda.cu"

    @property
    def counts_first(self) -> bool:
        """Whether the first launch that reads the operand is counted, or the last: totals come before the update."""
        return self.value("kind") != "step" or bool(self.value("totals"))

    @property
    def operand(self) -> str:
        """The tensor whose first element's warp is counted, or its last one's: every kernel of this kind reads it."""
        if given := self.value("counts"):
            return given
        name = {"step": "gradient", "quantize": "numbers", "dequantize": "codes"}[self.value("kind") or ""]
        return f"{name} {int(rows) - 1}" if (rows := self.value("rows")) else name


def all_cases() -> list[Case]:
    made = []
    for name, line in SIGNATURES.items():
        shapes = SPAN_SHAPES if any(each in line for each in _OF_SPANS) else SHAPES
        made += [Case(f"{name}, {shape}", shape, f"{line} numel={numel}") for shape, numel in shapes.items()]
    rows = f"{SIGNATURES['AdamW fp32']} numel=64 rows=40"  # so many that a warp searches for its own in two rounds
    made.append(Case("AdamW fp32, 40 rows of 64", "rows", rows))
    for name in ("AdamW", "SGD momentum", "RMSprop", "Adagrad", "Lion", "RAdam", "AdEMAMix", "AdamW schedule-free"):
        # All launches of a step are run in every case; this counts the one that makes a row's scalars.
        made.append(Case(f"{name}, prologue", "whole", f"{SIGNATURES[f'{name} fp32']} numel=64 counts=step"))
    return made
