"""The tiny bundle is what its script writes, and the documented examples run."""

from __future__ import annotations

import doctest
import runpy
from pathlib import Path

import pytest

import medner
from medner import testing
from medner.errors import ModelError


def test_tiny_bundle_is_what_its_script_writes(tmp_path: Path, tiny_parts: dict[str, bytes]) -> None:
    """``tests/build_tiny.py`` writes the shipped files byte for byte, and no others."""
    pytest.importorskip("onnx", reason="the tiny bundle is built with onnx")
    script = runpy.run_path(str(Path(__file__).with_name("build_tiny.py")))
    script["build"](tmp_path)
    built = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert sorted(built) == sorted(tiny_parts)
    for name, content in built.items():
        assert content == tiny_parts[name], name


def test_examples_of_the_testing_module() -> None:
    """The docstrings' examples give what they show."""
    result = doctest.testmod(testing)
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_of_the_package() -> None:
    """So do the package's, where the default bundle is."""
    if not (testing.bundle().parent / "default").is_dir():
        pytest.skip("no default bundle in this checkout")
    result = doctest.testmod(medner)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("note", "mentions"),
    [
        ("Type 2 diabetes, no fever.", ["Type 2 diabetes", "fever"]),
        ("BREAST CANCER and heart failure; asthma", ["BREAST CANCER", "heart failure", "asthma"]),
        ("Diabetes mellitus type 2", ["Diabetes mellitus type 2"]),
        ("No known problems.", []),
        ("", []),
    ],
)
def test_the_rule_of_the_tiny_bundle(note: str, mentions: list[str]) -> None:
    """Its ten words are mentions, and neighbouring ones are one mention."""
    assert [(span.text, span.label) for span in testing.annotator()(note)] == [(m, "Disease") for m in mentions]


def test_options_reach_the_annotator() -> None:
    """The tiny bundle takes the same options as any other."""
    assert testing.annotator(medner.Options(window=16)).bundle.window == 16
    with pytest.raises(ModelError, match="tiny: no int8 variant"):
        testing.annotator(medner.Options(precision="int8"))
