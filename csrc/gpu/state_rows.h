// A thread's part of a state where tokens come one by one: in registers, in fp32, from the first
// token to the last.
//
// Eight lanes share kRows neighbouring value rows, 16 key channels of each: a warp has 4 * kRows
// rows. A lane's channels lie so that every access is 16 bytes and the eight lanes of a row [V, K]
// read without gaps. Of a state [K, V] an access is 4 value channels of one key channel: kRows
// is 4.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

constexpr int kRowLanes = 8, kRowChannels = kDim / kRowLanes;

// A caller's state of one sequence and head, rows of value channels or, [K, V], of key channels.
struct StatePlace {
  char* data;
  int64_t stride;
  bool present;  // a null pointer instead would make the compiler doubt what memory this is
  bool aligned;  // every row starts at a multiple of 16 bytes
};

MATE_DEVICE int row_lane() { return lane_index() % kRowLanes; }

template <int32_t kDtype, int kRows, bool kValueFirst>
struct StateRows {
  static constexpr int kSize = kDtype == MATE_FLOAT32 ? 4 : 2, kElements = kRows * kRowChannels;
  static constexpr int kPiece = kValueFirst ? 16 / kSize : kRows;  // elements of an access
  static constexpr int kPieceWords = kPiece * kSize / 4, kWords = kElements * kSize / 4;
  static_assert(kValueFirst || kRows == 4, "a piece is four value channels");

  float s[kRows][kRowChannels];

  // As memory holds it: piece after piece.
  struct Raw {
    uint32_t words[kWords];
  };

  // Key channels that lie one after another, and the first of the j-th four.
  static constexpr int kRun = kValueFirst ? kPiece : 4;
  MATE_DEVICE static int channel_of_four(int j) {
    const int i = j * 4;
    return (i / kRun * kRowLanes + row_lane()) * kRun + i % kRun;
  }
  // The thread's first row, of its warp's from `row` on.
  MATE_DEVICE static int first_row(int row) { return row + lane_index() / kRowLanes * kRows; }

  MATE_DEVICE static float& element(float (&s)[kRows][kRowChannels], int e) {
    return kValueFirst ? s[e / kRowChannels][e % kRowChannels] : s[e % kRows][e / kRows];
  }

  // access(piece, its address), for the warp's rows from `row` on.
  template <class Access>
  MATE_DEVICE static void each_piece(const StatePlace& place, int row, const Access& access) {
    const int first = first_row(row);
    const int64_t step = place.stride * kSize;
    if (kValueFirst) {
      char* at = place.data + first * step + row_lane() * 16;
      constexpr int kPieces = kRowChannels / kPiece;
      MATE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        MATE_UNROLL
        for (int j = 0; j < kPieces; ++j) access(r * kPieces + j, at + j * kRowLanes * 16);
        at += step;
      }
    } else {
      MATE_UNROLL
      for (int j = 0; j < kRowChannels / 4; ++j) {
        char* at = place.data + channel_of_four(j) * step + first * kSize;
        MATE_UNROLL
        for (int i = 0; i < 4; ++i) access(j * 4 + i, at + i * step);
      }
    }
  }

  MATE_DEVICE static Raw load(const StatePlace& place, int row) {
    Raw raw = {};
    if (!place.present) return raw;
    if (place.aligned) {
      each_piece(place, row, [&](int piece, const char* at) {
        uint32_t* to = raw.words + piece * kPieceWords;
        if (kPieceWords == 4) {
          const Eight x = *reinterpret_cast<const Eight*>(at);
          MATE_UNROLL
          for (int i = 0; i < 4; ++i) to[i % kPieceWords] = x.x[i];
        } else {
          const PackedFour x = *reinterpret_cast<const PackedFour*>(at);
          MATE_UNROLL
          for (int i = 0; i < 2; ++i) to[i] = x.x[i];
        }
      });
    } else {
      each_piece(place, row, [&](int piece, const char* at) {
        uint32_t* to = raw.words + piece * kPieceWords;
        MATE_UNROLL
        for (int i = 0; i < kPieceWords; ++i) {
          if (kSize == 4) {
            to[i] = reinterpret_cast<const uint32_t*>(at)[i];
          } else {
            const uint16_t* two = reinterpret_cast<const uint16_t*>(at) + 2 * i;
            to[i] = two[0] | static_cast<uint32_t>(two[1]) << 16;
          }
        }
      });
    }
    return raw;
  }

  MATE_DEVICE void take(const Raw& raw) {
    MATE_UNROLL
    for (int e = 0; e < kElements; ++e) {
      if (kSize == 4) {
        element(s, e) = from_bits(raw.words[e % kWords]);
      } else {
        const uint32_t two = raw.words[e / 2];
        element(s, e) = from_16_bits<kDtype>(e % 2 ? two >> 16 : two & 0xffffu);
      }
    }
  }

  MATE_DEVICE void store(const StatePlace& place, int row) {
    if (!place.present) return;
    const auto word = [&](int i) {
      if (kSize == 4) return to_bits(element(s, i));
      return pack<kDtype>(element(s, 2 * i % kElements), element(s, (2 * i + 1) % kElements));
    };
    if (place.aligned) {
      each_piece(place, row, [&](int piece, char* at) {
        const int i = piece * kPieceWords;
        if (kPieceWords == 4) {
          *reinterpret_cast<Eight*>(at) = {{word(i), word(i + 1), word(i + 2), word(i + 3)}};
        } else {
          *reinterpret_cast<PackedFour*>(at) = {{word(i), word(i + 1)}};
        }
      });
    } else {
      each_piece(place, row, [&](int piece, char* at) {
        MATE_UNROLL
        for (int i = 0; i < kPieceWords; ++i) {
          const uint32_t bits = word(piece * kPieceWords + i);
          if (kSize == 4) {
            reinterpret_cast<uint32_t*>(at)[i] = bits;
          } else {
            reinterpret_cast<uint16_t*>(at)[2 * i] = static_cast<uint16_t>(bits);
            reinterpret_cast<uint16_t*>(at)[2 * i + 1] = static_cast<uint16_t>(bits >> 16);
          }
        }
      });
    }
  }
};

}  // namespace gpu
}  // namespace mate
