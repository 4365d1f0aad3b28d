"""What mate does on a musa device, without one: on a stand-in whose memory is the CPU's
(musa_stand_in.py), with the GPU kernels' emulation as its library.

Each test is a program, since a process can rename its private device but once. That torch_musa
itself behaves like the stand-in cannot be shown here.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_host
import pytest

ROOT = gpu_host.ROOT

PRELUDE = """
import importlib.metadata, sys
import musa_stand_in
import pytest, torch
version_of = importlib.metadata.version
installed = {"torch_musa": "2.7.1+git"}
importlib.metadata.version = lambda name: installed.get(name) or version_of(name)
import mate
from kda_cases import draw, rel_rms
from mate.backends import gpu
from mate.backends.devices import unfit
from musa_stand_in import runtime, STREAM
assert "torch_musa" not in sys.modules
bf16 = torch.bfloat16
"""

SERVES = """
case = draw(lens=[5, 0, 70], Hqk=1, Hv=2, dtype=bf16)
expected = case.reference()
for index in (0, 1):
    device = torch.device("musa", index)
    choice = mate.backend_for(device, bf16)
    assert choice.name == "native" and choice.refusals == {}, choice
    runtime.asked.clear()
    t = {name: x.to(device) for name, x in case.tensors.items()}
    output, state = mate.chunk_kda(**t, output_final_state=True)
    assert output.device == state.device == device
    # the stream of the tensors' device, with that device current; nothing was waited for
    assert runtime.asked == [f"stream of {index} on {index}"], runtime.asked
    assert runtime.current == 0
    assert rel_rms(output.cpu(), expected[0]) <= 5e-3 and rel_rms(state.cpu(), expected[1]) <= 4e-3
assert mate.backend_for("musa", bf16).name == "native"
"""

STREAMS = """
streams = []
lib = gpu.library("musa")
class Spy:
    def __getattr__(self, name):
        return getattr(lib, name)
    def mate_gpu_kda_forward(self, packed, workspace, stream):
        streams.append(stream)
        return lib.mate_gpu_kda_forward(packed, workspace, stream)
gpu.library = lambda device_type: Spy()
for index in (0, 1):
    t = {name: x.to(f"musa:{index}") for name, x in draw(T=3, dtype=bf16).tensors.items()}
    mate.chunk_kda(**t)
assert streams == [STREAM, STREAM + 1], streams
"""

REFUSES = """
def reason(dtype=bf16):
    unfit.cache_clear()
    choice = mate.backend_for("musa", dtype)
    assert choice.name == "pytorch"
    return choice.refusals["native"]

assert reason(torch.float32).endswith("float16 and bfloat16, and torch.float32 token by token only")
runtime.capability = (2, 2)
assert reason() == "the musa kernels need compute capability 3.1 (MTT S5000), not 2.2"
runtime.capability = (3, 1)
installed["torch_musa"] = "2.5.0"
assert reason() == "the musa kernels need torch_musa 2.7 or newer, not 2.5.0"
installed["torch_musa"] = "nightly"
assert reason() == "the musa kernels need torch_musa 2.7 or newer, not nightly"
del installed["torch_musa"]
assert reason() == "torch_musa is not installed"
installed["torch_musa"] = "10.0"
runtime.available = False
assert reason() == "PyTorch finds no MUSA device here"
runtime.available = True
gpu.library.cache_clear()
gpu.library_path = lambda device_type: __import__("pathlib").Path("/nowhere")
assert "`MATE_BUILD=cpu,musa pip install" in reason()
# and plain PyTorch serves, which is said once
case = draw(T=5, dtype=bf16)
with pytest.warns(UserWarning, match="the pytorch backend serves KDA on musa:0"):
    output = mate.chunk_kda(**{name: x.to("musa") for name, x in case.tensors.items()})
assert rel_rms(output.cpu(), case.reference()[0]) <= 5e-3
"""

CHECK = """
import json
from mate.__main__ import main
assert main(["check", "--json"]) in (0, 1)
"""

SELFTEST = """
import json
from mate.__main__ import main
assert main(["selftest", "--device", "musa", "--json"]) == 0
"""

COMPILES = """
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    x = torch.empty(1, 5, 2, 128, device="musa", dtype=bf16)
    beta = torch.empty(1, 5, 2, device="musa", dtype=bf16)
    output, state = mate.chunk_kda(x, x, x, x, beta, output_final_state=True)
    assert output.device.type == state.device.type == "musa"
    assert output.shape == x.shape and state.shape == (1, 2, 128, 128)

