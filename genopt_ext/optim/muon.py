"""Muon, with AdamW inside for what is no hidden matrix."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .. import _backend, sharding
from . import muon_stepper, routing
from .muon_stepper import MUON, MuonStepper
from .optimizer import FusedOptimizer
from .options import StepOptions, given_options
from .routing import Predicate, Route
from .stepper import Stepper

LOG = logging.getLogger(__name__)  # of the routing

_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Options of Muon's groups alone, and what AdamW's have in their place.
_OF_MUON = (
    "momentum",
    "nesterov",
    "ns_coefficients",
    "ns_steps",
    "adjust_lr_fn",
    "split_sizes",
    "num_heads",
    "stacked",
    "normuon",
    "normuon_beta2",
)
_FLAGS_OF_ADAMW = dict(amsgrad=False, maximize=False, decoupled_weight_decay=True)


MUON_DEFAULTS = frozenset((*_OF_MUON, "lr", "weight_decay", "eps"))


class Muon(FusedOptimizer, torch.optim.Muon):
    """Muon (Jordan et al., `kellerjordan.github.io/posts/muon <https://kellerjordan.github.io/posts/muon/>`_) as
    :class:`torch.optim.Muon`, for a whole model: it steps matrices, and leaves everything else to AdamW inside.

    A parameter goes to AdamW if it has less than two dimensions or is named as an embedding or as the last layer; its
    group may ask for either by ``algorithm="muon"`` or ``"adamw"``. The constructor logs where parameters went, once,
    by the logger ``genopt_ext.optim.muon``, and :meth:`routing` says it of each. A group whose parameters go both ways
    becomes two groups. Convolutions are matrices of ``[out, rest]``; of three dimensions ``stacked`` has to tell them
    from stacks of matrices.

    Args:
        params: named parameters (``model.named_parameters()``), parameters or groups of either: of Muon float32,
            float64, bfloat16 and float16 of two dimensions or more; of AdamW as of :class:`AdamW`. Without names,
            embeddings and heads can not be told apart, of which a warning says so.
        lr: learning rate, a number or a 1-element tensor.
        weight_decay: decoupled decay, times ``lr``.
        momentum: decay rate of the average of gradients.
        nesterov: whether Nesterov momentum is used.
        ns_coefficients: a, b and c of every Newton-Schulz iteration; or ``"polar_express"`` (Amsel et al., `arXiv
            2505.16932 <https://arxiv.org/abs/2505.16932>`_): others in each, which come nearer to the polar factor.
        eps: the least norm that a matrix is divided by.
        ns_steps: number of iterations, below 100.
        adjust_lr_fn: what ``lr`` is multiplied with, for a matrix of n rows and m columns: ``"original"`` or None:
            sqrt(max(1, n / m)); ``"match_rms_adamw"``: 0.2 sqrt(max(n, m)), with which learning rate and decay of AdamW
            can be used.
        adamw: says of a parameter, by its name and itself, whether AdamW has it, in the place of the look at names.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: AdamW's options, where a group has none of its own; None:
            Muon's.
        split_sizes: the rows of each of the matrices that a parameter is made of, as of query, key and value in one;
            mostly given in a group. Each is made orthogonal on its own.
        num_heads: into how many matrices of as many rows each a parameter is cut, as the heads of a projection.
        stacked: True: the last two dimensions are a matrix, and those before count how many there are, as of experts;
            each is cut as the two options before say. False: a parameter of three dimensions is a convolution. None:
            it is refused.
        normuon: divides each row by the root of its running mean square (NorMuon, Li et al., `arXiv 2510.05491
            <https://arxiv.org/abs/2510.05491>`_).
        normuon_beta2: decay rate of that mean.
        cautious: ``"weight_decay"``: decay spares what the update moves away from 0, see :class:`AdamW`. ``"update"``:
            of the orthogonal matrix, elements whose sign is not the gradient's are 0, and the rest is multiplied by 1
            over their share, which counts as 1e-3 at least (Liang et al., `arXiv 2411.16085
            <https://arxiv.org/abs/2411.16085>`_).
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`. Norms are over gradients of both kinds.
            ``clip_per_param`` and ``agc`` are refused.

    State per parameter of Muon: ``momentum_buffer``, in the parameter's shape and dtype, and with ``normuon``
    ``row_square_avg`` (float32, one for each row); of AdamW as of :class:`AdamW`. Checkpoints of
    :class:`torch.optim.Muon` load, and ours into it where all parameters are matrices.

    DTensors are stepped by all processes: each matrix is made orthogonal by one, which is sent the others' parts.

    Products are torch's, in bfloat16 whatever the parameters' dtype, on a CPU in float32 for sides up to 16: the same
    bits on one device with the same matrices, and not across devices.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range; a parameter that its group asks Muon to step and that is no whole
            matrix: of one dimension, flattened or complex; one of three dimensions without ``stacked``; a DTensor that
            is cut along more than one dimension of its mesh, or with ``normuon`` or ``cautious="update"``.
    """

    rule = MUON
    own_options = ("cautious", "algorithm", "split_sizes", "num_heads", "stacked", "normuon", "normuon_beta2")
    together = "steps matrices of one shape together"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | str = _NS_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw: Predicate | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        split_sizes: tuple[int, ...] | None = None,
        num_heads: int | None = None,
        stacked: bool | None = None,
        normuon: bool = False,
        normuon_beta2: float = 0.95,
        cautious: str | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given: dict[str, Any] = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            split_sizes=split_sizes,
            num_heads=num_heads,
            stacked=stacked,
            normuon=normuon,
            normuon_beta2=normuon_beta2,
        )
        self._begin(backend, step_options, **given, cautious=cautious)
        muon_stepper.check(type(self).__name__, {**given, **step_options, "algorithm": "muon"})
        self.max_grad_norm = step_options.pop("max_grad_norm", None)
        self.skip_nonfinite = bool(step_options.pop("skip_nonfinite", False))
        self._is_adamws = adamw
        self._defaults_of_adamw = dict(
            lr=lr if adamw_lr is None else adamw_lr,
            betas=adamw_betas,
            eps=adamw_eps,
            weight_decay=weight_decay if adamw_weight_decay is None else adamw_weight_decay,
            **_FLAGS_OF_ADAMW,
        )
        self._routes: dict[str, Route] = {}
        # torch's own constructor would refuse what is no matrix.
        torch.optim.Optimizer.__init__(self, params, {**given, **given_options({**step_options, "cautious": cautious})})
        self._tell()

    @functools.cached_property
    def stepper(self) -> Stepper:
        """What takes the steps."""
        return MuonStepper(type(self).__name__, self.backend)

    def _tell(self) -> None:
        alone = all(route.algorithm == "muon" for route in self._routes.values())
        first = not sharding.is_distributed() or torch.distributed.get_rank() == 0
        if first and not alone:
            LOG.warning(routing.described(self._routes))

    def routing(self) -> Mapping[str, Route]:
        """Of each parameter, by name, which algorithm steps it and why: ``opt.routing()["wte.weight"].algorithm``.

        Parameters without names are called by group and place.
        """
        return MappingProxyType(self._routes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group whose parameters go both ways becomes two.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        before, routes = len(self.param_groups), dict(self._routes)
        try:
            for group in self._routed(param_group):
                self._add(group)
        except (TypeError, ValueError):
            del self.param_groups[before:]
            self._routes = routes
            raise

    def _routed(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        """A group's parameters by algorithm, each kind as a group."""
        params = given.get("params") if isinstance(given, dict) else None
        if params is None or isinstance(params, (set, str)):
            return [given]  # torch says what is wrong with it
        listed = [params] if isinstance(params, Tensor) else list(params)
        items = [item if isinstance(item, tuple) else (None, item) for item in listed]
        if not all(len(item) == 2 and isinstance(item[1], Tensor) for item in items):
            return [{**given, "params": listed}]
        asked = given.get("algorithm")
        if asked is not None and asked not in routing.ALGORITHMS:
            muon_stepper.check(f"{type(self).__name__}: group {len(self.param_groups)}", given)
        options = {**self.defaults, **given}
        parts: dict[str, tuple[list[Any], list[Route]]] = {}
        for item, (name, p) in zip(listed, items, strict=True):
            route = routing.route(name, p, asked, self._is_adamws, options["stacked"])
            if name is None and asked is None and p.dim() >= 2:
                _backend.warn_once(
                    f"{type(self).__name__}: without names, embeddings and heads can not be told apart from other "
                    "matrices; give model.named_parameters(), or algorithm='muon' or 'adamw' in every group"
                )
            where = f"{type(self).__name__}: {'parameter' if name is None else repr(name)} of shape {list(p.shape)}"
            routing.refuse_misrouted(where, p, route, options)
            of_algorithm = parts.setdefault(route.algorithm, ([], []))
            of_algorithm[0].append(item)
            of_algorithm[1].append(route)
        if not parts:
            parts[asked or "muon"] = [], []
        splits = len(parts) > 1
        groups = []
        # Muon's first, as torch's checkpoints have them.
        for algorithm, (own, routes) in sorted(parts.items(), reverse=True):
            group = {**given, "params": own, "algorithm": algorithm, "routes": routes}
            others = ("betas", *_FLAGS_OF_ADAMW) if algorithm == "muon" else _OF_MUON
            if foreign := [name for name in others if name in given]:
                if not splits:
                    raise ValueError(
                        f"{type(self).__name__}: group {len(self.param_groups)}: {foreign[0]} is no option of "
                        f"algorithm={algorithm!r}, by which its parameters are stepped"
                    )
                group = {name: value for name, value in group.items() if name not in others}
            groups.append(group)
        return groups

    def _add(self, group: dict[str, Any]) -> None:
        routes = group.pop("routes", ())
        defaults = self.defaults
        if group.get("algorithm") == "adamw":
            common = {name: value for name, value in defaults.items() if name not in MUON_DEFAULTS}
            self.defaults = {**common, **self._defaults_of_adamw}
        try:
            super().add_param_group(group)
        finally:
            self.defaults = defaults
        i = len(self.param_groups) - 1
        names = self.param_groups[i].get("param_names")
        for k, route in enumerate(routes):
            self._routes[names[k] if names else f"group {i} parameter {k}"] = route

    def __getstate__(self) -> dict[str, Any]:
        own = {
            "_routes": dict(self._routes),
            "_defaults_of_adamw": self._defaults_of_adamw,
            "_is_adamws": self._is_adamws,
        }
        return {**super().__getstate__(), **own}
