"""The light import stays light, and the layers of DESIGN.md hold, function-level imports included."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import medner

HEAVY = ["torch", "transformers", "datasets", "onnxruntime", "optimum", "onnx", "pandas"]

#: What a module may import of medner. ``errors`` is allowed everywhere; modules not named here stand on top.
ALLOWED = {
    **{leaf: set[str]() for leaf in ["errors", "schema", "graphfile", "windows", "decode"]},
    "runtime": {"graphfile"},
    "datasets": {"decode", "windows", "sources"},
    "bundle": {"graphfile"},
    "annotate": {"schema", "bundle", "windows", "decode", "runtime"},
    "sources": {"schema"},
    "lock": set[str](),
    "sinks": {"schema", "lock"},
    "resume": {"schema", "sinks"},
    "tally": set[str](),
    "workers": {"annotate", "bundle", "runtime", "sinks", "tally"},
    "score": {"schema", "datasets"},
    "testing": {"annotate"},
    "": {"annotate", "schema"},
}
#: Nothing that serves an annotation run may import these.
ON_TOP = {"train", "pytorch", "parity", "engines", "compare", "comparison", "evaluate", "verify", "doctor", "cli"}
BELOW = [*ALLOWED, "run"]

#: Packages that only some modules may import.
DOORS = {
    "onnxruntime": {"runtime"},
    "click": {"cli"},
    **{heavy: {"train", "datasets", "pytorch", "export"} for heavy in ["torch", "transformers", "datasets"]},
    **{heavy: {"export"} for heavy in ["onnx", "optimum"]},
    "pandas": set[str](),
}


def files() -> dict[str, Path]:
    """The installed package's modules by name, without ``medner.``; the package itself is ''."""
    found: dict[str, Path] = {}
    for package in ("medner", "medner.export"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        for folder in spec.submodule_search_locations:
            for file in Path(folder).glob("*.py"):
                parts = [*package.split("."), *([] if file.stem == "__init__" else [file.stem])]
                found[".".join(parts[1:])] = file
    return found


def imports(name: str, file: Path) -> set[str]:
    """Full names of all that a module imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = files()
IMPORTS = {name: imports(name, file) for name, file in FILES.items()}
#: Modules of medner that each module imports.
INNER = {
    name: {other.removeprefix("medner").removeprefix(".") for other in found if other.split(".")[0] == "medner"}
    & FILES.keys()
    for name, found in IMPORTS.items()
}


def inner(name: str) -> set[str]:
    """Modules of medner that one imports; ``from medner import x`` of a module is no import of the package's names."""
    takes_names = IMPORTS[name] & {f"medner.{public}" for public in medner.__all__}
    return INNER[name] - (set() if takes_names else {""})


def test_public_names() -> None:
    """What the package offers at its root."""
    assert medner.__all__ == ["Annotator", "Options", "Span", "load"]
    assert all(hasattr(medner, name) for name in medner.__all__)


def test_all_modules_are_seen() -> None:
    """The rules below look at the whole package, the export folder included."""
    assert FILES.keys() >= {*ALLOWED, *ON_TOP, "run", "export", "export.convert", "export.optimize", "export.verify"}


@pytest.mark.parametrize("name", ALLOWED)
def test_layers(name: str) -> None:
    """Each layer imports lower ones only; the leaves do not import one another."""
    permitted = ALLOWED[name] | ({"errors"} if name != "errors" else set())
    assert inner(name) <= permitted


@pytest.mark.parametrize("name", BELOW)
def test_nothing_below_imports_what_stands_on_top(name: str) -> None:
    """Annotation works without training, comparison, export and the command line."""
    assert not {other for other in inner(name) if other in ON_TOP or other.split(".")[0] == "export"}


def test_errors_import_nothing() -> None:
    """The error tree can be used anywhere."""
    assert IMPORTS["errors"] == set()


@pytest.mark.parametrize("package", DOORS)
def test_packages_behind_their_door(package: str) -> None:
    """Each heavy package is imported by the modules named for it alone, even inside functions."""
    importing = {
        name.split(".")[0] for name, found in IMPORTS.items() if package in {other.split(".")[0] for other in found}
    }
    assert importing <= DOORS[package]


def test_no_cycles() -> None:
    """The modules can be put in an order in which each imports earlier ones only."""
    graph = {name: inner(name) - {name} for name in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as exc:
        pytest.fail(f"import cycle: {' -> '.join(exc.args[1])}")


def fresh(code: str, folder: Path) -> list[str]:
    """Run code in a new interpreter outside the checkout; the heavy packages that it has loaded."""
    tail = f"import json, sys; print('\\n' + json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\n{tail}"], cwd=folder, capture_output=True, text=True, check=True
    )
    loaded: list[str] = json.loads(result.stdout.splitlines()[-1])
    return loaded


def test_light_import(tmp_path: Path) -> None:
    """Neither the library nor the command line loads a heavy package, onnxruntime included."""
    assert fresh("import medner, medner.cli", tmp_path) == []


def test_the_light_import_test_can_fail(tmp_path: Path) -> None:
    """Opening a model loads onnxruntime and none of the others."""
    assert fresh("from medner import testing; testing.annotator()", tmp_path) == ["onnxruntime"]


def test_help_is_light(tmp_path: Path) -> None:
    """``medner --help`` lists the commands and loads nothing heavy."""
    code = "import sys; sys.argv = ['medner', '--help']\nfrom medner.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as exc:\n    assert not exc.code, exc.code\n"
    assert fresh(code, tmp_path) == []
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith("Usage: medner [OPTIONS] COMMAND [ARGS]...")
    assert {"annotate", "train", "export", "evaluate", "compare", "info"} <= set(shown.split())
