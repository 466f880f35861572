"""Writes ``RESULTS.md`` and its pictures from ``results/*.json``.

    python benchmarks/report.py            # write them
    python benchmarks/report.py --check    # fail where RESULTS.md is not what the JSON files give

A result named ``NAME`` or ``NAME-VARIANT`` is presented by the module ``NAME`` beside this file: ``section(result)``
gives the Markdown, ``plot(result, path)``, where there is one, the picture. Pictures are not compared.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import common

#: Where the report lies beside the folder of results.
NAME = "RESULTS.md"
#: Results in the order of the report; others follow by name.
ORDER = (
    "annotate-minilm",
    "annotate-base",
    "floor",
    "floor-avx2",
    "reuse",
    "scaling",
    "soak",
    "startup",
    "training",
    "rebuilt",
)

HEAD = """# Benchmark results

Made by `benchmarks/report.py` from `benchmarks/results/*.json`; do not edit. What each benchmark does, and how to read
its figures, is in [README.md](README.md). Targets that are missed stand here like those that are met.
"""


def described(result: Mapping[str, Any]) -> str:
    """The machine and the date of a result in a few words."""
    machine = result["machine"]
    return (
        f"{machine['processor']}, {machine['cpus']} CPUs ({machine['instruction_set']}), "
        f"{machine['memory_gib']:.0f} GiB, onnxruntime {machine['versions']['onnxruntime']}, "
        f"Python {machine['python']}, {result['date']}"
    )


def verdict(met: bool) -> str:
    """Whether a target is met, for a sentence or a table."""
    return "met" if met else "**not met**"


def module_of(result: Mapping[str, Any]) -> ModuleType:
    """The module that presents a result."""
    return importlib.import_module(result["benchmark"].partition("-")[0])


def read(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, in the report's order."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(results, key=lambda result: (rank.get(result["benchmark"], len(ORDER)), result["benchmark"]))


def markdown(results: Sequence[Mapping[str, Any]], folder: str) -> str:
    """The report. folder: that of the pictures, as seen from the report."""
    parts = [HEAD]
    for result in results:
        module = module_of(result)
        parts.append(module.section(result).strip() + "\n")
        if hasattr(module, "plot"):
            parts.append(f"![{result['benchmark']}]({folder}/{result['benchmark']}.png)\n")
    return "\n".join(parts)


def write(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the report beside the folder of results, and the pictures into it."""
    for result in results:
        module = module_of(result)
        if hasattr(module, "plot"):
            module.plot(result, folder / f"{result['benchmark']}.png")
    (folder.parent / NAME).write_text(markdown(results, folder.name), encoding="utf-8")


def check(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Exit where the report is not what the results give, or a picture that it shows is missing."""
    path = folder.parent / NAME
    if not path.is_file() or path.read_text(encoding="utf-8") != markdown(results, folder.name):
        raise SystemExit(f"{path.name} is not what the results give: python benchmarks/report.py")
    pictures = [f"{result['benchmark']}.png" for result in results if hasattr(module_of(result), "plot")]
    if missing := [name for name in pictures if not (folder / name).is_file()]:
        raise SystemExit(f"no picture {', '.join(missing)}: python benchmarks/report.py")


def main() -> None:
    """Write or check the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the report is out of date")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the JSON files")
    given = parser.parse_args()
    (check if given.check else write)(read(given.results), given.results)


if __name__ == "__main__":
    main()
