// The weight gradient for kernels that choose each for itself: a few entries of one filter stay in registers, a vector of
// partial sums each, while the positions go by; the lanes are added up at the end of each run of images.
#pragma once

#include "lane_weights.h"
#include "pieces.h"

namespace clicktrain::CLICKTRAIN_ISA {

// The sum of a vector's lanes: halves onto halves, the same tree for all.
inline float sum_of_lanes(Vec<kLanes> v) {
  alignas(64) float lanes[kLanes];
  store<kLanes>(lanes, v);
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Positions of a run of groups: rows by their places in a channel of images and in a filter of slopes.
struct Run {
  const int64_t* at;
  int64_t rows, columns, step, pitch;
};

// Single taps of one filter.
template <int Entries>
void lane_correlate(const float* x, const float* dy, const Run& run, const int32_t* codes, const int32_t* place, float* sums) {
  Vec<kLanes> sum[Entries] = {};
  int64_t offset[Entries];
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e) offset[e] = place[codes[e]];
  for (int64_t r = 0; r < run.rows; ++r) {
    const float* row = x + run.at[r];
    for (int64_t c = 0; c < run.columns; ++c, row += run.step, dy += kLanes) {
      const Vec<kLanes> d = load<kLanes>(dy);
#pragma GCC unroll 8
      for (int e = 0; e < Entries; ++e) sum[e] += d * load<kLanes>(row + offset[e]);
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e) sums[e] += sum_of_lanes(sum[e]);
}

// Corners of one filter, where positions lie side by side: what a column has read, the next one uses again.
template <int Entries>
void corner_correlate(const float* x, const float* dy, const Run& run, const int32_t* codes, const int32_t* place, float* sums) {
  Vec<kLanes> sum[Entries][4] = {};
  int64_t offset[Entries];
#pragma GCC unroll 4
  for (int e = 0; e < Entries; ++e) offset[e] = place[codes[e]];
  for (int64_t r = 0; r < run.rows; ++r) {
    const float* row = x + run.at[r];
    Vec<kLanes> above[Entries], below[Entries];
#pragma GCC unroll 4
    for (int e = 0; e < Entries; ++e) {
      above[e] = load<kLanes>(row + offset[e]);
      below[e] = load<kLanes>(row + offset[e] + run.pitch);
    }
    for (int64_t c = 0; c < run.columns; ++c, dy += kLanes) {
      row += kLanes;
      const Vec<kLanes> d = load<kLanes>(dy);
#pragma GCC unroll 4
      for (int e = 0; e < Entries; ++e) {
        sum[e][0] += d * above[e];
        sum[e][2] += d * below[e];
        above[e] = load<kLanes>(row + offset[e]);
        below[e] = load<kLanes>(row + offset[e] + run.pitch);
        sum[e][1] += d * above[e];
        sum[e][3] += d * below[e];
      }
    }
  }
#pragma GCC unroll 4
  for (int e = 0; e < Entries; ++e)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[4 * e + j] += sum_of_lanes(sum[e][j]);
}

inline void lane_weight_gradient(const Product& p, const Grouped& grouped, const float* x, const float* dy, float* dw,
                                 Pool& pool) {
  LaneWeights lists(grouped, grouped.counts().data());
  Scratch memory(lists.bytes());
  lists.place(memory.as<void>());
  parallel(pool, lists.groups, [&](int64_t group) { lists.fill_lists(grouped, group); });
  std::fill(lists.values, lists.values + lists.weights, 0.0f);
  const Pieces q = choose_pieces(p, std::max<int64_t>(1, lists.weights));
  // Adding up lanes costs as much as a few positions: some hundred positions at once, channels as fit the cache beside.
  const int64_t chunk = std::clamp<int64_t>(div_up(128, q.positions()), 1, q.groups);
  const int64_t taps = lists.taps();
  for (int64_t begin = 0; begin < q.groups; begin += chunk) {
    const int64_t count = std::min(chunk, q.groups - begin), stride = count * q.plane();
    const int64_t dy_stride = count * q.positions() * kLanes;
    Scratch x_lanes(4 * stride * p.inputs), dy_lanes(4 * dy_stride * p.outputs);
    const int64_t x_parts = div_up(p.inputs, 4 * kLanes), dy_parts = div_up(p.outputs, 4 * kLanes);
    // The output's slopes as images of their own: no tap, nothing around.
    Pieces of_dy = q;
    of_dy.low_row = of_dy.low_column = 0;
    of_dy.in_high = q.high;
    of_dy.in_wide = q.wide;
    const Axis rows{p.rows.out, p.rows.out, 1, 1, 1, 0, 1}, columns{p.columns.out, p.columns.out, 1, 1, 1, 0, 1};
    parallel(pool, x_parts + dy_parts, [&](int64_t part) {
      if (part < x_parts) {
        const int64_t first = part * 4 * kLanes;
        to_lanes(q, p.rows, p.columns, p.batch, x, p.inputs, first, std::min(p.inputs, first + 4 * kLanes), begin, count,
                 x_lanes.as<float>() + first * stride);
      } else {
        const int64_t first = (part - x_parts) * 4 * kLanes;
        to_lanes(of_dy, rows, columns, p.batch, dy, p.outputs, first, std::min(p.outputs, first + 4 * kLanes), begin, count,
                 dy_lanes.as<float>() + first * dy_stride);
      }
    });
    std::vector<int32_t> place(p.inputs * taps);
    for (int64_t i = 0; i < p.inputs; ++i)
      for (int64_t tap = 0; tap < taps; ++tap)
        place[i * taps + tap] = static_cast<int32_t>(i * stride + (tap / p.columns.taps * q.in_wide + tap % p.columns.taps) * kLanes);
    std::vector<int64_t> at;
    for (int64_t g = 0; g < count; ++g)
      for (int64_t r = 0; r < q.high; ++r) at.push_back(g * q.plane() + r * p.rows.step * q.in_wide * kLanes);
    const Run run{at.data(), static_cast<int64_t>(at.size()), q.wide, p.columns.step * kLanes, q.in_wide * kLanes};
    const bool plain = p.columns.step == 1;
    const int64_t channels = std::max<int64_t>(1, kLaneCache / (4 * stride));
    const int64_t width = std::max<int64_t>(1, div_up(p.outputs, 4 * pool.threads()));
    parallel(pool, div_up(p.outputs, width), [&](int64_t task) {
      for (int64_t from = 0; from < p.inputs; from += channels) {
        const int32_t limit = static_cast<int32_t>(std::min(p.inputs, from + channels) * taps);
        for (int64_t output = task * width; output < std::min(p.outputs, (task + 1) * width); ++output) {
          const LaneWeights::List list = lists.list_of(output);
          const float* slopes = dy_lanes.as<float>() + output * dy_stride;
          float* sums = lists.values + lists.panels[output].begin;
          const int32_t low = static_cast<int32_t>(from * taps);
          Part part = part_of(list.corners, list.corner_count, low, limit);
          const auto corners = [&](auto correlate, int n) {
            correlate(x_lanes.as<float>(), slopes, run, list.corners + part.begin, place.data(), sums + 4 * part.begin);
            part.begin += n;
            part.count -= n;
          };
          const auto corner_taps = [&] {  // as single taps, where positions lie apart
            const int32_t first = list.corners[part.begin], wide = static_cast<int32_t>(lists.kw);
            const int32_t four[4] = {first, first + 1, first + wide, first + wide + 1};
            lane_correlate<4>(x_lanes.as<float>(), slopes, run, four, place.data(), sums + 4 * part.begin);
            ++part.begin;
            --part.count;
          };
          while (part.count > 0) {
            if (!plain) corner_taps();
            else if (part.count >= 2) corners(corner_correlate<2>, 2);
            else corners(corner_correlate<1>, 1);
          }
          sums += 4 * list.corner_count;
          part = part_of(list.singles, list.single_count, low, limit);
          const auto singles = [&](auto correlate, int n) {
            correlate(x_lanes.as<float>(), slopes, run, list.singles + part.begin, place.data(), sums + part.begin);
            part.begin += n;
            part.count -= n;
          };
          while (part.count > 0) {
            if (part.count >= 8) singles(lane_correlate<8>, 8);
            else if (part.count >= 4) singles(lane_correlate<4>, 4);
            else if (part.count >= 2) singles(lane_correlate<2>, 2);
            else singles(lane_correlate<1>, 1);
          }
        }
      }
    });
  }
  const WeightPlace place{p.inputs * p.outputs, p.outputs, 1, p.inputs};
  parallel(pool, lists.tasks(), [&](int64_t task) { lists.spread_task(dw, place, task); });
}

}  // namespace clicktrain::CLICKTRAIN_ISA
