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

// The lanes of one position: a pixel each, or none.
template <class Use>
inline void each_lane(const Pieces& q, int64_t batch, int64_t group, const Use& use) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t image = group * q.images + lane / (q.rows * q.columns);
    use(lane, image < batch ? image : -1, lane / q.columns % q.rows, lane % q.columns);
  }
}

// Images (pixels, channels) -> lanes (channel, group, row, column, lane) for channels [first, end) of groups
// [group, group + count); what lies outside of the images is zero.
inline void to_lanes(const Pieces& q, const Axis& rows, const Axis& columns, int64_t batch, const float* x,
                     int64_t channels, int64_t first, int64_t end, int64_t group, int64_t count, float* lanes) {
  alignas(64) static const float zeros[kLanes] = {};
  const int64_t plane = q.plane(), stride = count * plane;
  for (int64_t g = 0; g < count; ++g)
    for (int64_t r = 0; r < q.in_high; ++r)
      for (int64_t c = 0; c < q.in_wide; ++c) {
        const float* at[kLanes];
        bool any = false;
        each_lane(q, batch, group + g, [&](int lane, int64_t image, int64_t row, int64_t column) {
          const int64_t h = row * (q.high * rows.step / rows.spread) + q.low_row + r;
          const int64_t w = column * (q.wide * columns.step / columns.spread) + q.low_column + c;
          const bool inside = image >= 0 && h >= 0 && h < rows.in && w >= 0 && w < columns.in;
          at[lane] = inside ? x + ((image * rows.in + h) * columns.in + w) * channels : nullptr;
          any = any || inside;
        });
        float* to = lanes + g * plane + (r * q.in_wide + c) * kLanes;
        int64_t channel = first;
        for (; channel + kLanes <= end; channel += kLanes) {
          Vec<kLanes> v[kLanes];
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes; ++lane) v[lane] = load<kLanes>(at[lane] ? at[lane] + channel : zeros);
          transpose<kLanes>(v);
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) store<kLanes>(to + (channel - first + j) * stride, v[j]);
        }
        for (; channel < end; ++channel)
          for (int lane = 0; lane < kLanes; ++lane)
            to[(channel - first) * stride + lane] = at[lane] ? at[lane][channel] : 0.0f;
        (void)any;
      }
}

}  // namespace clicktrain::CLICKTRAIN_ISA
