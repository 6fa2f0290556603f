"""Loading a checkpoint: it is looked at whole, and all that is made of it is made, before the optimizer changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from copy import deepcopy
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from .. import reference, tracing
from ..reference.codecs import STEPPED
from . import problems, refusals
from . import state as states
from .options import GROUP_OPTIONS, NORM_CLIPS, STORAGE_OPTIONS, check_storage, clips_alone, is_step_count
from .problems import Row
from .step import describe

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

Refuse = Callable[[str, str], NoReturn]

_FOREIGN = {"state1", "absmax1", "qmap1", "__bnb_optimizer_quant_state__"}  # of bitsandbytes
_WHOLE = "load what state_dict() of an optimizer of this model returned"


def load(optimizer: FusedOptimizer, saved: Any) -> None:
    """``torch.optim.Optimizer.load_state_dict``, which changes nothing where it raises; hooks as there."""
    if isinstance(saved, Mapping):
        saved = dict(saved)
        for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
            if (changed := hook(optimizer, saved)) is not None:
                saved = changed
    # What is made in inference mode could not be stepped outside of it.
    with torch.inference_mode(False), torch.no_grad():
        state, groups = _Reader(optimizer).read(saved)
    before = optimizer.state, optimizer.param_groups
    try:
        optimizer.__setstate__({"state": state, "param_groups": groups})
    except BaseException:  # of a subclass
        optimizer.state, optimizer.param_groups = before
        raise
    optimizer.discard_accumulated()
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def with_plain_groups(saved: dict[str, Any]) -> dict[str, Any]:
    """``saved`` with names in the place of dtypes: checkpoints hold numbers, strings and tensors."""
    names = {dtype: name for name, dtype in states.NAMED.items()}
    groups = [
        {key: names.get(value, value) if key == "state_dtype" else value for key, value in group.items()}
        for group in saved["param_groups"]
    ]
    return {**saved, "param_groups": groups}


def with_step(entries: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The entries in which ``torch.optim`` may look for a step, and the others, as of a parameter's average alone."""
    kept: dict[Any, Any] = defaultdict(dict)
    others: dict[Any, Any] = {}
    for key, entry in entries.items():
        counts = isinstance(key, Tensor) and isinstance(entry, dict) and "step" in entry
        (kept if counts else others)[key] = entry
    return kept, others


class _Naming:
    """Gives an error in what a checkpoint holds its place there, and the one type that such errors have."""

    __slots__ = "refuse", "what"  # and no contextmanager: there is one for each parameter

    def __init__(self, refuse: Callable[[str], NoReturn], what: Callable[[], str]) -> None:
        self.refuse, self.what = refuse, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return
        if isinstance(error, (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)):
            self.refuse(f"{self.what()}: {type(error).__name__}: {error}")


