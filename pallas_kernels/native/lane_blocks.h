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

// What is left of an output's list, in the order of its codes, with some weights an entry.
struct Rest {
  const int32_t* codes;
  const float* weights;
  int64_t count;
  bool has_below(int32_t end) const { return count > 0 && *codes < end; }
  void skip(int64_t entries, int64_t each) { codes += entries, weights += each * entries, count -= entries; }
};

// One list on a block of rows x columns positions; `at` are the rows' places, `apart` vectors lie between columns. An
// entry has one tap, or the four of a corner, which begin so many codes behind it. Returns how many entries have codes
// below `end`; those are taken.
template <int Taps, int Rows, int Columns, int Apart>
int64_t lane_block(const float* x, const int64_t* at, const Rest& list, int32_t end, const int32_t* place,
                   const int32_t* steps, float* y, const int64_t* to, int64_t out_apart, bool begins) {
  const int32_t* codes = list.codes;
  const float* weights = list.weights;
  const int64_t count = list.count;
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
    for (; k < count && codes[k] < end; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) add(codes[k] + steps[j], weights[4 * k + j], j);
  } else {
    for (; kSets > 1 && k + 4 <= count && codes[k + 3] < end; k += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) add(codes[k + j], weights[k + j], j);
    for (; k < count && codes[k] < end; ++k) add(codes[k], weights[k], 0);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) store<kLanes>(y + to[r] + c * out_apart, total_of(sum, r, c));
  return k;
}

using LaneBlock = int64_t (*)(const float*, const int64_t*, const Rest&, int32_t, const int32_t*, const int32_t*, float*,
                              const int64_t*, int64_t, bool);
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

constexpr int kCornerSums = CLICKTRAIN_LANES == 8 ? 8 : 16;
constexpr int kCornerColumns = CLICKTRAIN_LANES == 8 ? 2 : 4;
// Three to seven sums would each wait for its last product (fewer have several sets): those of two outputs are taken
// together, each in the order that it has alone.
constexpr int outputs_of(int sums) { return sums > 2 && sums < 8 && 2 * sums <= kCornerSums ? 2 : 1; }

// Corners on a block of rows x columns positions that lie side by side, for `Outputs` outputs: each vector is loaded once
// for all four weights. Takes the entries whose codes are below `end`.
template <int Rows, int Columns, int Outputs>
void corner_block(const float* x, int64_t pitch, Rest* lists, int32_t end, const int32_t* place, float* y,
                  int64_t out_pitch, int64_t positions, bool begins) {
  constexpr int kSets = sets_of(Rows * Columns);
  Vec<kLanes> sum[Outputs][kSets][Rows][Columns] = {};
  if (!begins) {
#pragma GCC unroll 2
    for (int o = 0; o < Outputs; ++o)
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[o][0][r][c] = load<kLanes>(y + o * positions + r * out_pitch + c * kLanes);
  }
  const auto add = [&](int o, int64_t k) __attribute__((always_inline)) {
    const float* at = x + place[lists[o].codes[k]];
    const float* weights = lists[o].weights + 4 * k;
    const Vec<kLanes> w00 = splat<kLanes>(weights[0]), w01 = splat<kLanes>(weights[1]);
    const Vec<kLanes> w10 = splat<kLanes>(weights[2]), w11 = splat<kLanes>(weights[3]);
#pragma GCC unroll 9
    for (int r = 0; r <= Rows; ++r, at += pitch) {
      Vec<kLanes> v[Columns + 1];
#pragma GCC unroll 9
      for (int c = 0; c <= Columns; ++c) v[c] = load<kLanes>(at + c * kLanes);
      if (r > 0) {
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[o][2 % kSets][r - 1][c] += w10 * v[c];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[o][3 % kSets][r - 1][c] += w11 * v[c + 1];
      }
      if (r < Rows) {
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[o][0][r][c] += w00 * v[c];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[o][1 % kSets][r][c] += w01 * v[c + 1];
      }
    }
  };
  int64_t both = 0;
  if constexpr (Outputs == 2) {
    const int64_t most = std::min(lists[0].count, lists[1].count);
    for (; both < most && lists[0].codes[both] < end && lists[1].codes[both] < end; ++both) add(0, both), add(1, both);
  }
#pragma GCC unroll 2
  for (int o = 0; o < Outputs; ++o) {
    int64_t k = both;
    for (; k < lists[o].count && lists[o].codes[k] < end; ++k) add(o, k);
    lists[o].skip(k, 4);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) store<kLanes>(y + o * positions + r * out_pitch + c * kLanes, total_of(sum[o], r, c));
  }
}

using CornerBlock = void (*)(const float*, int64_t, Rest*, int32_t, const int32_t*, float*, int64_t, int64_t, bool);
template <int Rows, int Columns>
CornerBlock corner_block_of(int64_t outputs) {
  constexpr int most = outputs_of(Rows * Columns);
  return outputs == 1 ? corner_block<Rows, Columns, 1> : corner_block<Rows, Columns, most>;
}
template <int Columns>
CornerBlock corner_block_rows(int rows, int64_t outputs) {
  constexpr int most = std::min(4, kCornerSums / Columns);
  switch (rows) {
    case 1: return corner_block_of<1, Columns>(outputs);
    case 2: return corner_block_of<std::min(2, most), Columns>(outputs);
    case 3: return corner_block_of<std::min(3, most), Columns>(outputs);
    default: return corner_block_of<most, Columns>(outputs);
  }
}
// For so many outputs, 1 or `outputs_of` of the block's sums.
inline CornerBlock corner_block_for(int rows, int columns, int64_t outputs) {
  switch (columns) {
    case 1: return corner_block_rows<1>(rows, outputs);
    case 2: return corner_block_rows<2>(rows, outputs);
    case 3: return corner_block_rows<3>(rows, outputs);
    default: return corner_block_rows<4>(rows, outputs);
  }
}

}  // namespace clicktrain::CLICKTRAIN_ISA
