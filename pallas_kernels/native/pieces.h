// Images as lanes: the lanes of a vector are pieces of images, whole ones or parts of one in a grid.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "support.h"
#include "vector.h"

namespace clicktrain::CLICKTRAIN_ISA {

constexpr int64_t kLaneCache = 512 * 1024;  // of the second cache, for the images of a channel block

// How images become lanes.
struct Pieces {
  int64_t images, rows, columns;  // images x rows x columns pieces make one vector
  int64_t high, wide;             // output rows and columns of a piece
  int64_t groups;                 // vectors for the whole batch
  int64_t low_row, low_column;    // first input row of a piece, from where its outputs begin
  int64_t in_high, in_wide;       // input rows and columns of a piece, those around it included
  int64_t plane() const { return in_high * in_wide * kLanes; }    // numbers of a channel in a group
  int64_t positions() const { return high * wide; }
};

inline void extent(const Axis& axis, int64_t outputs, int64_t& low, int64_t& count) {
  const auto floor_div = [](int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); };
  const int64_t turn = (axis.taps - 1) * axis.turn;
  low = floor_div(axis.shift + std::min<int64_t>(turn, 0), axis.spread);
  const int64_t high = floor_div((outputs - 1) * axis.step + axis.shift + std::max<int64_t>(turn, 0), axis.spread);
  count = high - low + 1;
}

inline Pieces choose_pieces(const Product& p, int64_t entries) {
  Pieces best{};
  double least = 0;
  for (int64_t rows = 1; rows <= kLanes; rows *= 2)
    for (int64_t columns = 1; rows * columns <= kLanes; columns *= 2) {
      Pieces q{};
      q.rows = rows;
      q.columns = columns;
      q.images = kLanes / rows / columns;
      // Outputs that read alike must stand in the same lane position of every piece.
      q.high = round_up(div_up(p.rows.out, rows), p.rows.spread);
      q.wide = round_up(div_up(p.columns.out, columns), p.columns.spread);
      q.groups = div_up(p.batch, q.images);
      extent(p.rows, q.high, q.low_row, q.in_high);
      extent(p.columns, q.wide, q.low_column, q.in_wide);
      const double sums = static_cast<double>(q.groups * q.positions());
      const double width = static_cast<double>(std::min<int64_t>(q.positions() / (p.rows.spread * p.columns.spread), 16));
      // A list's entry costs a load and a broadcast, whatever the block's size.
      double cost = sums * entries * (1.0 + 2.5 / width);
      cost += 0.5 * kLanes * static_cast<double>(q.groups) * (q.in_high * q.in_wide * p.inputs + q.positions() * p.outputs);
      if (4 * q.plane() * p.inputs > kLaneCache) cost *= 1.1;
      if (4 * q.plane() * p.inputs > INT32_MAX) cost *= 1e6;  // places in few groups are counted in 32 bits
      if (least == 0 || cost < least) {
        least = cost;
        best = q;
      }
    }
  return best;
}

// Where the lanes of each position of a group lie: pointers into `images` (pixels, channels), null for what lies outside.
// Positions are rows x columns from (low_row, low_column) of each piece on, whose own begin row_step and column_step
// pixels apart.
template <class T>
std::vector<T*> places_of_lanes(const Pieces& q, int64_t batch, int64_t group, T* images, int64_t channels, int64_t rows,
                                int64_t columns, int64_t low_row, int64_t low_column, int64_t row_step,
                                int64_t column_step, int64_t positions_high, int64_t positions_wide) {
  std::vector<T*> at(positions_high * positions_wide * kLanes, nullptr);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t image = group * q.images + lane / (q.rows * q.columns);
    if (image >= batch) continue;
    const int64_t top = lane / q.columns % q.rows * row_step + low_row, left = lane % q.columns * column_step + low_column;
    for (int64_t r = std::max<int64_t>(0, -top); r < std::min(positions_high, rows - top); ++r)
      for (int64_t c = std::max<int64_t>(0, -left); c < std::min(positions_wide, columns - left); ++c)
        at[(r * positions_wide + c) * kLanes + lane] = images + ((image * rows + top + r) * columns + left + c) * channels;
  }
  return at;
}

// Images (pixels, channels) -> lanes (channel, group, row, column, lane) for channels [first, end) of groups
// [group, group + count); what lies outside of the images is zero.
inline void to_lanes(const Pieces& q, const Axis& rows, const Axis& columns, int64_t batch, const float* x,
                     int64_t channels, int64_t first, int64_t end, int64_t group, int64_t count, float* lanes) {
  alignas(64) static const float zeros[kLanes] = {};
  const int64_t plane = q.plane(), stride = count * plane, positions = q.in_high * q.in_wide;
  for (int64_t g = 0; g < count; ++g) {
    const std::vector<const float*> at = places_of_lanes(
        q, batch, group + g, x, channels, rows.in, columns.in, q.low_row, q.low_column, q.high * rows.step / rows.spread,
        q.wide * columns.step / columns.spread, q.in_high, q.in_wide);
    // Channels outside: each of a vector's planes is then written from its beginning to its end.
    int64_t channel = first;
    for (; channel + kLanes <= end; channel += kLanes) {
      float* to = lanes + (channel - first) * stride + g * plane;
      for (int64_t i = 0; i < positions; ++i, to += kLanes) {
        const float* const* from = at.data() + i * kLanes;
        Vec<kLanes> v[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) v[lane] = load<kLanes>(from[lane] ? from[lane] + channel : zeros);
        transpose<kLanes>(v);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store<kLanes>(to + j * stride, v[j]);
      }
    }
    for (; channel < end; ++channel) {
      float* to = lanes + (channel - first) * stride + g * plane;
      for (int64_t i = 0; i < positions * kLanes; ++i) to[i] = at[i] ? at[i][channel] : 0.0f;
    }
  }
}

}  // namespace clicktrain::CLICKTRAIN_ISA