def _copied(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if t.dtype == dtype and t.device == device:
        return t.clone()  # as below, in half the time
    return t.detach().to(device=device, dtype=dtype, copy=True)


class _Reader:
    """Makes state and groups of a checkpoint, and raises ValueError for what can not be those of ``optimizer``."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.optimizer = optimizer
        self.owner = type(optimizer).__name__
        self.where = f"{self.owner}.load_state_dict"
        self.rule_of = optimizer.stepper.rule_of

    def refuse(self, problem: str, fix: str = _WHOLE) -> NoReturn:
        raise ValueError(f"{self.where}: {problem}; {fix}")

    def naming(self, what: Callable[[], str]) -> _Naming:
        return _Naming(self.refuse, what)

    def read(self, saved: Any) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
        entries, saved_groups = self.parts(saved)
        groups = self.groups(saved_groups)
        known = [self.known_names(group) for group in groups]
        places: dict[Hashable, tuple[int, int, Tensor]] = {}
        for i, (group, of_optimizer) in enumerate(zip(saved_groups, self.optimizer.param_groups, strict=True)):
            with self.naming(lambda: f"group {i}: params"):  # noqa: B023
                for k, (key, p) in enumerate(zip(group["params"], of_optimizer["params"], strict=True)):
                    if places.setdefault(key, (i, k, p))[2] is not p:
                        self.refuse(f"group {i}: params has {key!r} twice, for two parameters of the optimizer")
        by_name = {str(key): key for key in places}
        state: dict[Any, Any] = defaultdict(dict)
        for key, entry in entries.items():
            if key in places:
                place = places[key]
                state[place[2]] = self.entry(entry, place, groups[place[0]], known[place[0]])
            elif by_name.get(str(key), key) != key:
                self.refuse(f"state has the key {key!r}, and the groups' params {by_name[str(key)]!r}")
            else:  # as torch
                state[key] = entry
        return state, groups

    def parts(self, saved: Any) -> tuple[Mapping[Any, Any], list[Mapping[str, Any]]]:
        if not isinstance(saved, Mapping):
            self.refuse(f"the checkpoint is {type(saved).__name__}, expected dict")
        entries, groups = saved.get("state"), saved.get("param_groups")
        if not isinstance(entries, Mapping):
            self.refuse(f"'state' is {type(entries).__name__}, expected dict")
        if not isinstance(groups, (list, tuple)):
            self.refuse(f"'param_groups' is {type(groups).__name__}, expected list")
        own = self.optimizer.param_groups
        if len(groups) != len(own):
            self.refuse(
                f"loaded state dict has a different number of parameter groups: {len(groups)}, expected {len(own)}"
            )
        for i, group in enumerate(groups):
            if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
                self.refuse(f"group {i} is no dict with a list of 'params'")
            if len(group["params"]) != len(own[i]["params"]):
                self.refuse(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                    f"group {i} has {len(group['params'])} parameters, expected {len(own[i]['params'])}"
                )
        return entries, list(groups)

    def groups(self, saved: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
        own = self.optimizer.param_groups
        groups = []
        for i, group in enumerate(saved):
            with self.naming(lambda: f"group {i}"):  # noqa: B023
                new = {key: deepcopy(value) for key, value in group.items() if key != "params"}
                if isinstance(name := new.get("state_dtype"), str):
                    new["state_dtype"] = states.NAMED.get(name, name)
                check_storage(f"{self.where}: group {i}", new)
            names = new.get("param_names", own[i]["params"])
            if not isinstance(names, (list, tuple)) or len(names) != len(own[i]["params"]):
                self.refuse(f"group {i}: param_names is {names!r}, expected {len(own[i]['params'])} names")
            if "param_names" in own[i]:
                new.setdefault("param_names", own[i]["param_names"])
            groups.append({**new, "params": own[i]["params"]})
        # torch's class fills in what older checkpoints lack; where torch has none, ``complete`` does.
        torch_class = next(c for c in type(self.optimizer).__mro__ if c.__module__.startswith("torch.optim"))
        if torch_class is not torch.optim.Optimizer:
            twin: torch.optim.Optimizer = object.__new__(torch_class)
            twin.defaults = dict(self.optimizer.defaults)
            twin.__setstate__({"state": defaultdict(dict), "param_groups": groups})
        for i, (old, new) in enumerate(zip(own, groups, strict=True)):
            self.complete(i, old, new)
        return groups

    def complete(self, i: int, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Checks a group's options, of which those that the checkpoint knows nothing of stay as they are."""
        if "algorithm" in old and new.get("algorithm", old["algorithm"]) != old["algorithm"]:
            self.refuse(
                f"group {i} was stepped by {new['algorithm']!r}, and is by {old['algorithm']!r} here",
                "route its parameters as they were, by algorithm= in groups",
            )
        clips = clips_alone(new)
        torchs = ("maximize", "foreach", "capturable", "fused", "initial_accumulator_value")
        for name in (*GROUP_OPTIONS, *torchs, *self.optimizer.own_options):
            if name in old and name not in new and not (clips and name in NORM_CLIPS):
                new[name] = old[name]
        # How it is stored is this optimizer's own choice, whatever was saved.
        for name in STORAGE_OPTIONS:
            new.pop(name, None)
            if name in old:
                new[name] = old[name]
        if "rounding_seed" in old:
            new.setdefault("rounding_seed", old["rounding_seed"])
        if absent := [name for name in self.rule_of(old).ranges if name in old and name not in new]:
            self.refuse(f"group {i} has no '{absent[0]}'", f"add it, as {absent[0]}={old[absent[0]]!r}")
        with self.naming(lambda: f"group {i}"):
            self.rule_of(new).check(f"{self.where}: group {i}", new)
        states.complete(new)

    def known_names(self, group: dict[str, Any]) -> frozenset[str]:
        """What this package or torch keeps for a parameter of ``group``."""
        names = self.rule_of(group).state_names(group)
        moments = (f"{name}{end}" for name in names for end in ("", "_codes", "_scales"))
        return frozenset((*moments, *self.optimizer.rule.running, "step", "ema", "master", "compensation"))

    def entry(
        self, saved: Any, place: tuple[int, int, Tensor], group: dict[str, Any], known: frozenset[str]
    ) -> dict[Any, Any]:
        """The state of one parameter: copies on its device, stored as its group asks for it."""
        owner, rule, p = self.owner, self.rule_of(group), place[2]
        name: Any = None  # of the state that is read

        def what() -> str:
            of_state = "" if name is None else f": state {name!r}"
            return describe(self.optimizer.param_groups, place) + of_state

        def refuse(problem: str, fix: str) -> NoReturn:
            self.refuse(f"{describe(self.optimizer.param_groups, place)}: {problem}", fix)

        if not isinstance(saved, Mapping):
            refuse(f"its state is {type(saved).__name__}, expected dict", _WHOLE)
        if not _FOREIGN.isdisjoint(saved):
            refuse(
                f"its state has {sorted(map(str, saved))}, as bitsandbytes saves it, which is not read here",
                "begin with new state",
            )
        state: dict[Any, Any] = {}
        with self.naming(what):
            for name, value in saved.items():
                if name in known and isinstance(value, Tensor):
                    self.check_storage_of(refuse, name, value, p)
                if name == "step" or name in rule.running:
                    state[name] = self.number(refuse, name, value, p, group)
                else:
                    state[name] = self.copy(value, p, name)
            name = None
            if p.dtype not in STEPPED:  # a frozen weight, for which torch's Adagrad makes state too
                return state
            row = Row(owner, rule, group, p, None, state)
            found = problems.find_in_state(row, only_averages=False)
            for name, reason in found:
                if reason not in problems.MENDABLE:
                    refuse(*refusals.words(row, name, reason))
            if state:
                states.tell_widened(owner, rule, group, p)
            if any(reason == "storage" for _, reason in found):
                states.store_anew(owner, rule, group, p, state)
        if not states.counts_steps(rule, group, p):
            state.pop("step", None)  # which only rounding had counted
        return state

    def check_storage_of(self, refuse: Refuse, name: str, t: Tensor, p: Tensor) -> None:
        """Refuses what can not be copied into memory that a step could use."""
        sparse = self.optimizer.rule.serves_sparse and t.layout == torch.sparse_coo
        if (t.layout != torch.strided or t.is_nested or t.is_quantized) and not sparse:
            kind = "nested" if t.is_nested else "quantized" if t.is_quantized else t.layout
            refuse(f"state '{name}' is {kind}, expected torch.strided", "replace it with a dense tensor")
        if t.is_meta and not p.is_meta:
            refuse(f"state '{name}' is on meta, where there are no numbers", _WHOLE)
        is_number = name == "step" or name in self.optimizer.rule.running
        shape = self.optimizer.rule.state_shape(name, p)
        if not is_number and not name.endswith("_scales") and t.shape != shape:  # before it takes memory
            refuse(
                f"state '{name}' has shape {list(t.shape)}, expected {list(shape)}", "load a checkpoint of this model"
            )
        subclasses = tracing.is_subclass(t) or tracing.is_subclass(p)
        if not is_number and subclasses and hasattr(t, "device_mesh") != hasattr(p, "device_mesh"):
            refuse(
                f"state '{name}' is {type(t).__name__}, parameter is {type(p).__name__}",
                "load it by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict",
            )

    def number(self, refuse: Refuse, name: str, value: Any, p: Tensor, group: dict[str, Any]) -> Tensor | None:
        """As torch does with ``step``: where it was saved, unless kernels read it."""
        on_device = bool(group.get("fused") or group.get("capturable"))
        if value is None:
            return None
        if not isinstance(value, Tensor):
            if not isinstance(value, Real):
                refuse(f"state '{name}' is {value!r}, expected a number", _WHOLE)
            rule = self.optimizer.rule
            dtype = rule.running_dtype if name in rule.running else _get_scalar_dtype(is_fused=on_device)
            return torch.tensor(float(value), dtype=dtype, device=p.device if on_device else "cpu")
        if value.numel() != 1 or value.is_complex():
            refuse(f"state '{name}' is {value.dtype} of shape {list(value.shape)}, expected a number", _WHOLE)
        # Here it may wait for a GPU, which a step does not; of the CPU's, ``entry`` finds it.
        counts = name == "step" and not value.is_cpu and tracing.has_number(value)
        if counts and not is_step_count(value.item()):
            row = Row(self.owner, self.rule_of(group), group, p, None, {"step": value})
            refuse(*refusals.words(row, "step", "count"))
        # A half would stop counting.
        rule = self.optimizer.rule
        precise = not on_device or (name in rule.running and rule.running_dtype == torch.float64)
        dtype = torch.float64 if value.dtype == torch.float64 and precise else torch.float32
        return _copied(value, p.device if on_device else value.device, dtype)

    def copy(self, value: Any, p: Tensor, name: Any) -> Any:
        """Of what was saved for ``p``: on its device, in the dtype that it was saved with."""
        if not isinstance(value, Tensor):
            if isinstance(value, Mapping):
                return {key: self.copy(each, p, key) for key, each in value.items()}
            if type(value) in (list, tuple):
                return type(value)(self.copy(each, p, None) for each in value)
            return value
        # As torchao's 8-bit and 4-bit state.
        if tracing.is_subclass(value) and type(value).dequantize is not Tensor.dequantize:
            value = value.dequantize()
        dtype = value.dtype
        if not (value.is_floating_point() or value.is_complex() or str(name).endswith(("_codes", "_scales"))):
            dtype = p.dtype if p.is_floating_point() else dtype
        copied = _copied(value, p.device, dtype)
        if name == "momentum_buffer" and not (copied.is_sparse or reference.is_all_unset(copied)):
            copied += 0.0  # torch may leave -0.0, which says "not yet set" here
        return copied
