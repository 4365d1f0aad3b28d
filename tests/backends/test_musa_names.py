"""No MUSA name but those known from public sources: no compiler here would find an invented one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = Path(__file__).with_name("musa_names.txt")
MUSA = re.compile(r"\b(?:musa[A-Z]\w*|__musa\w*|__MUSA\w*|MUSA\w*|mtmusa::[\w:]+|__mt_\w+)")
HEADER = re.compile(r'#include [<"](\w*musa\w*\.h)[>"]')
# What PyTorch itself asks of every device outside its source; see torch/utils/backend_registration.
OF_PYTORCH = {"is_initialized", "manual_seed_all", "get_amp_supported_dtype"}


def listed() -> dict[str, str]:
    """Every name with its source."""
    lines = (line for line in NAMES.read_text().splitlines() if line and line[0] != "#")
    return dict(line.split(maxsplit=1) for line in lines)


def code_of(path: Path) -> str:
    """Without comments and strings."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.S)
    text, strings = re.subn(r'(?<!include )"[^"\n]*"', '""', text)
    return text


def used_in_kernels() -> set[str]:
    found = set()
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".mu"):
            continue
        code = code_of(path)
        found |= set(MUSA.findall(code)) | set(HEADER.findall(code))
        if path.name in ("musa.h", "musa.mu", "wmma.h", "mp31.h"):
            found |= set(re.findall(r"\b__\w+", code))
            assert not re.search(r"\basm\b", code), f"{path.name} holds assembly"
    return found - {"musa.h"}


def asked_of_torch_musa() -> set[str]:
    """mate's tests run on a stand-in for torch.musa: what that lacks they cannot ask for."""
    tree = ast.parse((ROOT / "tests/backends/musa_stand_in.py").read_text())
    (runtime,) = (x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Runtime")
    methods = {x.name for x in runtime.body if isinstance(x, ast.FunctionDef)}
    asked = {f"torch.musa.{x}" for x in methods - OF_PYTORCH if not x.startswith("_")}
    for path in (ROOT / "mate").rglob("*.py"):
        text = path.read_text()
        asked |= set(re.findall(r"\btorch\.musa\.\w+", text))
        asked |= {f"torch.musa.Stream.{x}" for x in re.findall(r"\.(musa_\w+)", text)}
    return asked


def test_every_name_has_a_public_source() -> None:
    names = listed()
    used = used_in_kernels() | asked_of_torch_musa()
    assert not used - set(names), "names without a public source in musa_names.txt"
    assert not set(names) - used, "names in musa_names.txt that nothing uses"


def test_an_invented_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.h"
    lines = [
        "#include <musa_new.h>",
        "musaDoIt(); // musaNo",
        '__musa_x(mtmusa::wmma::y, "musaNo");',
    ]
    path.write_text("\n".join(lines))
    code = code_of(path)
    assert set(MUSA.findall(code)) == {"musaDoIt", "__musa_x", "mtmusa::wmma::y"}
    assert HEADER.findall(code) == ["musa_new.h"]
