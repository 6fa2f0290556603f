"""Others' packages, where they are installed; Absent says why one can not be used."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

PEERS = ("bitsandbytes", "torchao", "torch-optimi", "flashoptim", "deepspeed")


class Absent(Exception):
    """Why a subject can not take part."""


@lru_cache(maxsize=16)
def package(name: str) -> Any:
    """The module.

    Raises:
        Absent: it can not be imported.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # what a package's own import raises is its own
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        missing = f"No module named '{name.split('.')[0]}'" == text
        raise Absent("not installed" if missing else f"can not be imported: {text}") from None


def eight_bit(module: str, rule: str) -> Any:
    """The class of an optimizer with 8-bit state.

    Raises:
        Absent: the module can not be imported, or has no such class.
    """
    make = getattr(package(module), rule + "8bit", None)
    if make is None:
        raise Absent(f"{module} has no {rule}8bit")
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")  # torchao's, when it compiles
    return make


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
