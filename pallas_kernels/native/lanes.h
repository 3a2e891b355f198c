// Pixels side by side in vectors, for kernels that choose each for itself.
//
// The lanes of a vector are pieces of images: whole images, or one image cut into a grid. Every piece carries the rows
// and columns around it that its taps read, so that a tap is a whole number of vectors away, whatever the image's size:
// no load is unaligned, none is shuffled. A filter is a list of (place, weight); a block of positions stays in
// registers, and each entry of the list is multiplied by what lies at its place from every position of the block.
#pragma once

#include <algorithm>
#include <vector>

#include "lane_blocks.h"
#include "lane_weights.h"
#include "pieces.h"

namespace clicktrain::CLICKTRAIN_ISA {

class LaneProduct {
 public:
  LaneProduct(const Product& product, const LaneWeights& weights, const float* x, const Epilogue& epilogue)
      : p_(product), w_(weights), x_(x), epilogue_(epilogue),
        q_(choose_pieces(product, std::max<int64_t>(1, weights.weights))) {}

  void run(float* y, Pool& pool) {
    const int64_t channel_bytes = 4 * q_.plane(), group_bytes = channel_bytes * p_.inputs;
    // Few rows make short blocks: then several groups are taken together.
    const int64_t rows = std::max<int64_t>(1, q_.high / p_.rows.spread);
    int64_t chunk = std::clamp<int64_t>(kLaneCache / group_bytes, rows < 4 ? 4 / rows : 1, q_.groups);
    chunk = std::min(chunk, q_.groups);
    const int64_t chunks = div_up(q_.groups, chunk);
    const int64_t wide = pool.threads() > 1 ? 2 * pool.threads() : 1;
    if (chunks >= wide) {
      parallel(pool, chunks, [&](int64_t c) {
        OneTask alone;
        run_chunk(q_.groups * c / chunks, q_.groups * (c + 1) / chunks, y, alone);
      });
    } else {
      for (int64_t c = 0; c < chunks; ++c) run_chunk(q_.groups * c / chunks, q_.groups * (c + 1) / chunks, y, pool);
    }
  }

 private:
  class OneTask : public Pool {
   public:
    int64_t threads() const override { return 1; }
    void run(int64_t count, void (*task)(void*, int64_t), void* context) override {
      for (int64_t i = 0; i < count; ++i) task(context, i);
    }
  };
  // Outputs that have the same taps: every `spread`-th row and column from one on.
  struct Kind {
    std::vector<int32_t> place;           // of each code: where it reads from a position; -1 for nothing
    bool all;                             // whether every tap reads
    int64_t first_row, rows, first_column, columns;
  };

  std::vector<Kind> kinds(int64_t stride) const {
    std::vector<Kind> found;
    for (int64_t r = 0; r < p_.rows.spread; ++r)
      for (int64_t c = 0; c < p_.columns.spread; ++c) {
        Kind kind{std::vector<int32_t>(p_.inputs * w_.taps()), true, r, q_.high / p_.rows.spread, c, q_.wide / p_.columns.spread};
        for (int64_t tap = 0; tap < w_.taps(); ++tap) {
          const int64_t row = r * p_.rows.step + tap / p_.columns.taps * p_.rows.turn + p_.rows.shift;
          const int64_t column = c * p_.columns.step + tap % p_.columns.taps * p_.columns.turn + p_.columns.shift;
          const bool reads = row % p_.rows.spread == 0 && column % p_.columns.spread == 0;
          kind.all = kind.all && reads;
          const int64_t offset = ((row / p_.rows.spread - q_.low_row) * q_.in_wide + column / p_.columns.spread - q_.low_column) * kLanes;
          for (int64_t i = 0; i < p_.inputs; ++i)
            kind.place[i * w_.taps() + tap] = reads ? static_cast<int32_t>(i * stride + offset) : -1;
        }
        found.push_back(std::move(kind));
      }
    return found;
  }

