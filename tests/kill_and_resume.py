"""Kill -9 at any moment: a run that is killed and resumed again and again ends as one that nothing happened to.

    python tests/kill_and_resume.py                # the long form: 50 kills, 12 of them with the default bundle
    python tests/kill_and_resume.py --model tiny --kills 20 --seed 7

``medner annotate --resume`` reads MTSamples and ACI-BENCH in 26 parts, is killed with SIGKILL, and started again by
the same command line. A kill comes at a random time, on sight of a new file, or where the process is held: before a
call of the operating system, see :data:`POINTS`. The phase in which it came is told afterwards, from what lies in the
directory.

After every kill, what has its final name is to the byte what a run without kills wrote, and what was committed before
has not been touched; no row of it is inferred again. At the end the files are those of a run without kills, and no
others, the counts add up, and at most one part for each kill was inferred again.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medner import cli
from medner.annotate import Annotator

#: Into how many parts all rows are cut, about.
PARTS = 26
#: Kills of one run; what is left goes to the next.
KILLS_PER_RUN = 20
#: Seconds that a process is waited for.
_PATIENCE = 1800.0

#: A row's key: source, row.
Row = tuple[str, int]


# --------------------------------------------------------------------------------------------------- what a run holds


@dataclass(frozen=True)
class File:
    """A file as it was found; changed: st_mtime_ns."""

    inode: int
    changed: int
    content: bytes


#: Files of a run directory by their path in it, hidden ones too.
Files = Mapping[str, File]


def look(path: Path) -> Files:
    """All files of a run directory that nobody is writing."""
    found = {}
    for entry in path.rglob("*"):
        if entry.is_file():
            status = entry.stat()
            found[str(entry.relative_to(path))] = File(status.st_ino, status.st_mtime_ns, entry.read_bytes())
    return found


def tables(files: Files) -> dict[str, bytes]:
    """Content of every part file under its final name."""
    return {name: file.content for name, file in files.items() if name.startswith(("spans/part-", "notes/part-"))}


def drafts(files: Files, folder: str = "*") -> set[str]:
    """Temporary files of parts."""
    return {name for name in files if fnmatchcase(name, f"{folder}/.part-*.tmp")}


def committed(files: Files) -> list[str]:
    """Names of the parts of which both files are there."""
    names = sorted(name.partition("/")[2] for name in files if name.startswith("notes/part-"))
    return [name for name in names if f"spans/{name}" in files]


def half_committed(files: Files) -> set[str]:
    """Files of spans whose notes are missing."""
    return {name for name in tables(files) if name.startswith("spans/")} - {
        f"spans/{name}" for name in committed(files)
    }


def holder(files: Files) -> int | None:
    """The process that the lock names; None where there is no lock, or it names none."""
    try:
        return int(json.loads(files["lock.json"].content)["process"])
    except (KeyError, ValueError):
        return None


PHASES = (
    "start-up, before the lock is taken",
    "lock taken, run.json not there",
    "clearing what a killed process left",
    "run.json there, no part begun",
    "reading the parts that are kept",
    "inference",
    "writing a part's spans",
    "between spans and notes",
    "writing a part's notes",
    "all parts there, no manifest",
    "finished, lock not given back",
)
_START, _LOCKED, _CLEARING, _BEGUN, _KEPT, _INFERENCE, _SPANS, _BETWEEN, _NOTES, _ALL, _FINISHED = PHASES


def phase(before: Files, after: Files, process: int, taken: Sequence[Row], parts: int) -> str:
    """The phase in which a process was killed.

    before, after: what it found and what it left; taken: the rows that it took in; parts: of the whole run.
    """
    if "manifest.json" in after.keys() - before.keys():
        return _FINISHED
    if holder(after) != process:
        return _START
    if "run.json" not in after:
        return _LOCKED
    if drafts(after) & drafts(before):
        return _CLEARING
    if drafts(after, "spans"):
        return _SPANS
    if drafts(after, "notes"):
        return _NOTES
    if any(before.get(name) != after[name] for name in half_committed(after)):
        return _BETWEEN
    if len(committed(after)) == parts and "manifest.json" not in after:
        return _ALL
    if not taken:
        return _KEPT if committed(after) else _BEGUN
    return _INFERENCE


# --------------------------------------------------------------------------------------------- the process to be killed

#: Calls of the operating system, by the names that they have for audit hooks, and how many files they name.
_CALLS = {"open": 1, "os.chmod": 1, "os.mkdir": 1, "os.remove": 1, "os.rename": 2}


def child(out: str, record: str, held: str, pattern: str, nth: str, *arguments: str) -> None:
    """Run ``medner`` with arguments; each row that goes into the annotator is recorded, and one point is held at.

    out: the run directory; record: gets a JSON line of row keys a batch; held: the file that is made when the process
    comes for the ``nth`` time to a call that looks like ``pattern``, where it then stays.
    """
    met, parent = itertools.count(1), os.getppid()

    def meet(call: str) -> None:
        if fnmatchcase(call, pattern) and next(met) == int(nth):
            Path(held).touch()
            while os.getppid() == parent:
                time.sleep(0.1)
            os._exit(99)  # nobody is there to kill it

    def audit(event: str, given: tuple[Any, ...]) -> None:
        if event in _CALLS:
            names = [_name(value, out) for value in given[: _CALLS[event]]]
            if None not in names:
                descriptor = "fd " if isinstance(given[0], int) else ""
                meet(f"{event} {descriptor}{' '.join(map(str, names))}")

    stream = Annotator.stream
    recorder = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def recorded(annotator: Annotator, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        def each() -> Iterator[pa.RecordBatch]:
            for batch in batches:
                rows = zip(batch.column("source").to_pylist(), batch.column("row").to_pylist(), strict=True)
                os.write(recorder, json.dumps(list(rows)).encode() + b"\n")
                meet("batch")
                yield batch

        return stream(annotator, each())

    Annotator.stream = recorded  # type: ignore[method-assign, assignment]
    sys.addaudithook(audit)
    cli.main(list(arguments))


def _name(value: Any, out: str) -> str | None:
    """A path, or an open file's, as seen from the run directory; None where it lies elsewhere."""
    path = os.fsdecode(Path(f"/proc/self/fd/{value}").readlink() if isinstance(value, int) else value)
    return "." if path == out else path.removeprefix(f"{out}/") if path.startswith(f"{out}/") else None


