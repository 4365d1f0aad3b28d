// Where the elements of MP31's product of 16 x 16 x 16 lie: element v of a lane's registers.
// From the public traits of the instruction (docs/musa.md); not confirmed on hardware.
#pragma once

namespace mate {
namespace gpu {
namespace mp31 {

// 16-bit operands, K-major: rows m of A, rows n of B.
MATE_DEVICE int operand_row(int lane, int v) { return lane / 4 + v / 4 * 8; }
MATE_DEVICE int operand_k(int lane, int v) { return lane % 4 * 2 + v % 2 + v / 2 % 2 * 8; }

// The fp32 accumulator.
MATE_DEVICE int c_row(int lane, int v) { return lane / 8 + v / 2 * 4; }
MATE_DEVICE int c_column(int lane, int v) { return lane % 8 + v % 2 * 8; }

}  // namespace mp31
}  // namespace gpu
}  // namespace mate
