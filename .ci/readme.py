"""Keeps README.md true: prints its commands for CI to run, and generates the help, spans and figures that it quotes.

python .ci/readme.py --command first      # the shell block after <!-- command: first -->
python .ci/readme.py --check | --write    # blocks after <!-- help: COMMAND -->, tables after <!-- spans: ROW ... -->
                                          # and, of the published comparison, after <!-- compare: TITLE -->
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = README.parent / "examples" / "notes.jsonl"
COMPARED = README.parent / "benchmarks" / "results" / "compare" / "compare.json"
_COMPARED = re.compile(r"(<!-- compare: (?P<title>.+) -->\n)(?:\|.*\n)*")
_TABLE = re.compile(r"(<!-- spans: (?P<rows>[\d ]+) -->\n)(?:\|.*\n)*")
_BLOCK = r"(<!-- {kind}: {name} -->\n```\w*\n)(.*?)(\n```)"


def command(text: str, name: str) -> str:
    """The block of a named command."""
    match = re.search(_BLOCK.format(kind="command", name=re.escape(name)), text, re.DOTALL)
    if not match:
        raise SystemExit(f"README.md has no command named {name}")
    return match.group(2)


def with_help(text: str) -> str:
    """The text with every help block as the program prints it now."""
    return re.sub(
        _BLOCK.format(kind="help", name=r"(?P<command>[a-z ]*)"),
        lambda match: match.group(1) + _help(match.group("command")) + match.group(4),
        text,
        flags=re.DOTALL,
    )


def _help(name: str) -> str:
    arguments = [sys.executable, "-m", "medner.cli", *name.split(), "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout.rstrip()


def with_spans(text: str) -> str:
    """The text with every table of spans as the default model finds them now in some of the example notes."""
    notes = [json.loads(line)["text"] for line in EXAMPLES.read_text(encoding="utf-8").splitlines()]
    arguments = [sys.executable, "-m", "medner.cli", "annotate", str(EXAMPLES), "-o", "-", "--device", "cpu", "--quiet"]
    records = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {record["row"]: record for record in map(json.loads, records)}

    def table(match: re.Match[str]) -> str:
        lines = ["| source | row | note_id | start | end | text | label | score |", "|---|---|---|---|---|---|---|---|"]
        for row in map(int, match.group("rows").split()):
            for span in found[row]["spans"]:
                mention = notes[row][span["start"] : span["end"]].replace("\n", "↵")
                # Two digits: by the later ones processors may differ.
                cells = (found[row]["source"], row, found[row]["note_id"], span["start"], span["end"], mention)
                lines.append(f"| {' | '.join(map(str, cells))} | {span['label']} | {span['score']:.2f} |")
        return match.group(1) + "\n".join(lines) + "\n"

    return _TABLE.sub(table, text)


def with_comparison(text: str) -> str:
    """The text with every table of the comparison as its result has it."""
    from medner import comparison  # here, since the commands are printed before medner is installed

    written = comparison.markdown(json.loads(COMPARED.read_text(encoding="utf-8")))

    def table(match: re.Match[str]) -> str:
        _, found, rest = written.partition(f"## {match.group('title')}\n\n")
        if not found:
            raise SystemExit(f"{COMPARED.name} has no table {match.group('title')}")
        return match.group(1) + rest.partition("\n\n")[0] + "\n"

    return _COMPARED.sub(table, text)


def generated(text: str) -> str:
    """The text with everything that is generated as it is now."""
    return with_comparison(with_spans(with_help(text)))


def main() -> None:
    """Run one of the three modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    if given.command:
        print(command(text, given.command))
    elif given.write:
        README.write_text(generated(text), encoding="utf-8")
    elif generated(text) != text:
        raise SystemExit("README.md quotes an old help text, old spans or old figures: python .ci/readme.py --write")


if __name__ == "__main__":
    main()
