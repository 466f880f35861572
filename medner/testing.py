"""A tiny deterministic model for tests: of medner itself, and of pipelines that call it.

Its rule can be done in the head: the words asthma, breast, cancer, diabetes, fever, heart, failure, mellitus, type and
2 are mentions of label ``Disease``, and neighbouring ones are one mention.

>>> from medner import testing
>>> [span.text for span in testing.annotator()("Type 2 diabetes, no fever.")]
['Type 2 diabetes', 'fever']
"""

from __future__ import annotations

from pathlib import Path

from medner.annotate import Annotator, Options


def bundle() -> Path:
    """Directory of the tiny bundle: fp32, windows of 32 tokens, known to ``--model`` as ``tiny``."""
    return Path(__file__).parent / "bundles" / "tiny"


def annotator(options: Options | None = None) -> Annotator:
    """An annotator of the tiny bundle."""
    return Annotator.load(bundle(), options)
