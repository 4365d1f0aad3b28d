"""csrc/gpu/arch/mp31.h against the published layouts of MP31's products, for any M, N and K.

mutlass, include/mute/atom/mma_traits_mp31.hpp, in closed form; that a GPU keeps to them is what
`python -m mate selftest` finds out.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LANES, SIZE = 32, 16

PROGRAM = """
#include <cstdio>
#define MATE_DEVICE inline
#include "arch/mp31.h"
int main() {
  using namespace mate::gpu::mp31;
  for (int t = 0; t < 32; ++t) {
    for (int v = 0; v < 8; ++v) {
      printf("%d %d %d %d\\n", operand_row(t, v), operand_k(t, v), c_row(t, v), c_column(t, v));
    }
  }
}
"""


def operand(lane: int, v: int, K: int = SIZE) -> tuple[int, int]:
    """Of 16 bits, K-major: (row, k)."""
    return lane // 4 + 8 * (v // (2 * (K // 8))), 2 * (lane % 4) + v % 2 + 8 * (v // 2 % (K // 8))


def accumulator(lane: int, v: int, N: int = SIZE) -> tuple[int, int]:
    return lane // 8 + 4 * (v // (N // 8)), lane % 8 + 8 * (v % (N // 8))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_as_published(tmp_path: Path) -> None:
    (tmp_path / "layout.cpp").write_text(PROGRAM)
    program = tmp_path / "layout"
    command = ["g++", "-std=c++17", f"-I{ROOT / 'csrc/gpu'}", tmp_path / "layout.cpp"]
    subprocess.run([*command, "-o", program], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    found = [tuple(map(int, line.split())) for line in lines.splitlines()]
    places = [(lane, v) for lane in range(LANES) for v in range(8)]
    assert found == [(*operand(*place), *accumulator(*place)) for place in places]
    everywhere = {(i, j) for i in range(SIZE) for j in range(SIZE)}
    assert {x[:2] for x in found} == {x[2:] for x in found} == everywhere
