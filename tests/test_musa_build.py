"""``MATE_BUILD=musa``, with an mcc that is none: what is asked of it, and what is refused in words.

That the real one accepts the source cannot be shown without it.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mate.backends import gpu

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")

# Notes what it was called with, and compiles the emulated GPU instead.
MCC = """#!/bin/sh
if [ "$1" = --version ]; then
  printf '%b\\n' "{said}"
  exit {status}
fi
printf '%s\\n' "$@" > "{folder}/arguments"
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && target="$2"
  shift
done
exec g++ -std=c++17 -O1 -fPIC -shared -fvisibility=hidden -I{root}/csrc/include \\
  {root}/csrc/gpu/host.cpp {root}/csrc/gpu/arch/host.cpp -o "$target"
"""


def make_mcc(folder: Path, said: str, status: int = 0) -> Path:
    mcc = folder / "bin" / "mcc"
    mcc.parent.mkdir(parents=True)
    mcc.write_text(MCC.format(said=said, status=status, folder=folder, root=ROOT))
    mcc.chmod(0o755)
    return mcc


def configure(build: Path, **environment: str) -> tuple[bool, str]:
    """Whether CMake was content, and what it said on one line."""
    removed = {"MUSA_HOME", "MUSA_PATH"}
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", build],
        env=kept | {"MATE_BUILD": "musa"} | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(
    bool(shutil.which("mcc")) or Path("/usr/local/musa/bin/mcc").exists(),
    reason="an mcc is installed on this machine",
)
def test_a_missing_compiler_names_the_fix(tmp_path: Path) -> None:
    content, said = configure(tmp_path)
    assert not content
    assert "MATE_BUILD=musa asks for the MUSA kernels, but no mcc was found" in said
    assert "set MUSA_HOME" in said and "MTCC 5.1.0 or newer" in said


@pytest.mark.parametrize("version", ["mcc version 4.3.6", "clang version 14.0.0\nMTCC 5.0.9"])
def test_an_old_compiler_is_named(version: str, tmp_path: Path) -> None:
    mcc = make_mcc(tmp_path / "musa", version.replace("\n", "\\n"))
    content, said = configure(tmp_path / "build", MUSA_HOME=str(tmp_path / "musa"))
    assert not content
    assert f"need MTCC 5.1.0 or newer, but {mcc} is {version.split()[-1]}" in said
    assert "Install a newer MUSA toolkit" in said


def test_a_broken_compiler_is_named(tmp_path: Path) -> None:
    mcc = make_mcc(tmp_path / "musa", "no licence", status=3)
    content, said = configure(tmp_path / "build", MUSA_PATH=str(tmp_path / "musa"))
    assert not content and f"`{mcc} --version` failed (3): no licence" in said


def test_an_unknown_version_is_said_and_tried(tmp_path: Path) -> None:
    make_mcc(tmp_path / "musa", "clang version 14.0.0")
    content, said = configure(tmp_path / "build", MUSA_HOME=str(tmp_path / "musa"))
    assert content
    assert "names no version of MTCC" in said and "It said: clang version 14.0.0" in said


@pytest.mark.parametrize("where", ["MUSA_HOME", "MUSA_PATH", "PATH"])
@pytest.mark.parametrize("said", ["mcc version 5.1.0", "MTCC 10.0"])
def test_a_good_compiler_is_found(where: str, said: str, tmp_path: Path) -> None:
    mcc = make_mcc(tmp_path / "musa", f"clang version 14.0.0\\n{said} (release)")
    place = str(tmp_path / "musa")
    if where == "PATH":
        place = f"{mcc.parent}{os.pathsep}{os.environ['PATH']}"
    content, log = configure(tmp_path / "build", **{where: place})
    assert content and f"MUSA kernels by {mcc}, MTCC {said.split()[-1]}" in log


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_builds_a_library_that_mate_loads(tmp_path: Path) -> None:
    root = tmp_path / "musa"
    make_mcc(root, "mcc version 5.1.0")
    (root / "lib").mkdir()
    (root / "include").mkdir()
    build = tmp_path / "build"
    content, said = configure(build, MUSA_HOME=str(root))
    assert content, said
    command = ["cmake", "--build", build, "--target", "mate_musa"]
    subprocess.run(command, check=True)
    arguments = (root / "arguments").read_text().splitlines()
    in_order = ["-x", "musa", "--offload-arch=mp_31", "-O2", "-std=c++17", "-fPIC", "-shared"]
    assert arguments[: len(in_order)] == in_order
    assert f"-I{ROOT}/csrc/include" in arguments and f"{ROOT}/csrc/gpu/musa.mu" in arguments
    assert f"-I{root}/include" in arguments and f"-L{root}/lib" in arguments
    assert arguments[-1] == "-lmusart"
    # Versions differ in which of these they know: an unknown one would end the build.
    assert not [x for x in arguments if x.startswith("-mllvm") or x == "-ffast-math"]
    assert not isinstance(gpu.load(build / "libmate_musa.so"), str)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "Compiling the MUSA kernels" not in again.stdout  # nothing has changed
