"""A model's weights as codes: :func:`quantize_module_`, which replaces its layers by those of ``layers.py``."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import ops
from .form import DTYPES, QuantizedTensor, check_form, check_nonfinite
from .layers import QUANTIZED, QuantizedLayer, QuantizedWeight

_WHERE = "quantize_module_"
_LAYERS: tuple[type[nn.Module], ...] = tuple(QUANTIZED)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerBytes:
    """One quantized layer: bytes of its weight before, and of codes, scales and zero points after.

    A layer whose weight is tied to that of one before has 0 and 0, and that one's name in ``tied_to``.
    """

    kind: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    tied_to: str | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize_module_` did; ``print`` it for a table.

    Attributes:
        layers: what was quantized, by name in the model.
        skipped: what could have been and was not, by name, and why.
        bytes_before: of all parameters and buffers of the model, each counted once.
        bytes_after: of all parameters and buffers afterwards.
    """

    layers: dict[str, LayerBytes]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        rows = [("layer", "kind", "bytes before", "after")]
        for name, layer in self.layers.items():
            sizes = (
                ("tied to", layer.tied_to) if layer.tied_to else (f"{layer.bytes_before:,}", f"{layer.bytes_after:,}")
            )
            rows.append((name or "(model)", layer.kind, *sizes))
        rows.append(("all of the model", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows
        ]
        lines += [f"skipped {name or '(model)'}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def _bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values() if not nn.parameter.is_lazy(t))


def _skipper(skip: Any, names: dict[nn.Module, list[str]]) -> Callable[[nn.Module], str | None]:
    """Says why a layer is skipped, if the caller wants it to be."""
    if callable(skip):
        return lambda layer: "skip(name, module) is true" if any(skip(n, layer) for n in names[layer]) else None
    if isinstance(skip, str) or not isinstance(skip, Sequence) or not all(isinstance(s, str) for s in skip):
        raise TypeError(
            f"{_WHERE}: skip must be a sequence of names and patterns, or a function of name and module, got {skip!r}"
        )

    def matches(name: str, pattern: str) -> bool:
        parts = name.split(".")  # naming a container means all in it
        return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))

    for pattern in skip:
        if not any(matches(name, pattern) for all_names in names.values() for name in all_names):
            known = [all_names[0] or "(model)" for all_names in names.values()]
            more = f" and {len(known) - 8} more" if len(known) > 8 else ""
            raise ValueError(
                f"{_WHERE}: skip has {pattern!r}, which matches no layer with a weight to quantize; there are "
                f"{', '.join(known[:8]) or 'none'}{more}"
            )

    def why(layer: nn.Module) -> str | None:
        found = [pattern for pattern in skip if any(matches(name, pattern) for name in names[layer])]
        return f"matches {found[0]!r} in skip" if found else None

    return why


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot be quantized, if so."""
    if isinstance(layer, QuantizedLayer):
        return "already quantized"
    if parametrize.is_parametrized(layer):
        return "has parametrizations; remove them first (torch.nn.utils.parametrize.remove_parametrizations)"
    if type(layer) not in QUANTIZED:
        return f"is a {type(layer).__name__}, a subclass that may use its weight in its own way"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter of its own (computed by a hook, as weight_norm and pruning do)"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.layout != torch.strided or weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, {weight.layout}"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm changes its weight at each use"
    return None


def _axis(layer: nn.Module) -> int:
    """The output channels; a grouped transposed convolution has no such axis: its input channels."""
    return int(isinstance(layer, _TRANSPOSED) and layer.groups == 1)


def quantize_module_(
    model: nn.Module,
    *,
    bits: int = 8,
    scheme: str = "channel",
    block_size: int = 256,
    symmetric: bool = True,
    skip: Sequence[str] | Callable[[str, nn.Module], bool] = (),
    nonfinite: str = "error",
) -> QuantizationReport:
    """Replaces the weights of a model's layers by codes, in place; they become numbers again at each use.

    Linear, Embedding, EmbeddingBag, Conv1d to 3d and their transposed twins, wherever they are in the model; biases
    and all else stay as they are. The layers become subclasses of what they were (``QuantizedLinear``, ...), with their
    hooks. **Weights become buffers that are not trained**: ``layer.weight`` is a new tensor each time, writing to it
    changes nothing, and gradients pass through to inputs and biases only. An optimizer made before still holds the
    old weights, so make a new one.

    The state dict has ``NAME.quantized_weight.codes``, ``.scale`` and, if asymmetric, ``.zero_point`` instead of
    ``NAME.weight``. To load it, build the model, quantize it with the same options and call ``load_state_dict``.
    Casting the model (``.half()``) changes the dtype of the numbers, not codes and float32 scales, so nothing is lost.
    Tied weights are quantized once and stay tied. A forward traces under ``torch.compile(fullgraph=True)``.

    Args:
        model: any module; a lone layer also.
        bits: 8 or 4.
        scheme: what shares a scale: the ``"tensor"``, each output ``"channel"`` (row of an Embedding; input channel of
            a grouped transposed convolution) or a ``"block"``.
        block_size: for ``"block"``: a power of two from 32 to 4096.
        symmetric: codes centered on zero.
        skip: layers to leave alone: their names in the model, those of modules they are in, or patterns
            (:mod:`fnmatch`) of such names; or a function of name and layer that says so.
        nonfinite: see :func:`~genopt_ext.quant.quantize`.

    Returns:
        Bytes before and after, and what was skipped and why: also layers that cannot be quantized (parametrized,
        already quantized, subclasses of their own, a weight tied to one that stays) or would not be smaller.

    Raises:
        TypeError: ``model`` is no module, or an option is of a wrong type.
        ValueError: an option has a wrong value; a pattern matches nothing; a weight is on the meta device or has NaN
            or infinity. Nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHERE}: model must be a torch.nn.Module, got {type(model).__name__}")
    check_form(_WHERE, (1, 1), bits, scheme, 0, block_size, symmetric)
    check_nonfinite(_WHERE, nonfinite)
    names: dict[nn.Module, list[str]] = {}
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _LAYERS):
            names.setdefault(module, []).append(name)
    for owner in model.modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(owner)
    wanted = _skipper(skip, names)
    stays = {layer: why for layer in names if (why := _obstacle(layer) or wanted(layer))}

    made: dict[nn.Parameter, QuantizedWeight] = {}
    layers: dict[str, LayerBytes] = {}
    for layer, (name, *_) in names.items():
        if layer in stays:
            continue
        weight: nn.Parameter = layer.get_parameter("weight")
        others = [owner for owner in owners[weight] if owner not in names or owner in stays]
        if others:
            stays[layer] = (
                f"its weight is tied to that of {names.get(others[0], [type(others[0]).__name__])[0]}, which stays"
            )
            continue
        first = names[owners[weight][0]][0]
        if weight in made:
            layers[name] = LayerBytes(type(layer).__name__, tuple(weight.shape), 0, 0, first)
            continue
        if weight.is_meta:
            raise ValueError(
                f"{_WHERE}: the weight of {name or 'the model'} is on the meta device and has no numbers; load them "
                "first, or skip it"
            )
        form = check_form(_WHERE, weight.shape, bits, scheme, _axis(layer), block_size, symmetric)
        per_scale = 4 if symmetric else 5
        size = math.prod(form.codes_shape(weight.shape)) + per_scale * form.units(weight.shape)
        if size >= weight.nbytes:
            stays[layer] = f"its weight would not be smaller: {weight.nbytes} bytes now, {size} then"
            continue
        try:
            codes, scale, zero_point = ops.quantize(weight.detach(), *form, nonfinite, None)
        except ValueError as error:
            raise ValueError(f"{_WHERE}: the weight of {name or 'the model'}: {error}") from None
        q = QuantizedTensor(
            codes,
            scale,
            None if symmetric else zero_point,
            bits,
            scheme,
            form.axis if scheme == "channel" else None,
            form.block_size if scheme == "block" else None,
            weight.shape,
            weight.dtype,
        )
        made[weight] = QuantizedWeight(q)
        layers[name] = LayerBytes(type(layer).__name__, tuple(weight.shape), weight.nbytes, q.nbytes)

    before = _bytes(model)
    for layer in names:
        if layer in stays:
            continue
        quantized = made[layer.get_parameter("weight")]
        del layer._parameters["weight"]
        layer.__class__ = QUANTIZED[type(layer)]
        layer.add_module("quantized_weight", quantized)
    return QuantizationReport(layers, {names[layer][0]: why for layer, why in stays.items()}, before, _bytes(model))