  void run_chunk(int64_t begin, int64_t end, float* y, Pool& pool) const {
    const int64_t count = end - begin, stride = count * q_.plane();
    Scratch lanes(4 * stride * p_.inputs);
    const int64_t run = round_up(std::max<int64_t>(kLanes, div_up(p_.inputs, 4 * pool.threads())), kLanes);
    parallel(pool, pool.threads() > 1 ? div_up(p_.inputs, run) : 1, [&](int64_t part) {
      const int64_t first = pool.threads() > 1 ? part * run : 0;
      const int64_t last = pool.threads() > 1 ? std::min(p_.inputs, first + run) : p_.inputs;
      to_lanes(q_, p_.rows, p_.columns, p_.batch, x_, p_.inputs, first, last, begin, count, lanes.as<float>() + first * stride);
    });
    const std::vector<Kind> found = kinds(stride);
    const int64_t positions = count * q_.positions() * kLanes;
    // Outputs of one task: whole vectors, whose sums stay in the second cache.
    int64_t width = std::clamp<int64_t>(kLaneCache / 2 / (4 * positions) / kLanes * kLanes, kLanes, 4 * kLanes);
    if (pool.threads() > 1) width = std::min(width, round_up(div_up(p_.outputs, 3 * pool.threads()), kLanes));
    parallel(pool, div_up(p_.outputs, width), [&](int64_t task) {
      Scratch sums(4 * width * positions);
      const int64_t first = task * width, last = std::min(p_.outputs, first + width);
      multiply(found, first, last, lanes.as<float>(), stride, count, sums.as<float>(), positions);
      from_lanes(first, last, sums.as<float>(), positions, begin, count, y);
    });
  }

  // What a block of positions reads, and where its sums go.
  struct Target {
    const float* x;
    float* sums;
    bool begins;
  };

  void multiply(const std::vector<Kind>& kinds, int64_t first, int64_t last, const float* x, int64_t stride, int64_t count,
                float* sums, int64_t positions) const {
    const int64_t channels = std::max<int64_t>(1, kLaneCache / (4 * stride));
    const bool plain = kinds.size() == 1 && p_.rows.step == 1 && p_.columns.step == 1;
    std::vector<int32_t> codes;
    std::vector<float> values;
    for (const Kind& kind : kinds) {
      std::vector<int64_t> at, to;
      for (int64_t g = 0; g < count; ++g)
        for (int64_t r = 0; r < kind.rows; ++r) {
          at.push_back(g * q_.plane() + r * p_.rows.step * q_.in_wide * kLanes);
          to.push_back((g * q_.positions() + (kind.first_row + r * p_.rows.spread) * q_.wide + kind.first_column) * kLanes);
        }
      for (int64_t from = 0; from < p_.inputs; from += channels) {
        const int32_t low = static_cast<int32_t>(from * w_.taps());
        const int32_t high = static_cast<int32_t>(std::min(p_.inputs, from + channels) * w_.taps());
        for (int64_t output = first; output < last; ++output) {
          const LaneWeights::List list = w_.list_of(output);
          const Part corners = part_of(list.corners, list.corner_count, low, high);
          const Part singles = part_of(list.singles, list.single_count, low, high);
          Target target{x, sums + (output - first) * positions, from == 0};
          if (plain) {
            if (corners.count > 0) {
              run_corners(kind, list.corners + corners.begin, list.corner_values + 4 * corners.begin, corners.count, count, target);
              target.begins = false;
            }
            if (singles.count > 0 || target.begins)
              run_singles(kind, at, to, list.singles + singles.begin, list.single_values + singles.begin, singles.count, target);
            continue;
          }
          // Corners are taken apart, and what reads nothing here is left out.
          codes.clear();
          values.clear();
          const int32_t steps[4] = {0, 1, static_cast<int32_t>(w_.kw), static_cast<int32_t>(w_.kw + 1)};
          for (int64_t k = corners.begin; k < corners.begin + corners.count; ++k)
            for (int j = 0; j < 4; ++j)
              if (kind.place[list.corners[k] + steps[j]] >= 0) {
                codes.push_back(list.corners[k] + steps[j]);
                values.push_back(list.corner_values[4 * k + (w_.turned ? 3 - j : j)]);
              }
          for (int64_t k = singles.begin; k < singles.begin + singles.count; ++k)
            if (kind.place[list.singles[k]] >= 0) {
              codes.push_back(list.singles[k]);
              values.push_back(list.single_values[k]);
            }
          run_singles(kind, at, to, codes.data(), values.data(), static_cast<int64_t>(codes.size()), target);
        }
      }
    }
  }

