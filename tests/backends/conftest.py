"""The emulated GPU on which several files run the kernels: built once."""

import shutil

import gpu_host
import pytest
from gpu_machines import Emulated


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    return Emulated(gpu_host.build(tmp_path_factory.mktemp("gpu_host_emulated")))
