"""``python -m mate check``."""

import json

import torch

import mate
from mate.__main__ import main
from mate.backends import native


def test_says_what_serves(capsys):
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mate"] == mate.__version__ and report["torch"] == torch.__version__
    assert report["native"]["cpu"] == {"isa": native.isa(), "problem": None}
    assert set(report["native"]) == {"cpu", "cuda"}
    served = {call["dtype"]: call["forward"] for call in report["calls"] if call["device"] == "cpu"}
    assert served == {"float16": "native", "bfloat16": "native", "float32": "native"}
    assert main(["check"]) == 0
    text = capsys.readouterr().out
    assert "cuda kernels: " in text
    assert native.isa() in text and text.rstrip().endswith("ok")


def test_a_slow_backend_is_an_error(capsys, monkeypatch):
    monkeypatch.setenv("MATE_DISABLE", "native")
    assert main(["check"]) == 1
    assert "cpu: not native, because switched off by MATE_DISABLE" in capsys.readouterr().out
    assert main(["check", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {call["forward"] for call in report["calls"]} == {"pytorch"}


def test_a_missing_library_names_the_fix(capsys, monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "none.so")
    try:
        assert main(["check"]) == 1
        assert "install a C++ compiler" in capsys.readouterr().out
    finally:
        native.library.cache_clear()
