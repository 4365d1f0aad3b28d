"""``python -m mate selftest``: that it finds what is wrong, and says so."""

import json
import math

import pytest
import torch

import mate
from mate import selftest
from mate.__main__ import main
from mate.selftest import cases, probe, report


def test_a_cpu_is_right(capsys):
    assert main(["selftest", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == f"mate {mate.__version__}, torch {torch.__version__}"
    assert lines[2].split() == ["device", "backend", "operator", "case", "error", "bound"]
    assert lines[-1].split(" of ")[0] + " right" == lines[-1].split(" of ")[1]
    assert captured.err == ""  # no progress where there is no terminal
    for operator in ("chunk_kda", "recurrent_kda", "short_conv", "gated_norm", "layer"):
        assert any(line.split()[2:3] == [operator] and line.endswith("ok") for line in lines)


def test_json_holds_versions_and_results(capsys):
    assert main(["selftest", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["torch"] == torch.__version__ and found["devices"] == {}
    assert len(found["results"]) > 15
    assert all(x["ok"] and x["error"] <= x["bound"] for x in found["results"])


def spoiled(change):
    right = cases.chunk_kda

    def chunk_kda(*args, **kwargs):
        output, state = right(*args, **kwargs)
        return change(output), state

    return chunk_kda


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x: x.roll(1, -1), 1.0),
        (lambda x: x * 1.01, 1e-2),
        (lambda x: x.flip(2) if x.shape[2] > 1 else -x, 1.0),
        (lambda x: x.index_fill(1, torch.tensor([0]), math.nan), None),
    ],
    ids=["channels", "1 %", "heads", "NaN"],
)
def test_wrong_numbers_are_found(change, error, capsys, monkeypatch):
    monkeypatch.setattr(cases, "chunk_kda", spoiled(change))
    assert main(["selftest", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert not found["ok"]
    for x in found["results"]:
        assert x["ok"] == (x["operator"] != "chunk_kda")
        if not x["ok"]:
            assert x["note"] == "output is wrong"
            assert x["error"] is None if error is None else x["error"] > error / 2
    assert main(["selftest", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text and "cpu chunk_kda, bf16 bounded T150: output is wrong" in text


def test_an_exception_belongs_into_the_table(capsys, monkeypatch):
    def raises(*_, **__):
        raise RuntimeError("a KDA kernel was not launched:\n  no room")

    monkeypatch.setattr(cases, "gated_rms_norm", raises)
    assert main(["selftest", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "RuntimeError: a KDA kernel was not launched: no room" in text
    assert text.count("WRONG") == 3


def test_an_absent_device_is_an_error(capsys):
    absent = next(x for x in ("musa", "cuda") if x not in selftest.devices())
    assert main(["selftest", "--device", absent]) == 1
    assert f"PyTorch finds no {absent} here" in capsys.readouterr().err


def test_progress_counts_to_the_end(capsys):
    calls = []
    results = selftest.run(["cpu"], lambda *x: calls.append(x))
    assert [x[0] for x in calls] == list(range(len(results) + 1))
    assert {x[1] for x in calls} == {len(results)}
    for call in calls:
        report.progress_bar(*call)
    assert "cpu chunk_kda" in capsys.readouterr().err


# ---- the probe of GPU kernels, whose results are made up here ------------------------------------


def test_the_right_numbers_are_right():
    for name, right in probe.expected().items():
        assert probe.compare(name, right.float(), right)[1:] == (
            pytest.approx(0, abs=1e-7),
            0.0 if right.shape[0] == 16 or name == "shuffles" else 1e-6,
            "",
        )


def test_a_wrong_element_is_named():
    name, right = next(iter(probe.expected().items()))
    got = right.clone()
    got[3, 5] = -1
    found = probe.compare(name, got, right)
    assert found.error > found.bound
    assert found.note.startswith("1 of 256 wrong, first row 3, column 5: expected ")
    got[3, 5] = math.nan
    found = probe.compare(name, got, right)
    assert math.isinf(found.error) and "got nan" in found.note


def test_a_mistaken_operand_is_told():
    A, B = probe.matrices().double()
    name, right = next(iter(probe.expected().items()))
    for got, said in (
        (A @ B.T, "these are A B^T"),
        (A.T @ B, "these are A^T B"),
        (right.T, "these are A B, transposed"),
        (torch.zeros(16, 16), "these are zeros"),
        (right.roll(1, 0), "the numbers of A B in other places"),
    ):
        assert probe.compare(name, got.double(), right).note.endswith(said)
    assert ";" not in probe.compare(name, right + 1, right).note


def test_a_probe_that_cannot_run_is_wrong(monkeypatch):
    monkeypatch.setattr(probe, "missing", lambda device: None)
    monkeypatch.setattr(probe.gpu, "library", lambda device: "no library")
    (first, *_) = selftest._probe("cuda")
    assert not first.ok and "no library" in first.note
