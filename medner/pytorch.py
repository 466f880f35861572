"""A trained PyTorch checkpoint behind the same seam as an exported graph, so that both see equal windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medner import bundle as bundles
from medner.annotate import Annotator, Options
from medner.errors import DeviceError, MissingPackage, ModelError, install

#: PyTorch's names of the precisions that a checkpoint can be run in.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class TorchModel:
    """A PyTorch token classifier with the call of :class:`medner.runtime.Session`, in evaluation mode."""

    def __init__(
        self, checkpoint: str | Path, precision: str = "fp32", device: str = "cpu", *, on_hub: bool = False
    ) -> None:
        """Load a checkpoint directory, or with ``on_hub`` a model of that name on the Hugging Face hub.

        precision: a key of :data:`DTYPES`, of weights and arithmetic; device: ``cpu`` or ``cuda:N``. Raises
        :class:`ModelError`, :class:`MissingPackage`, or :class:`DeviceError` where PyTorch has no such device.
        """
        try:
            import torch
            from transformers import AutoModelForTokenClassification
        except ImportError as exc:
            raise MissingPackage(f'PyTorch checkpoints need the extra "train": {install("train")}') from exc
        self._torch: Any = torch
        self._checkpoint, self._precision = checkpoint, precision
        try:
            model, loading = AutoModelForTokenClassification.from_pretrained(
                str(checkpoint), local_files_only=not on_hub, trust_remote_code=False, output_loading_info=True
            )
        except Exception as exc:  # transformers, torch and safetensors raise what they like
            reason = next(iter(str(exc).splitlines()), "")[:200]
            raise ModelError(f"{checkpoint}: transformers cannot load it ({type(exc).__name__}: {reason})") from exc
        if missing := loading["missing_keys"]:
            # transformers fills them with random numbers and goes on.
            raise ModelError(f"{checkpoint}: has no weights for {', '.join(sorted(missing)[:4])}; fine-tune it first")
        try:
            self._model = model.to(device=device, dtype=getattr(torch, DTYPES[precision])).eval()
        except (RuntimeError, AssertionError) as exc:  # the latter where torch was built without CUDA
            reason = next(iter(str(exc).splitlines()), "")[:200]
            raise DeviceError(f"--device {device}: PyTorch cannot run there ({reason}); use --device cpu") from exc
        self._device = device

    def __call__(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits of a batch; see :meth:`medner.runtime.Session.__call__`. Raises :class:`ModelError`."""
        torch = self._torch
        real = np.arange(ids.shape[1]) < lengths[:, None]
        mask = torch.from_numpy(real.astype(np.int64))
        with torch.inference_mode():
            output = self._model(input_ids=torch.from_numpy(ids).to(self._device), attention_mask=mask.to(self._device))
        logits = np.asarray(output.logits.float().cpu().numpy(), dtype=np.float32)
        if not np.isfinite(logits[real].max(axis=-1)).all():  # as a session judges its graph
            step = "use another precision" if self._precision == "fp16" else "train it at a lower learning rate"
            raise ModelError(f"{self._checkpoint}: its logits are no numbers in {self._precision}; {step}")
        return logits

    def use_threads(self, threads: int) -> None:
        """Let each call run on so many threads of the CPU, as every other PyTorch model of this process will."""
        self._torch.set_num_threads(threads)


def torch_annotator(checkpoint: str | Path, options: Options | None = None) -> Annotator:
    """An annotator that runs a PyTorch checkpoint in fp32 on windows cut exactly as for a bundle.

    Raises :class:`ModelError` for another precision, and :class:`DeviceError` where PyTorch has no such device.
    """
    options = options or Options()
    if options.precision not in ("auto", "fp32"):
        raise ModelError(f"{checkpoint}: a checkpoint is run in fp32 and has no {options.precision}; export it first")
    bundle = bundles.load_checkpoint(checkpoint, options.window)
    device = "cpu" if options.device == "auto" else options.device
    return Annotator(bundle, TorchModel(checkpoint, device=device), options, precision="fp32")


def weight_bytes(checkpoint: Path) -> int:
    """Size of a checkpoint's weights on disk, in bytes, where transformers would find them."""
    return sum(file.stat().st_size for file in bundles.weight_files(checkpoint))


def device_name(device: str) -> str | None:
    """What the GPU calls itself; None for ``cpu``."""
    if device == "cpu":
        return None
    import torch

    return str(torch.cuda.get_device_name(device))
