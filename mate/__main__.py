"""What ``python -m mate`` can say of this machine.

check     versions, which backend serves which call, and why not another
selftest  what every operator computes here, against float64
"""

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import mate
from mate import selftest
from mate.backends import Choice, NoBackendError, gpu, native
from mate.backends.devices import DEVICES
from mate.selftest import devices, report

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    """Model name and the features that matter to kernels, as far as the system tells them."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in _FEATURES if name in flags],
        "threads": torch.get_num_threads(),
    }


def _problem(device: str) -> str | None:
    """Why there are no kernels for GPUs of this type; None where the library loads."""
    library = gpu.library(device)
    return library if isinstance(library, str) else None


def _choice(device: str, dtype: torch.dtype, recurrent: bool) -> Choice:
    try:
        return mate.backend_for(device, dtype, recurrent)
    except NoBackendError as error:
        return Choice("none", error.refusals)


def _call(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Who serves tensors of this kind; ``ok``: every kernel that there is for them."""
    forward, decode = (_choice(device, dtype, recurrent) for recurrent in (False, True))
    kernels = device == "cpu" or dtype in gpu.CHUNKED_DTYPES
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "forward": forward.name,
        "decode": decode.name,
        "backward": "pytorch",
        "refusals": decode.refusals | forward.refusals,
        "ok": decode.name == "native" and (forward.name == "native" or not kernels),
    }


def check() -> dict[str, Any]:
    """Everything ``mate check`` says, as plain data.

    ``ok`` is false where a call would be slow for which there are kernels; there are none for fp32
    prompts on a GPU.
    """
    library = native.library()
    calls = [_call(device, dtype) for device in devices() for dtype in _DTYPES]
    names = ("torch", "transformers", "torch_musa")
    return {
        "mate": mate.__version__,
        "folder": str(Path(mate.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in names},
        "cpu": _cpu(),
        "native": {
            "cpu": {
                "isa": native.isa(),
                "problem": library if isinstance(library, str) else None,
            },
            **{device: {"problem": _problem(device)} for device in DEVICES},
        },
        "calls": calls,
        "ok": all(call["ok"] for call in calls),
    }


def _row(cells: Iterable[str]) -> str:
    return "".join(f"{cell:10}" for cell in cells).rstrip()


def _print(found: dict[str, Any]) -> None:
    versions = ("mate", "python", "torch", "transformers", "torch_musa")
    print("  ".join(f"{name} {found[name] or '-'}" for name in versions))
    print(f"mate is in {found['folder']}")
    cpu = found["cpu"]
    print(f"cpu: {cpu['model']}, {cpu['threads']} threads, {' '.join(cpu['features'])}")
    kernels = found["native"]["cpu"]
    print(f"cpu kernels: {kernels['isa'] or 'none'}")
    for device in DEVICES:
        problem = found["native"][device]["problem"]
        print(f"{device} kernels: {'none, ' + problem if problem else 'built'}")
    columns = ("device", "dtype", "forward", "decode", "backward")
    for call in ({name: name for name in columns}, *found["calls"]):
        print(("" if call["device"] != "device" else "\n") + _row(call[name] for name in columns))
    reasons = {
        f"{call['device']}: not {name}, because {reason}"
        for call in found["calls"]
        for name, reason in call["refusals"].items()
    }
    for reason in sorted(reasons):
        print(reason)
    print("\nok" if found["ok"] else "\nsome calls are not served by a fast backend, see above")


def _check(options: argparse.Namespace) -> int:
    found = check()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0 if found["ok"] else 1


def _selftest(options: argparse.Namespace) -> int:
    absent = set(options.device or []) - set(devices())
    if absent:
        print(f"PyTorch finds no {', '.join(sorted(absent))} here", file=sys.stderr)
        return 1
    progress = report.progress_bar if sys.stderr.isatty() else None
    results = selftest.run(options.device, progress)
    ok = all(x.ok for x in results)
    names = selftest.device_names(options.device or devices())
    if options.json:
        about = check() | {"devices": names}
        print(json.dumps(about | {"results": [x.as_dict() for x in results], "ok": ok}, indent=2))
    else:
        versions = f"mate {mate.__version__}, torch {torch.__version__}"
        print(", ".join([versions, *(f"{x}: {name}" for x, name in names.items())]) + "\n")
        print(report.table(results))
    return 0 if ok else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    description = "Exit code 1 when a call would be served by a slow backend, or by none."
    command = commands.add_parser("check", help="what serves which call", description=description)
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=_check)
    description = "Exit code 1 when a result is wrong."
    command = commands.add_parser(
        "selftest", help="every operator against float64", description=description
    )
    command.add_argument("--json", action="store_true", help="print it as JSON, with the versions")
    names = ("cpu", *DEVICES)
    command.add_argument("--device", nargs="+", choices=names, help="only these types of device")
    command.set_defaults(run=_selftest)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except ValueError as error:  # of MATE_DISABLE
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
