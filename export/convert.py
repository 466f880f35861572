"""PyTorch checkpoint -> fp32 ONNX graph, by Optimum."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from medner.errors import MissingPackage, ModelError, install

OPSET = 18


def to_onnx(checkpoint: Path, graph: Path) -> None:
    """Export a token classifier with ``input_ids``, ``attention_mask`` (and ``token_type_ids``) -> ``logits``.

    Batch and length stay dynamic. Optimum's own check of the shapes runs; that both models find the same spans is for
    :mod:`medner.export.verify` to show. Raises :class:`ModelError`, :class:`MissingPackage`; OSError where the graph
    cannot be written.
    """
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as exc:
        raise MissingPackage(f'exporting needs the extra "export": {install("export")}') from exc
    graph.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=graph.parent) as scratch:
        try:
            with _quiet():
                main_export(
                    str(checkpoint),
                    scratch,
                    task="token-classification",
                    opset=OPSET,
                    framework="pt",
                    library_name="transformers",
                    local_files_only=True,
                )
        except Exception as exc:  # transformers, torch and safetensors raise what they like
            # The system's own come of writing: the checkpoint has been read before, and transformers' have no number.
            if isinstance(exc, OSError) and exc.errno is not None:
                raise
            reason = next(iter(str(exc).splitlines()), "")[:200]
            raise ModelError(f"{checkpoint}: Optimum cannot export it ({type(exc).__name__}: {reason})") from exc
        if (Path(scratch) / "model.onnx_data").exists():
            raise ModelError(f"{checkpoint}: more than 2 GB of weights, which one ONNX file cannot hold")
        shutil.move(Path(scratch) / "model.onnx", graph)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's remarks about constants, of no use to a reader, off the terminal."""
    levels = {name: logging.getLogger(name).level for name in ("optimum", "transformers", "torch.onnx")}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