  void run_corners(const Kind& kind, const int32_t* codes, const float* weights, int64_t length, int64_t count,
                   const Target& target) const {
    // A corner begins at its first tap, or at its last where taps count backwards.
    const int32_t* place = kind.place.data() + (w_.turned ? w_.kw + 1 : 0);
    const int64_t pitch = q_.in_wide * kLanes, out_pitch = q_.wide * kLanes;
    const int64_t columns = div_up(q_.wide, div_up(q_.wide, kCornerColumns));
    for (int64_t c = 0; c < q_.wide; c += columns) {
      const int n = static_cast<int>(std::min(columns, q_.wide - c));
      const int64_t turns = div_up(q_.high, std::min(4, kCornerSums / n)), rows = div_up(q_.high, turns);
      for (int64_t g = 0; g < count; ++g)
        for (int64_t r = 0; r < q_.high; r += rows) {
          const int m = static_cast<int>(std::min(rows, q_.high - r));
          corner_block_for(m, n)(target.x + g * q_.plane() + r * pitch + c * kLanes, pitch, codes, weights, length, place,
                                 target.sums + g * q_.positions() * kLanes + r * out_pitch + c * kLanes, out_pitch,
                                 target.begins);
        }
    }
  }

  void run_singles(const Kind& kind, const std::vector<int64_t>& at, const std::vector<int64_t>& to, const int32_t* codes,
                   const float* weights, int64_t length, const Target& target) const {
    if (length == 0 && !target.begins) return;
    const int64_t columns = div_up(kind.columns, div_up(kind.columns, kMostColumns));
    const int64_t step = p_.columns.step, out_step = p_.columns.spread * kLanes, all = static_cast<int64_t>(at.size());
    for (int64_t c = 0; c < kind.columns; c += columns) {
      const int n = static_cast<int>(std::min(columns, kind.columns - c));
      const int64_t rows = div_up(all, div_up(all, std::min(kMostRows, kMostSums / n)));
      for (int64_t r = 0; r < all; r += rows) {
        const int m = static_cast<int>(std::min(rows, all - r));
        if (step <= 2) {
          (step == 1 ? lane_block_for<1>(m, n) : lane_block_for<2>(m, n))(
              target.x + c * step * kLanes, at.data() + r, codes, weights, length, kind.place.data(),
              target.sums + c * out_step, to.data() + r, out_step, target.begins);
        } else {
          for (int one = 0; one < n; ++one)
            lane_block_for<1>(m, 1)(target.x + (c + one) * step * kLanes, at.data() + r, codes, weights, length,
                                    kind.place.data(), target.sums + (c + one) * out_step, to.data() + r, out_step,
                                    target.begins);
        }
      }
    }
  }

  void from_lanes(int64_t first, int64_t last, float* sums, int64_t positions, int64_t begin, int64_t count, float* y) const {
    for (int64_t output = first; output < last; ++output) {
      float* at = sums + (output - first) * positions;
      const bool scales = epilogue_.scale != nullptr, shifts = epilogue_.bias != nullptr;
      if (!scales && !shifts && !epilogue_.relu) break;
      const float scale = scales ? epilogue_.scale[output] : 1.0f, bias = shifts ? epilogue_.bias[output] : 0.0f;
      for (int64_t i = 0; i < positions; ++i) {
        float value = at[i];
        if (scales) value *= scale;
        if (shifts) value += bias;
        at[i] = epilogue_.relu && value < 0.0f ? 0.0f : value;
      }
    }
    for (int64_t g = 0; g < count; ++g) {
      const std::vector<float*> at = places_of_lanes(q_, p_.batch, begin + g, y, p_.outputs, p_.rows.out, p_.columns.out, 0,
                                                     0, q_.high, q_.wide, q_.high, q_.wide);
      const float* from = sums + g * q_.positions() * kLanes;
      int64_t output = first;
      for (; output + kLanes <= last; output += kLanes, from += kLanes * positions)
        for (int64_t i = 0; i < q_.positions(); ++i) {
          float* const* to = at.data() + i * kLanes;
          Vec<kLanes> v[kLanes];
#pragma GCC unroll 16
          for (int k = 0; k < kLanes; ++k) v[k] = load<kLanes>(from + i * kLanes + k * positions);
          transpose<kLanes>(v);
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes; ++lane)
            if (to[lane]) store<kLanes>(to[lane] + output, v[lane]);
        }
      for (; output < last; ++output, from += positions)
        for (int64_t i = 0; i < q_.positions() * kLanes; ++i)
          if (at[i]) at[i][output] = from[i];
    }
  }

  const Product& p_;
  const LaneWeights& w_;
  const float* x_;
  const Epilogue& epilogue_;
  const Pieces q_;
};

}  // namespace clicktrain::CLICKTRAIN_ISA
