"""Exact spans from clinical notes, offline.

>>> import medner
>>> annotate = medner.load("default")
>>> [(span.text, span.label) for span in annotate("Patient with type 2 diabetes.")]
[('type 2 diabetes', 'Disease')]
"""

from __future__ import annotations

from importlib.metadata import version as _version
from pathlib import Path

from medner.annotate import Annotator, Options
from medner.schema import Span

__all__ = ["Annotator", "Options", "Span", "load"]
__version__ = _version("medner")


def load(model: str | Path = "default", options: Options | None = None) -> Annotator:
    """Load a model for annotation; the same as :meth:`Annotator.load`."""
    return Annotator.load(model, options)
