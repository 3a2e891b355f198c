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
  static constexpr int64_t kNearCache = 24 * 1024;  // of the first cache, for what a block of positions reads
  static constexpr int64_t kFewProducts = 512;      // of a block's sums in one part
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
      multiply(found, first, last, lanes.as<float>(), count, sums.as<float>(), positions);
      from_lanes(first, last, sums.as<float>(), positions, begin, count, y);
    });
  }

  // Lists of some outputs, and where each one's part of each block of channels begins: (output, block + 1).
  struct Parts {
    int64_t blocks;
    std::vector<const int32_t*> codes;
    std::vector<const float*> weights;
    std::vector<int64_t> begin;
    int64_t outputs() const { return static_cast<int64_t>(codes.size()); }
  };

  // Sums of outputs [first, last). A block of positions of all outputs after the other, and of so many channels that
  // what it reads of them stays in the first cache.
  void multiply(const std::vector<Kind>& kinds, int64_t first, int64_t last, const float* x, int64_t count, float* sums,
                int64_t positions) const {
    const bool plain = kinds.size() == 1 && p_.rows.step == 1 && p_.columns.step == 1;
    for (const Kind& kind : kinds) {
      const int64_t rows = std::min<int64_t>(kind.rows, 4) * p_.rows.step + p_.rows.taps - 1;
      const int64_t columns = std::min<int64_t>(kind.columns, 4) * p_.columns.step + p_.columns.taps - 1;
      // A part's sums are read and written: that wants some products of each, and more where nothing is read for a
      // second block of positions.
      const int64_t products = kind.rows * kind.columns > 16 ? kFewProducts : 4 * kFewProducts;
      const int64_t sums_of = std::min<int64_t>(kind.rows, 4) * std::min<int64_t>(kind.columns, 4);
      const int64_t few = div_up(products * p_.inputs * p_.outputs, sums_of * std::max<int64_t>(1, w_.weights));
      const int64_t most = std::max(kNearCache / (4 * kLanes * rows * columns), few), blocks = div_up(p_.inputs, most);
      Parts corners{blocks, {}, {}, {}}, singles{blocks, {}, {}, {}};
      std::vector<std::vector<int32_t>> codes(kind.all ? 0 : last - first);
      std::vector<std::vector<float>> values(codes.size());
      bool has_corners = false, has_singles = !kind.all;
      for (int64_t output = first; output < last; ++output) {
        const LaneWeights::List list = w_.list_of(output);
        if (kind.all) {
          add_list(list.corners, list.corner_count, list.corner_values, corners);
          add_list(list.singles, list.single_count, list.single_values, singles);
          has_corners = has_corners || list.corner_count > 0;
          has_singles = has_singles || list.single_count > 0;
        } else {
          std::vector<int32_t>& of = codes[output - first];
          take_apart(kind, list, of, values[output - first]);
          add_list(of.data(), static_cast<int64_t>(of.size()), values[output - first].data(), singles);
        }
      }
      std::vector<int64_t> at, to;
      for (int64_t g = 0; g < count; ++g)
        for (int64_t r = 0; r < kind.rows; ++r) {
          at.push_back(g * q_.plane() + r * p_.rows.step * q_.in_wide * kLanes);
          to.push_back((g * q_.positions() + (kind.first_row + r * p_.rows.spread) * q_.wide + kind.first_column) * kLanes);
        }
      if (has_corners && plain)
        run_corners(kind, corners, count, x, sums, positions);
      else if (has_corners)
        run_apart<4>(kind, corners, at, to, x, sums, positions, true);
      if (has_singles || !has_corners) run_apart<1>(kind, singles, at, to, x, sums, positions, !has_corners);
    }
  }

  void add_list(const int32_t* codes, int64_t count, const float* weights, Parts& parts) const {
    parts.codes.push_back(codes);
    parts.weights.push_back(weights);
    parts.begin.push_back(0);
    for (int64_t block = 1; block < parts.blocks; ++block)
      parts.begin.push_back(std::lower_bound(codes, codes + count, p_.inputs * block / parts.blocks * w_.taps()) - codes);
    parts.begin.push_back(count);
  }

  // A list by single taps, without those that read nothing here, in rising order of their channels.
  void take_apart(const Kind& kind, const LaneWeights::List& list, std::vector<int32_t>& codes,
                  std::vector<float>& values) const {
    const auto add = [&](int32_t code, float value) {
      if (kind.place[code] >= 0) codes.push_back(code), values.push_back(value);
    };
    int64_t single = 0;
    const auto add_singles = [&](int64_t end) {
      for (; single < list.single_count && list.singles[single] < end; ++single)
        add(list.singles[single], list.single_values[single]);
    };
    for (int64_t k = 0; k < list.corner_count; ++k) {
      add_singles(list.corners[k]);
      for (int j = 0; j < 4; ++j) add(list.corners[k] + corner_step(j), list.corner_values[4 * k + (w_.turned ? 3 - j : j)]);
    }
    add_singles(p_.inputs * w_.taps());
  }
  int32_t corner_step(int j) const { return static_cast<int32_t>(j / 2 * w_.kw + j % 2); }

  void run_corners(const Kind& kind, const Parts& lists, int64_t count, const float* x, float* sums, int64_t positions) const {
    // A corner begins at its first tap, or at its last where taps count backwards.
    const int32_t* place = kind.place.data() + (w_.turned ? w_.kw + 1 : 0);
    const int64_t pitch = q_.in_wide * kLanes, out_pitch = q_.wide * kLanes, outputs = lists.outputs();
    const int64_t columns = div_up(q_.wide, div_up(q_.wide, kCornerColumns));
    for (int64_t g = 0; g < count; ++g)
      for (int64_t c = 0; c < q_.wide; c += columns) {
        const int n = static_cast<int>(std::min(columns, q_.wide - c));
        const int64_t turns = div_up(q_.high, std::min(4, kCornerSums / n)), rows = div_up(q_.high, turns);
        for (int64_t r = 0; r < q_.high; r += rows) {
          const CornerBlock run = corner_block_for(static_cast<int>(std::min(rows, q_.high - r)), n);
          const float* from = x + g * q_.plane() + r * pitch + c * kLanes;
          float* to = sums + g * q_.positions() * kLanes + r * out_pitch + c * kLanes;
          for (int64_t block = 0; block < lists.blocks; ++block)
            for (int64_t output = 0; output < outputs; ++output) {
              const int64_t* part = lists.begin.data() + output * (lists.blocks + 1) + block;
              const int64_t begin = part[0], length = part[1] - begin;
              if (length > 0 || block == 0)
                run(from, pitch, lists.codes[output] + begin, lists.weights[output] + 4 * begin, length, place,
                    to + output * positions, out_pitch, block == 0);
            }
        }
      }
  }

  // Entries of so many taps, each of which has a place of its own.
  template <int Taps>
  void run_apart(const Kind& kind, const Parts& lists, const std::vector<int64_t>& at, const std::vector<int64_t>& to,
                 const float* x, float* sums, int64_t positions, bool begins) const {
    const int64_t columns = div_up(kind.columns, div_up(kind.columns, kMostColumns)), outputs = lists.outputs();
    const int64_t step = p_.columns.step, out_step = p_.columns.spread * kLanes, all = static_cast<int64_t>(at.size());
    int32_t steps[4] = {0, 0, 0, 0};
    for (int j = 0; j < Taps && Taps > 1; ++j) steps[j] = corner_step(w_.turned ? 3 - j : j);
    for (int64_t c = 0; c < kind.columns; c += columns) {
      const int n = static_cast<int>(std::min(columns, kind.columns - c));
      const int64_t rows = div_up(all, div_up(all, std::min(kMostRows, kMostSums / n)));
      for (int64_t r = 0; r < all; r += rows) {
        const int m = static_cast<int>(std::min(rows, all - r));
        for (int64_t block = 0; block < lists.blocks; ++block)
          for (int64_t output = 0; output < outputs; ++output) {
            const int64_t* part = lists.begin.data() + output * (lists.blocks + 1) + block;
            const int64_t begin = part[0], length = part[1] - begin;
            const bool is_first = begins && block == 0;
            if (length == 0 && !is_first) continue;
            const int64_t most = step <= 2 ? n : 1;
            const auto run = step == 2 ? lane_block_for<Taps, 2>(m, n) : lane_block_for<Taps, 1>(m, static_cast<int>(most));
            for (int64_t one = c; one < c + n; one += most)
              run(x + one * step * kLanes, at.data() + r, lists.codes[output] + begin, lists.weights[output] + Taps * begin,
                  length, kind.place.data(), steps, sums + output * positions + one * out_step, to.data() + r, out_step, is_first);
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
