"""The distribution: what it needs to build, what it holds, and what happens without a compiler."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_torch_is_no_build_requirement():
    """A build requirement on torch would download gigabytes into the build environment."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[build-system]")[1].split("\n[")[0]
    requires = ast.literal_eval(re.search(r"requires\s*=\s*(\[.*?\])", section, re.S).group(1))
    assert [re.match(r"[\w-]+", name).group() for name in requires] == ["scikit-build-core"]


def build_wheel(folder: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir"]
    command += [str(folder), "-v", f"-Cbuild-dir={folder}/build"]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel), done.stdout + done.stderr


def test_wheel_fits_every_python_and_torch(tmp_path):
    wheel, _ = build_wheel(tmp_path)
    assert re.fullmatch(r"mate_kda-[\d.]+-py3-none-\w+\.whl", Path(wheel.filename).name)
    names = wheel.namelist()
    assert "mate/lib/libmate_cpu.so" in names and "mate/functional/reference.py" in names
    needed = subprocess.run(
        ["readelf", "-d", wheel.extract("mate/lib/libmate_cpu.so", tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    libraries = set(re.findall(r"NEEDED.*\[(\w+)", needed))
    assert libraries <= {"libc", "libm", "libpthread", "ld"}, libraries


def test_install_without_a_compiler(tmp_path):
    """The wheel is built all the same, says what is missing, and the pytorch backend serves."""
    tools = tmp_path / "tools"  # a PATH with nothing else on it
    tools.mkdir()
    for name in ("cmake", "ninja"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)
    wheel, log = build_wheel(tmp_path, CXX="/no/compiler", PATH=str(tools))
    said = " ".join(log.split())  # CMake wraps lines
    assert "the CPU kernels are not built" in said and "install g++ or clang++" in said
    assert "mate/lib/libmate_cpu.so" not in wheel.namelist()
    wheel.extractall(tmp_path / "site")
    program = """
import warnings, torch, mate
assert mate.backend_for("cpu").name == "pytorch"
q = torch.randn(1, 4, 1, 128)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        output = mate.chunk_kda(q, q, q, -q.abs(), q[..., 0])
assert output.isfinite().all()
(warning,) = [w for w in caught if "mate" in str(w.message)]
print(warning.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "install a C++ compiler" in done.stdout and "pip install" in done.stdout


@pytest.mark.parametrize(
    ("machines", "said"),
    [("cpu,cuda", "no working nvcc was found"), ("cpu,tpu", "`tpu` is not one of cpu, cuda, musa")],
)
def test_what_mate_build_names_must_build(tmp_path, machines, said):
    environment = os.environ | {"MATE_BUILD": machines, "CUDACXX": "/no/nvcc"}
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and said in " ".join(done.stderr.split())


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_mate_build_cuda(tmp_path):
    """The library is made for one architecture; without a GPU its launches fail in words."""
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-DMATE_BUILD=cpu,cuda"]
    subprocess.run([*command, "-DCMAKE_CUDA_ARCHITECTURES=90"], check=True)
    subprocess.run(["cmake", "--build", tmp_path, "--target", "mate_cuda"], check=True)
    program = """
import torch, gpu_host
from pathlib import Path
import ctypes, sys
from kda_cases import draw
from mate.backends import gpu
lib = gpu.load(Path(sys.argv[1]))
case = draw(T=70, dtype=torch.bfloat16)
call = gpu_host.call_of(case.tensors, case.options)
if not torch.cuda.is_available():
    assert gpu_host.launch(lib, call, torch.empty_like(call.v), None) == 3
    assert lib.mate_gpu_last_error()
"""
    paths = f"{ROOT / 'tests'}{os.pathsep}{ROOT / 'tests/backends'}"
    paths += os.pathsep + os.environ.get("PYTHONPATH", "")
    command = [sys.executable, "-c", program, str(tmp_path / "libmate_cuda.so")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths})


@pytest.mark.parametrize("module", ["transformers", "torch_musa", "accelerate"])
def test_import_mate_does_not_import(module):
    program = f"import sys, mate; mate.layers.KDACache; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
