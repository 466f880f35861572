"""Exact spans from clinical notes, offline.

>>> import medner
>>> annotate = medner.load("default")
>>> [(span.text, span.label) for span in annotate("Patient with type 2 diabetes.")]
[('type 2 diabetes', 'Disease')]
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medner.annotate import Annotator, Options
    from medner.schema import Span

    __version__: str

__all__ = ["Annotator", "Options", "Span", "load"]

# Onnxruntime reports its use to its makers, with what an error says of a note's tokens, unless this is set before it is
# imported, by whatever library; child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def load(model: str | Path = "default", options: Options | None = None) -> Annotator:
    """Load a model for annotation; the same as :meth:`Annotator.load`."""
    from medner.annotate import Annotator

    return Annotator.load(model, options)


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: ``medner --help`` shall not wait for numpy and pyarrow."""
    if name == "__version__":
        from importlib.metadata import version

        return version("medner")
    if name == "Span":
        from medner.schema import Span

        return Span
    if name in __all__:
        from medner import annotate

        return getattr(annotate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
