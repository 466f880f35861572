"""The errors of medner and the exit code that each one gives the command line.

::

    MednerError (1)            a defect of medner, or a check that failed
    |-- CheckFailed (1)        a verification, a doctor's finding or the parity gate
    |-- UsageError (2)         the call itself is wrong
    |-- TooManyRejected (3)    the run is complete, but too many rows were rejected
    |-- InputError (4)         notes, columns or data sets that cannot be used
    |-- ModelError (4)         a model directory that cannot be used
    |-- MissingPackage (4)     an optional package that the call needs is not installed
    |-- DeviceError (5)        the device asked for is not the one that runs
    `-- OutputError (6)        the output cannot be written

A message names the value, the place and the next step in a line or two. It never holds the text of a note.
"""


class MednerError(Exception):
    """Base of all errors that medner raises on purpose."""

    exit_code = 1


class CheckFailed(MednerError):
    """A check ran to its end and the answer is no."""


class UsageError(MednerError):
    """The arguments contradict each other or lie outside their range."""

    exit_code = 2


class TooManyRejected(MednerError):
    """The output is complete, but more rows were rejected than the caller allows."""

    exit_code = 3


class InputError(MednerError):
    """An input file, a column or a data set is missing or unusable."""

    exit_code = 4


class ModelError(MednerError):
    """A model directory is missing, incomplete, altered or of an unknown kind."""

    exit_code = 4


class MissingPackage(MednerError):
    """An optional dependency is absent; the message names the extra that brings it."""

    exit_code = 4


class DeviceError(MednerError):
    """The device asked for cannot run the model."""

    exit_code = 5


class OutputError(MednerError):
    """The output exists, is locked, or cannot be written."""

    exit_code = 6


def install(extra: str) -> str:
    """How to get one of medner's extras: not from a package index, where others may have taken its name."""
    return f'pip install ".[{extra}]" in a checkout of medner'


def defect(exc: BaseException) -> str:
    """A line about an error that nobody foresaw: its type and its place, for its message may hold note text."""
    place, trace = "?", exc.__traceback__
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"internal error: {type(exc).__name__} in {place}; MEDNER_DEBUG=1 shows the traceback"
