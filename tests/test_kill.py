"""Kill -9: killed in every phase and resumed, a run ends as one that nothing happened to.

This is the short form, on notes of its own; the long form, over real notes, is ``python tests/kill_and_resume.py``.
"""

import csv
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

if not Path("/proc/self/fd").is_dir():
    pytest.skip("where a process is held is found out from /proc", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    harness = import_module("kill_and_resume")

Aim, File = harness.Aim, harness.File
PARTS, PART_ROWS = 30, 2

#: Where a process is held and killed, and the phase that this is; the next one begins with what the one before it left.
KILLS = [
    (Aim("held", "os.mkdir ."), "start-up, before the lock is taken"),
    (Aim("held", "open .run.json.*.tmp"), "lock taken, run.json not there"),
    (Aim("held", "os.mkdir spans"), "run.json there, no part begun"),
    (Aim("held", "batch", 3), "inference"),
    (Aim("held", "os.chmod fd spans/.part-*.tmp", 4), "writing a part's spans"),
    (Aim("held", "os.remove lock.json"), "start-up, before the lock is taken"),
    (Aim("held", "os.remove spans/.part-*.tmp"), "clearing what a killed process left"),
    (Aim("held", "open notes/.part-*.tmp", 5), "between spans and notes"),
    (Aim("held", "open spans/part-*", 6), "reading the parts that are kept"),
    (Aim("held", "os.rename notes/.part-*.tmp *"), "writing a part's notes"),
    (Aim("held", "open .manifest.json.*.tmp"), "all parts there, no manifest"),
    (Aim("held", "os.remove lock.json", 2), "finished, lock not given back"),
]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files with 30 notes each; the parts are not of the same size, and some have no span."""
    folder = tmp_path_factory.mktemp("notes")
    texts = [" ".join(["no asthma,", "fever?\n", "Type 2 diabetes."][: n % 4] * (n % 5)) for n in range(60)]
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts[:30])])
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[30:]))
    return folder


def test_killed_in_every_phase(tmp_path: Path, notes: Path) -> None:
    """The same bytes as without kills; what was committed stays untouched, and no more than one part a kill is redone.

    The checks after each kill are those of the long form.
    """
    whole = harness.run_whole(tmp_path, notes, "tiny", "parquet", PART_ROWS)
    assert len(whole.rows) == PARTS
    trial = harness.Trial(whole, tmp_path / "trial")
    assert [trial.go(aim) for aim, _ in KILLS] == [phase for _, phase in KILLS]
    assert {phase for _, phase in KILLS} == set(harness.PHASES)
    assert trial.go(None) is None
    assert trial.finished
    # Killed within a part were the processes of phases "inference", "spans", "between" and "notes".
    assert harness.reinferred(trial.taken) == 4 * PART_ROWS
    assert trial.taken[-2:] == [[], []]  # the manifest had been written, and all parts before


def test_killed_at_any_time(tmp_path: Path, notes: Path) -> None:
    """Also where nothing is held: on sight of a new file, or after some time, in JSONL."""
    whole = harness.run_whole(tmp_path, notes, "tiny", "jsonl", PART_ROWS)
    trial = harness.Trial(whole, tmp_path / "trial")
    aims = [Aim("on sight", "notes/part-*", 2), Aim("at random", seconds=0.9), Aim("on sight", "spans/.part-*.tmp", 3)]
    for aim in aims:
        if not trial.finished:
            trial.go(aim)
    if not trial.finished:
        trial.go(None)
    assert trial.finished
    assert harness.tables(harness.look(tmp_path / "trial" / "out")) == harness.tables(whole.files)


# ---------------------------------------------------------------------------------------------------------------------
# The checks themselves


def files(*parts: int, changed: int = 7) -> dict[str, Any]:
    """A run directory with these parts."""
    names = [f"{folder}/part-{part:06d}.jsonl" for part in parts for folder in ("spans", "notes")]
    return {"run.json": File(1, 1, b"{}")} | {
        name: File(number, changed, name.encode()) for number, name in enumerate(names)
    }


WHOLE = harness.Whole(
    arguments=(),
    files=files(0, 1, 2) | {"manifest.json": File(9, 9, b"{}")},
    rows={f"part-{part:06d}.jsonl": frozenset({("a", part)}) for part in range(3)},
    manifest={},
    part_rows=1,
    seconds=1.0,
)


def with_file(found: dict[str, Any], name: str, **changes: Any) -> dict[str, Any]:
    """The directory with one file changed."""
    return found | {name: replace(found.get(name, File(1, 1, b"")), **changes)}


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (with_file(files(0, 1), "spans/part-000001.jsonl", content=b"x"), "spans/part-000001.jsonl: 1 bytes that are"),
        (with_file(files(0), "notes/part-000003.jsonl"), "notes/part-000003.jsonl: 0 bytes that are not those of a"),
        (with_file(files(0), "notes/part-000000.jsonl", changed=8), "notes/part-000000.jsonl: touched after it was"),
        (with_file(files(0), "spans/part-000000.jsonl", inode=8), "spans/part-000000.jsonl: touched after it was"),
        (with_file(files(0), "run.json", changed=8), "run.json: touched after it was committed"),
        (with_file(files(0), "manifest.json", content=b"[]"), "manifest.json: cut short"),
        (files(1), "spans/part-000000.jsonl: touched after it was committed"),
        (files(0) | files(2), "a part before the last one is missing"),
    ],
)
def test_files_that_are_not_as_they_were(after: dict[str, Any], said: str) -> None:
    """Other bytes, a part too many, a rewritten file, a hole: each is noticed, and named."""
    harness.check_files(files(0), files(0, 1), WHOLE)
    with pytest.raises(AssertionError, match=f"^{re.escape(said)}"):
        harness.check_files(files(0), after, WHOLE)


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ([("a", 1), ("a", 0)], "1 rows of committed parts inferred again"),
        ([("a", 1), ("a", 2), ("a", 1)], "a process took in a row twice"),
    ],
)
def test_rows_that_are_inferred_again(taken: list[tuple[str, int]], said: str) -> None:
    """A process takes in no row of a committed part, and none twice."""
    harness.check_rows(files(0), [("a", 1), ("a", 2)], WHOLE)
    with pytest.raises(AssertionError, match=f"^{said}"):
        harness.check_rows(files(0), taken, WHOLE)


def test_rows_are_counted_over_all_processes() -> None:
    """A row that three processes took in was inferred again twice."""
    assert harness.reinferred([]) == 0
    assert harness.reinferred([[("a", 0), ("a", 1)], [("a", 1), ("b", 1)], [("a", 1)]]) == 2


COUNTS = {"rows": 3, "windows": 5, "windows_inferred": 4, "windows_reused": 1, "windows_kept": 0}


def finished(counts: dict[str, int], **more: Any) -> dict[str, Any]:
    """A finished directory whose manifest has these counts."""
    return with_file(files(0, 1, 2), "manifest.json", content=json.dumps({"counts": counts, **more}).encode())


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (lambda found: found | {"lock.json": File(1, 1, b"")}, "other files: ['lock.json']"),
        (lambda found: found | {"spans/.part-000000.jsonl.0.tmp": File(1, 1, b"")}, "other files: ['spans/.part"),
        (lambda _: finished(COUNTS | {"rows": 4}, model="m", options={}), "manifest: 4 rows, not 3"),
        (lambda _: finished(COUNTS | {"windows_kept": 1}, model="m", options={}), "manifest: 6 windows inferred, reus"),
        (lambda _: finished(COUNTS, model="n", options={}), "manifest: another model"),
    ],
)
def test_an_end_that_is_not_that_of_a_whole_run(found: Callable[[dict[str, Any]], dict[str, Any]], said: str) -> None:
    """Left-over files and counts that do not add up are noticed."""
    manifest = {"counts": COUNTS, "model": "m", "options": {"output": "x"}}
    end = finished(COUNTS | {"windows_inferred": 2, "windows_kept": 2}, model="m", options={"output": "y"})
    whole = replace(WHOLE, manifest=manifest)
    harness.check_end(end, whole)
    with pytest.raises(AssertionError, match=f"^{re.escape(said)}"):
        harness.check_end(found(end), whole)