def environment() -> dict[str, str]:
    """That of the processes: what this one has, without hubs."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


# ------------------------------------------------------------------------------------------------------ when to kill it


@dataclass(frozen=True)
class Directory:
    """What decides which points a process comes by."""

    exists: bool
    has_lock: bool
    has_run: bool
    has_drafts: bool
    kept: int
    left: int


#: Where a process can be held: the call that it is about to make, and how often it makes it, given what it finds.
POINTS: dict[str, Callable[[Directory], int]] = {
    "open lock.json": lambda _: 1,
    "open .lock.json.*.tmp": lambda d: d.has_lock,
    "os.remove lock.json": lambda d: d.has_lock,
    "os.remove .lock.json.*.tmp": lambda d: d.has_lock,
    "os.remove */.part-*.tmp": lambda d: d.has_drafts,
    "open */part-*": lambda d: 2 * d.kept,
    "batch": lambda d: d.left,
    "open spans/.part-*.tmp": lambda d: d.left,
    "open fd spans/.part-*.tmp": lambda d: d.left,
    "os.chmod fd spans/.part-*.tmp": lambda d: d.left,
    "os.rename spans/.part-*.tmp spans/part-*": lambda d: d.left,
    "open spans": lambda d: d.left,
    "open notes/.part-*.tmp": lambda d: d.left,
    "os.chmod fd notes/.part-*.tmp": lambda d: d.left,
    "os.rename notes/.part-*.tmp notes/part-*": lambda d: d.left,
    "open notes": lambda d: d.left,
}
#: Those before there is a ``run.json`` with its folders.
FIRST_POINTS: dict[str, Callable[[Directory], int]] = {
    "os.mkdir .": lambda d: not d.exists,
    "open .run.json.*.tmp": lambda _: 1,
    "os.chmod fd .run.json.*.tmp": lambda _: 1,
    "os.rename .run.json.*.tmp run.json": lambda _: 1,
    "os.mkdir spans": lambda _: 1,
    "os.mkdir notes": lambda _: 1,
}
#: Those after the last part. A lock that is found is removed before one's own is.
LAST_POINTS: dict[str, Callable[[Directory], int]] = {
    "open .manifest.json.*.tmp": lambda _: 1,
    "os.rename .manifest.json.*.tmp manifest.json": lambda _: 1,
    "os.remove lock.json": lambda d: 1 + d.has_lock,
}
#: A point further ahead than this would take too long.
_AHEAD = 3

#: What is looked out for. A file of this name that was not there before is a reason to kill.
SIGHTS = ("lock.json", "spans/.part-*.tmp", "spans/part-*", "notes/.part-*.tmp", "notes/part-*")


@dataclass(frozen=True)
class Aim:
    """When to kill a process.

    how: ``at random`` after ``seconds``, ``on sight`` of the ``nth`` new file like ``what``, or ``held`` when it comes
    for the ``nth`` time to a call like ``what``.
    """

    how: str
    what: str = ""
    nth: int = 1
    seconds: float = 0.0


def draw(rng: random.Random, directory: Directory, used: Counter[str], seconds: float, *, last: bool) -> Aim:
    """The next kill: mostly at a point, of those that lie ahead one that was used least.

    seconds: how long a whole run takes; last: the last kill of a run, which comes at its end.
    """
    first = not directory.has_run and rng.random() < 0.6
    last = last or (directory.left <= _AHEAD and rng.random() < (0.9 if directory.left else 0.5))
    how = "held" if first or last else rng.choice(("held", "held", "on sight", "at random"))
    if how == "at random":
        # Each goes on where the one before it was killed, so that they spread over the run.
        return Aim(how, seconds=rng.uniform(0, seconds / 4))
    if how == "on sight":
        ahead = dict.fromkeys(SIGHTS, directory.left) | {"lock.json": 1}
    else:
        points = FIRST_POINTS if first else LAST_POINTS if last else POINTS
        ahead = {what: int(times(directory)) for what, times in points.items()}
    what = min((what for what, times in ahead.items() if times), key=lambda what: (used[what], rng.random()))
    used[what] += 1
    return Aim(how, what, ahead[what] if last else rng.randint(1, min(ahead[what], _AHEAD)))


def _listing(path: Path) -> set[tuple[str, int]]:
    """Names and inodes of what lies in a run directory, while somebody writes it."""
    found = set()
    for folder in ("", "spans/", "notes/"):
        try:
            with os.scandir(path / folder) as entries:
                found |= {(folder + entry.name, entry.inode()) for entry in entries}
        except FileNotFoundError:
            continue
    return found


# ------------------------------------------------------------------------------------------------ runs and their checks


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to. arguments: all but ``-o``; rows: those of each part; seconds: it took."""

    arguments: tuple[str, ...]
    files: Files
    rows: dict[str, frozenset[Row]]
    manifest: dict[str, Any]
    part_rows: int
    seconds: float


