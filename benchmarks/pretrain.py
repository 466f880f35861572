"""Masked language modelling on unlabelled text: a pretrained encoder goes on learning in the domain.

    python benchmarks/pretrain.py BASE OUT --text FILE[:COLUMN] [--text ...] [--tokens 10000000] [--resume]

BASE is a BERT checkpoint, FILE a table of text in any form that ``medner annotate`` reads. OUT is a checkpoint to
fine-tune by ``medner train --base OUT``. Text is streamed: a window from each file in turn, and a file that ends begins
again. ``--resume`` goes on from what was saved last, a tenth of the way back at most, and ends with the same weights.
On two cores with AMX a million tokens take about three minutes, without it twice as long or longer; a GPU is used where
PyTorch finds one.

15 % of the tokens are to be guessed (Devlin et al. 2019, "BERT"), further training in the domain after Gururangan et
al. 2020, "Don't Stop Pretraining". Logits are made for the masked tokens alone: over 30,000 words they would cost more
than the rest of a small model.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from torch.utils.data import IterableDataset

from medner import sources
from medner.train import IGNORED, load_tokenizer, resolve_precision
from medner.windows import WordTokenizer

#: Share of the tokens that are masked.
MASKED = 0.15
WARMUP_RATIO, WEIGHT_DECAY, SEED = 0.06, 0.01, 13
#: Checkpoints kept on the way.
SAVES = 10


@dataclass(frozen=True, slots=True)
class PretrainOptions:
    """What is learnt from, and how.

    base: checkpoint directory; output: directory of the new checkpoint; texts: ``FILE`` or ``FILE:COLUMN`` each;
    tokens: to be read in all, special ones included; window: tokens of an example, special ones included;
    batch_size: examples of a step; lr: the highest learning rate; resume: go on from what was saved last.
    """

    base: str
    output: Path
    texts: tuple[str, ...]
    tokens: int = 10_000_000
    window: int = 96
    batch_size: int = 64
    lr: float = 3e-4
    resume: bool = False

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return max(1, self.tokens // (self.window * self.batch_size))


class Windows(IterableDataset):  # type: ignore[misc]
    """Windows of full length for ever: one from each file in turn, so that all count alike, whatever their size.

    Yields ``{"input_ids": [window]}``.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], window: int) -> None:
        """Read nothing yet. tokenizer: of the ``tokenizers`` library, which neither truncates nor pads."""
        self._tokenizer = tokenizer
        self._texts = texts
        self._window = window

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        """Begin anew."""
        for window in itertools.chain.from_iterable(zip(*map(self._of, self._texts), strict=True)):
            yield {"input_ids": window}

    def _of(self, given: str) -> Iterator[list[int]]:
        """Windows of one file; what is left of a text begins the next one."""
        frame = WordTokenizer(self._tokenizer.to_str())
        inner = self._window - len(frame.prefix) - len(frame.suffix)
        left: list[int] = []
        for text in _for_ever(given):
            ids = left + self._tokenizer.encode(text, add_special_tokens=False).ids
            left = ids[len(ids) - len(ids) % inner :]
            for start in range(0, len(ids) - len(left), inner):
                yield [*frame.prefix, *ids[start : start + inner], *frame.suffix]


def _for_ever(given: str) -> Iterator[str]:
    """The texts of ``FILE`` or ``FILE:COLUMN``, again and again."""
    while True:
        yield from sources.texts(given)


class _Trainer(transformers.Trainer):  # type: ignore[misc]
    """The Trainer with logits for the masked tokens alone."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy of the masked tokens."""
        del num_items_in_batch
        masked = inputs["labels"] != IGNORED
        hidden = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        logits = model.cls(hidden[masked]).float()
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"][masked])
        return (loss, {"loss": loss}) if return_outputs else loss


def pretrain(options: PretrainOptions) -> list[float]:
    """Train and save; the losses that were logged, the mean of a hundredth of the steps each."""
    # The trainer writes its state last: a checkpoint without it was cut off.
    saved = [path.parent for path in (options.output / "checkpoints").glob("checkpoint-*/trainer_state.json")]
    last = max(saved, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if last and not options.resume:
        raise SystemExit(f"{options.output}: holds a training; pass --resume, or name a new directory")
    if transformers.AutoConfig.from_pretrained(options.base).model_type != "bert":
        raise SystemExit(f"{options.base}: is no BERT, whose head for masked words this is")
    transformers.set_seed(SEED)
    cuda = torch.cuda.is_available()
    tokenizer = load_tokenizer(options.base)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # On a CPU the plain attention trains faster than the fused one, and drawing what is dropped takes long.
    model = transformers.BertForMaskedLM.from_pretrained(
        options.base,
        dtype=torch.float32,
        attn_implementation=None if cuda else "eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    kept = {name: getattr(transformers.AutoConfig.from_pretrained(options.base), name) for name in _DROPPED}
    precision = resolve_precision("auto")
    trainer = _Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(options.output / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            warmup_ratio=WARMUP_RATIO,
            weight_decay=WEIGHT_DECAY,
            lr_scheduler_type="linear",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            dataloader_num_workers=1 if cuda else 0,
            logging_steps=max(1, options.steps // 100),
            save_steps=max(1, options.steps // SAVES),
            save_total_limit=1,
            seed=SEED,
            report_to=[],
            remove_unused_columns=False,
            label_names=["labels"],
        ),
        train_dataset=Windows(backend, options.texts, options.window),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, seed=SEED),
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    for name, value in kept.items():
        setattr(model.config, name, value)
    tokenizer.save_pretrained(options.output)
    model.base_model.save_pretrained(options.output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


_DROPPED = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="FILE[:COLUMN]")
    for name in ("tokens", "window", "batch_size", "lr"):
        # Not the class's attribute: where a class has slots, that is no value.
        default = PretrainOptions.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--resume", action="store_true")
    given = vars(parser.parse_args())
    losses = pretrain(PretrainOptions(texts=tuple(given.pop("text")), **given))
    common.say(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
