"""PyTorch checkpoint -> fp32 ONNX graph, by Optimum."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

from medner.errors import MissingPackage, ModelError

OPSET = 18


def to_onnx(checkpoint: Path, graph: Path) -> None:
    """Export a token classifier with ``input_ids``, ``attention_mask`` (and ``token_type_ids``) -> ``logits``.

    Batch and length stay dynamic. Optimum's own check of the shapes runs; that both models find the same spans is for
    :mod:`medner.export.verify` to show. Raises :class:`ModelError`, :class:`MissingPackage`.
    """
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as exc:
        raise MissingPackage('exporting needs: pip install "medner[export]"') from exc
    graph.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with _quiet():
                main_export(str(checkpoint), scratch, task="token-classification", opset=OPSET, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as exc:
            raise ModelError(f"{checkpoint}: Optimum cannot export it ({type(exc).__name__})") from exc
        for file in Path(scratch).glob("model.onnx*"):
            shutil.move(file, graph.parent / file.name.replace("model.onnx", graph.name))


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
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
