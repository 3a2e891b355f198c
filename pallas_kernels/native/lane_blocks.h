// A list times a block of positions that stays in registers, for each size of block.
#pragma once

#include <algorithm>

#include "vector.h"

namespace clicktrain::CLICKTRAIN_ISA {

constexpr int kMostSums = CLICKTRAIN_LANES == 8 ? 12 : 16;  // of a block: what the registers hold
constexpr int kMostRows = 8, kMostColumns = 8;
// With so few sums each would wait for its last product: several sets of them are kept, and added at the end.
constexpr int sets_of(int sums) { return sums <= 2 ? 4 : 1; }
template <int Sets, int Rows, int Columns>
inline __attribute__((always_inline)) Vec<kLanes> total_of(const Vec<kLanes> (&sum)[Sets][Rows][Columns], int r, int c) {
  if constexpr (Sets == 4) return (sum[0][r][c] + sum[1][r][c]) + (sum[2][r][c] + sum[3][r][c]);
  return sum[0][r][c];
}

// One list on a block of rows x columns positions; `at` are the rows' places, `apart` vectors lie between columns. An
// entry has one tap, or the four of a corner, which begin so many codes behind it.
template <int Taps, int Rows, int Columns, int Apart>
void lane_block(const float* x, const int64_t* at, const int32_t* codes, const float* weights, int64_t count,
                const int32_t* place, const int32_t* steps, float* y, const int64_t* to, int64_t out_apart, bool begins) {
  constexpr int kSets = sets_of(Rows * Columns);
  Vec<kLanes> sum[kSets][Rows][Columns] = {};
  if (!begins) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[0][r][c] = load<kLanes>(y + to[r] + c * out_apart);
  }
  const float* row[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) row[r] = x + at[r];
  const auto add = [&](int32_t code, float weight, int set) __attribute__((always_inline)) {
    const int64_t offset = place[code];
    const Vec<kLanes> w = splat<kLanes>(weight);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[set % kSets][r][c] += w * load<kLanes>(row[r] + offset + c * (Apart * kLanes));
  };
  int64_t k = 0;
  if constexpr (Taps == 4) {
    for (; k < count; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) add(codes[k] + steps[j], weights[4 * k + j], j);
  } else {
    for (; kSets > 1 && k + 4 <= count; k += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) add(codes[k + j], weights[k + j], j);
    for (; k < count; ++k) add(codes[k], weights[k], 0);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) store<kLanes>(y + to[r] + c * out_apart, total_of(sum, r, c));
}

using LaneBlock = void (*)(const float*, const int64_t*, const int32_t*, const float*, int64_t, const int32_t*,
                           const int32_t*, float*, const int64_t*, int64_t, bool);
template <int Taps, int Apart, int Columns>
LaneBlock lane_block_rows(int rows) {
  constexpr int most = std::min(kMostRows, kMostSums / Columns);
  switch (rows) {
    case 1: return lane_block<Taps, 1, Columns, Apart>;
    case 2: return lane_block<Taps, std::min(2, most), Columns, Apart>;
    case 3: return lane_block<Taps, std::min(3, most), Columns, Apart>;
    case 4: return lane_block<Taps, std::min(4, most), Columns, Apart>;
    case 5: return lane_block<Taps, std::min(5, most), Columns, Apart>;
    case 6: return lane_block<Taps, std::min(6, most), Columns, Apart>;
    case 7: return lane_block<Taps, std::min(7, most), Columns, Apart>;
    default: return lane_block<Taps, std::min(8, most), Columns, Apart>;
  }
}
template <int Taps, int Apart>
LaneBlock lane_block_for(int rows, int columns) {
  switch (columns) {
    case 1: return lane_block_rows<Taps, Apart, 1>(rows);
    case 2: return lane_block_rows<Taps, Apart, 2>(rows);
    case 3: return lane_block_rows<Taps, Apart, 3>(rows);
    case 4: return lane_block_rows<Taps, Apart, 4>(rows);
    case 5: return lane_block_rows<Taps, Apart, 5>(rows);
    case 6: return lane_block_rows<Taps, Apart, 6>(rows);
    case 7: return lane_block_rows<Taps, Apart, 7>(rows);
    default: return lane_block_rows<Taps, Apart, 8>(rows);
  }
}

// Corners on a block of rows x columns positions that lie side by side: each vector is loaded once for all four weights.
template <int Rows, int Columns>
void corner_block(const float* x, int64_t pitch, const int32_t* codes, const float* weights, int64_t count,
                  const int32_t* place, float* y, int64_t out_pitch, bool begins) {
  constexpr int kSets = sets_of(Rows * Columns);
  Vec<kLanes> sum[kSets][Rows][Columns] = {};
  if (!begins) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[0][r][c] = load<kLanes>(y + r * out_pitch + c * kLanes);
  }
  for (int64_t k = 0; k < count; ++k, weights += 4) {
    const float* at = x + place[codes[k]];
    const Vec<kLanes> w00 = splat<kLanes>(weights[0]), w01 = splat<kLanes>(weights[1]);
    const Vec<kLanes> w10 = splat<kLanes>(weights[2]), w11 = splat<kLanes>(weights[3]);
#pragma GCC unroll 9
    for (int r = 0; r <= Rows; ++r, at += pitch) {
      Vec<kLanes> v[Columns + 1];
#pragma GCC unroll 9
      for (int c = 0; c <= Columns; ++c) v[c] = load<kLanes>(at + c * kLanes);
      if (r > 0) {
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[2 % kSets][r - 1][c] += w10 * v[c];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[3 % kSets][r - 1][c] += w11 * v[c + 1];
      }
      if (r < Rows) {
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[0][r][c] += w00 * v[c];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[1 % kSets][r][c] += w01 * v[c + 1];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) store<kLanes>(y + r * out_pitch + c * kLanes, total_of(sum, r, c));
}

using CornerBlock = void (*)(const float*, int64_t, const int32_t*, const float*, int64_t, const int32_t*, float*, int64_t,
                             bool);
constexpr int kCornerSums = CLICKTRAIN_LANES == 8 ? 8 : 16;
constexpr int kCornerColumns = CLICKTRAIN_LANES == 8 ? 2 : 4;
template <int Columns>
CornerBlock corner_block_rows(int rows) {
  constexpr int most = std::min(4, kCornerSums / Columns);
  switch (rows) {
    case 1: return corner_block<1, Columns>;
    case 2: return corner_block<std::min(2, most), Columns>;
    case 3: return corner_block<std::min(3, most), Columns>;
    default: return corner_block<most, Columns>;
  }
}
inline CornerBlock corner_block_for(int rows, int columns) {
  switch (columns) {
    case 1: return corner_block_rows<1>(rows);
    case 2: return corner_block_rows<2>(rows);
    case 3: return corner_block_rows<3>(rows);
    default: return corner_block_rows<4>(rows);
  }
}

}  // namespace clicktrain::CLICKTRAIN_ISA
