"""Checkpoints of classes whose authors count steps in groups."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from .. import tracing


class CountsInGroups(torch.optim.Optimizer):
    """What is saved has the count in both places, and what is loaded may have it in either."""

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        for group in saved["param_groups"]:
            steps = [saved["state"].get(key, {}).get("step") for key in group["params"]]
            if counts := [step.item() for step in steps if step is not None and tracing.has_number(step)]:
                group["step"] = int(max(counts))
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_with_steps(state_dict))
        for group in self.param_groups:
            group.pop("step", None)


def _with_steps(saved: Any) -> Any:
    """A checkpoint of the authors' class with each group's count of steps in its parameters' state."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        return saved  # which is refused in its own words
    state, groups = dict(saved["state"]), saved.get("param_groups")
    for group in groups if isinstance(groups, (list, tuple)) else ():
        if not isinstance(group, Mapping) or "step" not in group or not isinstance(group.get("params"), (list, tuple)):
            continue
        for key in group["params"]:
            entry = state.get(key) if isinstance(key, Hashable) else None
            if isinstance(entry, Mapping) and "exp_avg" in entry:
                state[key] = {"step": group["step"], **entry}
    return {**saved, "state": state}
