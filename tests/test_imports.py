"""Modules form floors: none imports one that imports it, be it through others or for its types alone."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest


def imports(package: str) -> dict[str, set[str]]:
    """What each module of the package imports of it when it is imported, and under ``TYPE_CHECKING``."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip("run from the repository's root")
    root = Path(spec.origin).parent
    files = {}
    for path in root.rglob("*.py"):
        names = [package, *path.relative_to(root).with_suffix("").parts]
        files[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        own = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        seen: set[str] = set()
        nodes: list[ast.AST] = list(ast.parse(path.read_text()).body)
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.Import):
                seen |= {each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = own[: len(own) - node.level + 1] if node.level else []
                start = ".".join([*base, *filter(None, [node.module])])
                whole = {each.name: f"{start}.{each.name}" for each in node.names}
                seen |= {full if full in files else start for full in whole.values()}
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                nodes += ast.iter_child_nodes(node)
        found[module] = (seen & files.keys()) - {module}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for module, seen in graph.items():
        reached[module] = set()
        left = set(seen)
        while left:
            reached[module].add(one := left.pop())
            left |= graph[one] - reached[module]
    found = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph}
    return sorted(list(each) for each in found if each)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "e"}, "e": set()}) == [["b", "c"]]


def test_bench_has_no_circle() -> None:
    graph = imports("bench")
    assert "bench.method" in graph["bench.limit"] and circles(graph) == []


@pytest.mark.xfail(
    reason="optim.optimizer, optim.by_torch, optim.checkpoint, optim.repeats and in_backward name each other's types"
)
def test_genopt_ext_has_no_circle() -> None:
    assert circles(imports("genopt_ext")) == []
