"""``python -m mate check``, and what says which backend serves."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import mate
from mate import backends
from mate.__main__ import main
from mate.backends import native, native_layer


def test_says_what_serves(capsys):
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mate"] == mate.__version__ and report["torch"] == torch.__version__
    assert report["native"]["cpu"] == {"isa": native.isa(), "problem": None}
    assert set(report["native"]) == {"cpu", "cuda", "musa"}
    served = {call["dtype"]: call["forward"] for call in report["calls"] if call["device"] == "cpu"}
    assert served == {"float16": "native", "bfloat16": "native", "float32": "native"}
    assert main(["check"]) == 0
    text = capsys.readouterr().out
    assert "cuda kernels: " in text and "musa kernels: " in text
    assert native.isa() in text and text.rstrip().endswith("ok")


def test_a_slow_backend_is_an_error(capsys, monkeypatch):
    monkeypatch.setenv("MATE_DISABLE", "native")
    assert main(["check"]) == 1
    assert "cpu: not native, because switched off by MATE_DISABLE" in capsys.readouterr().out
    assert main(["check", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {call["forward"] for call in report["calls"]} == {"pytorch"}


def test_no_backend_at_all(capsys, monkeypatch):
    monkeypatch.setenv("MATE_DISABLE", "native, pytorch")
    assert main(["check"]) == 1
    text = capsys.readouterr().out
    for name in ("native", "pytorch"):
        assert f"cpu: not {name}, because switched off by MATE_DISABLE" in text
    assert main(["check", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {call["forward"] for call in report["calls"]} == {"none"}
    with pytest.raises(RuntimeError, match="no backend serves.*native: switched off.*pytorch: sw"):
        mate.backend_for("cpu")


def test_an_unknown_backend_is_an_error(capsys, monkeypatch):
    monkeypatch.setenv("MATE_DISABLE", "nativ")
    message = "MATE_DISABLE must be a comma-separated list of native, pytorch, got 'nativ'"
    with pytest.raises(ValueError, match=message):
        mate.backend_for("cpu")
    with pytest.raises(ValueError, match=message):
        native_layer.serves(torch.zeros(1))
    assert main(["check"]) == 1
    assert message in capsys.readouterr().err


def test_switching_off_reaches_every_kernel(monkeypatch):
    assert mate.backend_for("cpu").name == "native" and native_layer.serves(torch.zeros(1))
    monkeypatch.setenv("MATE_DISABLE", "pytorch")
    assert mate.backend_for("cpu").name == "native" and native_layer.serves(torch.zeros(1))
    monkeypatch.setenv("MATE_DISABLE", " native ")
    assert mate.backend_for("cpu").name == "pytorch" and not native_layer.serves(torch.zeros(1))


def test_an_unknown_device_is_an_error():
    with pytest.raises(ValueError, match="device must be .*got 'nowhere'$"):
        mate.backend_for("nowhere")
    if not hasattr(torch, "musa"):
        with pytest.raises(ValueError, match="got 'musa'; install torch_musa and import it first"):
            mate.backend_for("musa")


@pytest.fixture
def reload_library(monkeypatch):
    """The library is looked for anew, and again after the test."""
    monkeypatch.delenv("MATE_CPU_LIBRARY", raising=False)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_a_missing_library_names_the_fix(capsys, monkeypatch, tmp_path, reload_library):
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "none.so")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "mate" / "backends" / "native.py"))
    assert main(["check"]) == 1
    text = capsys.readouterr().out
    assert "install a C++ compiler" in text
    assert "`pip install --force-reinstall --no-deps .` in mate's source folder" in text


def test_a_wrong_library_path_is_named(capsys, monkeypatch, tmp_path, reload_library):
    path = tmp_path / "libmate_cpu.so"
    monkeypatch.setenv("MATE_CPU_LIBRARY", str(path))
    assert main(["check"]) == 1
    assert f"MATE_CPU_LIBRARY={path} does not exist" in capsys.readouterr().out
    path.write_text("not a library")
    native.library.cache_clear()
    assert main(["check"]) == 1
    assert f"MATE_CPU_LIBRARY={path} could not be loaded" in capsys.readouterr().out


def test_a_source_tree_without_kernels_says_so(tmp_path):
    """Python that runs inside a clone imports ./mate, whose kernels nobody built."""
    package = Path(mate.__file__).parent
    shutil.copytree(package, tmp_path / "mate", ignore=shutil.ignore_patterns("lib", "*.pyc"))
    (tmp_path / "pyproject.toml").touch()
    command = [sys.executable, "-m", "mate", "check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"mate is in {tmp_path / 'mate'}\n" in done.stdout
    assert f"{tmp_path / 'mate'} is mate's source tree" in done.stdout
    assert "`make develop`" in done.stdout and "in another folder" in done.stdout


def test_the_warning_points_at_the_users_line(monkeypatch, tmp_path, reload_library):
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "none.so")
    monkeypatch.setattr(backends, "_warned", set())
    layer = mate.layers.KimiDeltaAttention(32, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(torch.randn(1, 3, 32))
    (warning,) = caught
    assert "pytorch backend serves KDA on cpu" in str(warning.message)
    assert warning.filename == __file__
