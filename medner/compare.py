"""A trained PyTorch checkpoint behind the same seam as an exported graph, so that both see equal windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medner import bundle as bundles
from medner.annotate import Annotator, Options
from medner.errors import MissingPackage, ModelError


class TorchModel:
    """A PyTorch token classifier with the call of :class:`medner.runtime.Session`; float32, in evaluation mode."""

    def __init__(self, checkpoint: str | Path) -> None:
        """Load a checkpoint directory; raises :class:`ModelError` or :class:`MissingPackage`."""
        try:
            import torch
            from transformers import AutoModelForTokenClassification
        except ImportError as exc:
            raise MissingPackage('PyTorch checkpoints need: pip install "medner[train]"') from exc
        self._torch: Any = torch
        try:
            model, loading = AutoModelForTokenClassification.from_pretrained(
                str(checkpoint), local_files_only=True, output_loading_info=True
            )
        except Exception as exc:  # transformers, torch and safetensors raise what they like
            reason = next(iter(str(exc).splitlines()), "")[:200]
            raise ModelError(f"{checkpoint}: transformers cannot load it ({type(exc).__name__}: {reason})") from exc
        if missing := loading["missing_keys"]:
            # transformers fills them with random numbers and goes on.
            raise ModelError(f"{checkpoint}: has no weights for {', '.join(sorted(missing)[:4])}; fine-tune it first")
        self._model = model.float().eval()

    def __call__(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits of a batch; see :meth:`medner.runtime.Session.__call__`."""
        torch = self._torch
        mask = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64))
        with torch.inference_mode():
            output = self._model(input_ids=torch.from_numpy(ids), attention_mask=mask)
        return np.asarray(output.logits.float().numpy(), dtype=np.float32)


def torch_annotator(checkpoint: str | Path, options: Options | None = None) -> Annotator:
    """An annotator that runs a PyTorch checkpoint on windows cut exactly as for a bundle."""
    options = options or Options()
    bundle = bundles.load_checkpoint(checkpoint, options.window)
    return Annotator(bundle, TorchModel(checkpoint), options, precision="fp32")