def both(**tensors):
    return mate.chunk_kda(**tensors, output_final_state=True)

case = draw(T=70, dtype=bf16)
t = {name: x.to("musa") for name, x in case.tensors.items()}
compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
for got, expected in zip(compiled(**t), both(**t), strict=True):
    assert torch.equal(got.cpu(), expected.cpu())
"""

LAYER = """
import contextlib
from layer_truth import make_layer, truth
from mate.backends import gpu
from mate.layers import KDACache
call, queued = gpu.Queue.__call__, []
gpu.Queue.__call__ = lambda x, *rest: queued.append(x.function.__name__) or call(x, *rest)
layer = make_layer(dtype=bf16, num_v_heads=4)
x = torch.randn(5, 20, 48).to(bf16)
expected = [truth(layer, row)[0] for row in x]
layer = layer.to("musa")
for rows in (1, 2, 3, 4, 5):
    batch, cache = x[:rows].to("musa"), KDACache()
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in (batch[:, :18], *batch[:, 18:].split(1, 1))]
    for n, y in enumerate(torch.cat(parts, 1).cpu()):
        assert rel_rms(y, expected[n]) <= 1e-2
    few = rows <= 4
    assert queued[-2:] == 2 * ["mate_gpu_layer_step" if few else "mate_gpu_decode_step"], queued

def served(rows=1, dtype=bf16, context=contextlib.nullcontext):
    queued.clear()
    cache = KDACache()
    with torch.no_grad(), context():
        layer(x[:rows, :3].to("musa", dtype), cache=cache)
        layer(x[:rows, 3:4].to("musa", dtype), cache=cache)
    return "mate_gpu_layer_step" in queued

assert served() and served(4)
handle = layer.o_proj.register_forward_hook(lambda *_: None)
assert not served()
handle.remove()
weight = layer.q_proj._parameters.pop("weight")
layer.q_proj.weight = weight.detach()  # as sharding does
assert not served()
del layer.q_proj.weight
layer.q_proj.weight = weight
assert served()
forward, torch.nn.Linear.forward = torch.nn.Linear.forward, lambda *a: forward(*a)
assert not served()
torch.nn.Linear.forward = forward
assert served()
layer.k_proj.bias = torch.nn.Parameter(torch.zeros(256, dtype=bf16, device="musa"))
assert not served()
layer.k_proj.bias = None
assert not served(context=lambda: torch.autocast("cpu", dtype=bf16))
assert layer.fuse_projections() and served() and not served(2)
layer.float()
assert not served(dtype=torch.float32)
"""

PROGRAMS = {
    "serves": SERVES,
    "streams": STREAMS,
    "refuses": REFUSES,
    "check": CHECK,
    "selftest": SELFTEST,
    "compiles": COMPILES,
    "layer": LAYER,
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("musa")
    gpu_host.build(folder)
    return folder / "libmate_gpu_host.so"


def run(program: str, library: Path) -> subprocess.CompletedProcess:
    folders = [ROOT / "tests", ROOT / "tests/backends", ROOT / "tests/layers"]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "MATE_MUSA_LIBRARY": str(library)}
    command = [sys.executable, "-c", PRELUDE + program]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", PROGRAMS)
def test_on_a_stand_in(name: str, library: Path) -> None:
    done = run(PROGRAMS[name], library)
    assert done.returncode == 0, done.stdout + done.stderr
    if name == "check":
        assert '"device": "musa"' in done.stdout
    if name == "selftest":
        found = json.loads(done.stdout)
        assert found["devices"] == {"musa": "stand-in"}
        results = found["results"]
        assert all(x["ok"] and x["device"] == "musa" for x in results)
        assert len([x for x in results if x["operator"] == "kernels"]) == 8
        assert {x["backend"] for x in results if "bf16" in x["case"]} == {"native", "-"}