def run_whole(folder: Path, inputs: Path, model: str, form: str, part_rows: int) -> Whole:
    """Run without a kill."""
    command = ("annotate", str(inputs), "--model", model, "--format", form, "--part-rows", str(part_rows), "--resume")
    out = folder / f"whole-{model}-{form}"
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "medner.cli", *command, "-o", str(out)],
        env=environment(), capture_output=True, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - begun
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr.decode(errors='replace')}"
    files = look(out)
    rows = {name: frozenset(_keys(out / "notes" / name)) for name in committed(files)}
    return Whole(command, files, rows, json.loads(files["manifest.json"].content), part_rows, seconds)


def _keys(path: Path) -> Iterator[Row]:
    """Row keys of a part."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path, columns=["source", "row"]).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return ((row["source"], row["row"]) for row in rows)


class Trial:
    """One run directory and the processes that write it, one after another, until one comes to its end."""

    def __init__(self, whole: Whole, folder: Path) -> None:
        """folder: absent; gets the run directory ``out``, and what the processes leave beside it."""
        self._whole = whole
        self._folder = folder
        self._out = folder / "out"
        self.files: Files = {}
        self.taken: list[list[Row]] = []
        self.kills: list[tuple[str, Aim]] = []
        self.finished = False
        folder.mkdir()

    def directory(self) -> Directory:
        """What the next process finds."""
        kept, parts = len(committed(self.files)), len(self._whole.rows)
        return Directory(
            self._out.exists(), "lock.json" in self.files, "run.json" in self.files, bool(drafts(self.files)), kept,
            parts - kept,
        )  # fmt: skip

    def go(self, aim: Aim | None) -> str | None:
        """Let a process write until it is killed as aimed, and check what it left.

        Returns the phase in which it was killed, None where it came to its end before; then the run is checked, too.
        """
        held, record, errors = (self._folder / f"{name}-{len(self.taken)}" for name in ("held", "rows", "errors"))
        point = (aim.what, str(aim.nth)) if aim is not None and aim.how == "held" else ("", "0")
        command = [*self._whole.arguments, "-o", str(self._out)]
        with errors.open("wb") as stderr, subprocess.Popen(
            [sys.executable, "-P", __file__, "child", *map(str, (self._out, record, held)), *point, *command],
            env=environment(), stdout=subprocess.DEVNULL, stderr=stderr,
        ) as process:  # fmt: skip
            try:
                if aim is None:
                    process.wait(_PATIENCE)
                else:
                    self._wait(process, aim, held)
            finally:
                process.kill()
        before, self.files = self.files, look(self._out)
        taken = [(row[0], row[1]) for row in _recorded(record)]
        self.taken.append(taken)
        said = errors.read_text(encoding="utf-8", errors="replace")
        assert process.returncode in (0, -signal.SIGKILL), f"exit code {process.returncode}: {said}"
        assert "waiting" not in said, f"a dead process was waited for: {said}"
        check_files(before, self.files, self._whole)
        check_rows(before, taken, self._whole)
        if process.returncode == 0:
            check_end(self.files, self._whole)
            again = reinferred(self.taken)
            assert again <= len(self.kills) * self._whole.part_rows, f"{again} rows inferred again"
            assert set(itertools.chain(*self.taken)) == set().union(*self._whole.rows.values()), "rows never taken in"
            self.finished = True
            return None
        assert aim is not None
        found = phase(before, self.files, process.pid, taken, len(self._whole.rows))
        self.kills.append((found, aim))
        return found

    def _wait(self, process: subprocess.Popen[bytes], aim: Aim, held: Path) -> None:
        """Return when the process ought to be killed, or is gone."""
        known, seen = _listing(self._out), set[tuple[str, int]]()
        begun = time.monotonic()
        while process.poll() is None:
            seconds = time.monotonic() - begun
            assert seconds < _PATIENCE, f"{aim}: nothing happens"
            if aim.how == "at random" and seconds >= aim.seconds:
                return
            if aim.how == "held" and held.exists():
                return
            if aim.how == "on sight":
                seen |= _listing(self._out) - known
                if sum(fnmatchcase(name, aim.what) for name, _ in seen) >= aim.nth:
                    return
            time.sleep(0.0005 if aim.how == "on sight" else 0.002)


def _recorded(record: Path) -> Iterator[Any]:
    """Row keys from a record; the last line may be cut short."""
    lines = record.read_bytes().split(b"\n")[:-1] if record.exists() else []
    return itertools.chain.from_iterable(map(json.loads, lines))


def reinferred(taken: Iterable[Sequence[Row]]) -> int:
    """How often a row was taken in that had been taken in before."""
    return sum(Counter(itertools.chain.from_iterable(taken)).values()) - len(set(itertools.chain.from_iterable(taken)))


def check_files(before: Files, after: Files, whole: Whole) -> None:
    """Under final names is what has to be there, and nothing that was committed has been touched."""
    expected = tables(whole.files)
    for name, content in tables(after).items():
        assert content == expected.get(name), f"{name}: {len(content)} bytes that are not those of a whole run"
    kept = [f"{folder}/{name}" for name in committed(before) for folder in ("spans", "notes")]
    for name in [*kept, *(name for name in ("run.json", "manifest.json") if name in before)]:
        assert after.get(name) == before[name], f"{name}: touched after it was committed"
    assert committed(after) == list(whole.rows)[: len(committed(after))], "a part before the last one is missing"
    assert len(half_committed(after)) <= 1, "several parts are begun"
    for name in {"run.json", "manifest.json"} & after.keys():
        assert isinstance(json.loads(after[name].content), dict), f"{name}: cut short"


def check_rows(before: Files, taken: Sequence[Row], whole: Whole) -> None:
    """No row of a committed part was taken in, and none twice."""
    kept = set[Row]().union(*(whole.rows[name] for name in committed(before)))
    assert kept.isdisjoint(taken), f"{len(kept.intersection(taken))} rows of committed parts inferred again"
    assert len(set(taken)) == len(taken), "a process took in a row twice"


def check_end(files: Files, whole: Whole) -> None:
    """The directory holds what that of a whole run holds, and the manifest's counts add up to the whole run's."""
    assert files.keys() == whole.files.keys(), f"other files: {sorted(files.keys() ^ whole.files.keys())}"
    assert tables(files) == tables(whole.files)
    assert len(tables(files)) == 2 * len(whole.rows)
    manifest = json.loads(files["manifest.json"].content)
    for name in manifest.keys() | whole.manifest.keys():
        if name not in ("options", "counts", "seconds", "stages"):
            assert manifest[name] == whole.manifest[name], f"manifest: another {name}"
    assert manifest["options"] | {"output": ""} == whole.manifest["options"] | {"output": ""}
    counts, expected = manifest["counts"], whole.manifest["counts"]
    for name in expected:
        if not name.endswith(("_kept", "_inferred", "_reused")):
            assert counts[name] == expected[name], f"manifest: {counts[name]} {name}, not {expected[name]}"
    windows = counts["windows_inferred"] + counts["windows_reused"] + counts["windows_kept"]
    assert windows == counts["windows"], f"manifest: {windows} windows inferred, reused or kept of {counts['windows']}"


# -------------------------------------------------------------------------------------------------------- the long form


def write_inputs(data: Path, folder: Path, every: int) -> int:
    """Write MTSamples and ACI-BENCH, or every so manieth note, as CSV, JSONL plain and compressed, and Parquet.

    Returns the number of notes.
    """
    folder.mkdir()
    with (data / "mtsamples" / "mtsamples.csv").open(encoding="utf-8", newline="") as lines:
        notes = [{"note_id": row["note_id"], "text": row["transcription"]} for row in csv.DictReader(lines)]
    with (data / "aci-bench" / "notes.jsonl").open(encoding="utf-8") as lines:
        notes += map(json.loads, lines)
    notes = notes[::every]
    first, second, third = (share * len(notes) // 4 for share in (1, 2, 3))
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["note_id", "text"])
        writer.writeheader()
        writer.writerows(notes[:first])
    (folder / "b.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes[first:second]), encoding="utf-8")
    with gzip.open(folder / "c.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.writelines(json.dumps(note) + "\n" for note in notes[second:third])
    pq.write_table(pa.Table.from_pylist(notes[third:]), folder / "d.parquet")
    return len(notes)


@dataclass
class Report:
    """What happened, by model. kills: by phase and how, too; again: rows inferred again; bound: how many may be."""

    kills: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    bound: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)


def kill_runs(
    rng: random.Random, model: str, kills: int, folder: Path, part_rows: int, report: Report, used: Counter[str]
) -> None:
    """Kill runs of one model over ``folder/notes`` until so many kills are done; each run is let go to its end."""
    wholes: dict[str, Whole] = {}
    for number in itertools.count():
        form = ("parquet", "jsonl")[number % 2] if model == "tiny" else "parquet"
        if form not in wholes:
            wholes[form] = whole = run_whole(folder, folder / "notes", model, form, part_rows)
            assert len(whole.rows) >= 25, f"{len(whole.rows)} parts"
            print(f"{model} {form}: {len(whole.rows)} parts, {whole.seconds:.1f} s without a kill", flush=True)
        begun = time.monotonic()
        trial = Trial(wholes[form], folder / f"{model}-{number}")
        wanted = min(kills, KILLS_PER_RUN)
        while not trial.finished:
            last = len(trial.kills) == wanted - 1
            aim = None
            if len(trial.kills) < wanted:
                aim = draw(rng, trial.directory(), used, wholes[form].seconds, last=last)
            try:
                found = trial.go(aim)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{aim}, after {trial.kills}") from error
            if found is not None and aim is not None:
                report.kills[model, found, aim.how] += 1
        again, bound = reinferred(trial.taken), len(trial.kills) * part_rows
        report.again[model] += again
        report.bound[model] += bound
        report.runs[model] += 1
        seconds = time.monotonic() - begun
        print(
            f"{model} {form}: {len(trial.kills)} kills, {again} rows inferred again (at most {bound}), "
            f"the same bytes, {seconds:.1f} s",
            flush=True,
        )
        kills -= len(trial.kills)
        if kills == 0:
            return


def summary(report: Report) -> str:
    """Kills as a table: a line for each phase, a column for each way to aim and for each model; the rows below it."""
    hows, models = ("at random", "on sight", "held"), sorted({key[0] for key in report.kills})
    lines = [f"{'killed in the phase':<40}" + "".join(f"{name:>10}" for name in (*hows, *models, "all"))]
    for name in (*PHASES, "all"):
        found = {key: n for key, n in report.kills.items() if name in (key[1], "all")}
        columns = [sum(n for key, n in found.items() if how == key[2]) for how in hows]
        columns += [sum(n for key, n in found.items() if model == key[0]) for model in models]
        lines.append(f"{name:<40}" + "".join(f"{n:>10}" for n in (*columns, sum(found.values()))))
    for model in models:
        again, bound = report.again[model], report.bound[model]
        lines.append(f"{model}: {report.runs[model]} runs, {again:,} rows inferred again of at most {bound:,}")
    return "\n".join(lines)


def main() -> int:
    """Kill as often as the arguments say; 1 where a check fails."""
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", choices=("tiny", "default"), help="of all kills, not only of a part of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="use every Nth note, in parts as much smaller"
    )
    here = Path(__file__).resolve().parents[2]
    parser.add_argument("--data", type=Path, default=os.environ.get("MEDNER_DATA", here / "shared" / "data"))
    given = parser.parse_args()
    if not given.data.is_dir():
        parser.error(f"no data in {given.data}; set MEDNER_DATA")
    slow = min(given.kills, max(1, 12 * given.kills // 50))
    share = {given.model: given.kills} if given.model else {"tiny": given.kills - slow, "default": slow}
    rng, used = random.Random(given.seed), Counter[str]()
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="medner-kill-"))
    begun = time.monotonic()
    print(f"seed {given.seed}", flush=True)
    try:
        part_rows = write_inputs(given.data, folder / "notes", given.every) // PARTS
        for model, kills in share.items():
            if kills:
                kill_runs(rng, model, kills, folder, part_rows, report, used)
    except (AssertionError, KeyboardInterrupt) as error:
        print(f"{summary(report)}\nfailed: {error or 'interrupted'}\nits files are in {folder}")
        return 1
    print(f"{summary(report)}\n{time.monotonic() - begun:.0f} s")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
