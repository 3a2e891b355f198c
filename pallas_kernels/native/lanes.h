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
    const int64_t chunk = std::min(q_.groups, std::max<int64_t>(kLaneCache / group_bytes, rows < 4 ? 4 / rows : 1));
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
  // Products of a block's sums in one part: fewer where there is one block of few positions.
  static constexpr int64_t kFewProducts = 512, kFewest = 256;
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
          kind.place[tap] = reads ? static_cast<int32_t>(offset) : -1;
        }
        // Each channel as the first one, a stride further.
        for (int64_t i = 1; i < p_.inputs; ++i)
          for (int64_t tap = 0; tap < w_.taps(); ++tap)
            kind.place[i * w_.taps() + tap] = kind.place[tap] < 0 ? -1 : static_cast<int32_t>(kind.place[tap] + i * stride);
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
    // Outputs of one task: whole vectors, whose sums stay in the second cache.
    const int64_t sums_of = count * q_.positions() * kLanes;
    int64_t width = std::clamp<int64_t>(kLaneCache / 2 / (4 * sums_of) / kLanes * kLanes, kLanes, 4 * kLanes);
    // A vector more between outputs: at a power of two apart, their sums would share a few places of a cache.
    const int64_t positions = sums_of + kLanes;
    if (pool.threads() > 1) width = std::min(width, round_up(div_up(p_.outputs, 3 * pool.threads()), kLanes));
    parallel(pool, div_up(p_.outputs, width), [&](int64_t task) {
      Scratch sums(4 * width * positions);
      const int64_t first = task * width, last = std::min(p_.outputs, first + width);
      multiply(found, first, last, lanes.as<float>(), count, sums.as<float>(), positions);
      from_lanes(first, last, sums.as<float>(), positions, begin, count, y);
    });
  }

  // Blocks of channels, one after the other.
  struct Blocks {
    int64_t count, inputs, taps;
    // All codes of this block, and of those before it, are below this.
    int32_t end(int64_t block) const { return static_cast<int32_t>(inputs * (block + 1) / count * taps); }
  };

  // Sums of outputs [first, last). A block of positions of all outputs after the other, and of so many channels that
  // what it reads of them stays in the first cache.
  void multiply(const std::vector<Kind>& kinds, int64_t first, int64_t last, const float* x, int64_t count, float* sums,
                int64_t positions) const {
    const bool plain = kinds.size() == 1 && p_.rows.step == 1 && p_.columns.step == 1;
    for (const Kind& kind : kinds) {
      const int64_t rows = std::min<int64_t>(kind.rows, 4) * p_.rows.step + p_.rows.taps - 1;
      const int64_t columns = std::min<int64_t>(kind.columns, 4) * p_.columns.step + p_.columns.taps - 1;
      // A part's sums are read and written: that wants some products of each.
      const int64_t products = kind.rows * kind.columns > 4 ? kFewProducts : kFewest;
      const int64_t sums_of = std::min<int64_t>(kind.rows, 4) * std::min<int64_t>(kind.columns, 4);
      const int64_t few = div_up(products * p_.inputs * p_.outputs, sums_of * std::max<int64_t>(1, w_.weights));
      const int64_t most = std::max(kNearCache / (4 * kLanes * rows * columns), few), blocks = div_up(p_.inputs, most);
      const Blocks parts{blocks, p_.inputs, w_.taps()};
      std::vector<Rest> corners, singles;
      std::vector<std::vector<int32_t>> codes(kind.all ? 0 : last - first);
      std::vector<std::vector<float>> values(codes.size());
      bool has_corners = false, has_singles = !kind.all;
      for (int64_t output = first; output < last; ++output) {
        const LaneWeights::List list = w_.list_of(output);
        if (kind.all) {
          corners.push_back({list.corners, list.corner_values, list.corner_count});
          singles.push_back({list.singles, list.single_values, list.single_count});
          has_corners = has_corners || list.corner_count > 0;
          has_singles = has_singles || list.single_count > 0;
        } else {
          std::vector<int32_t>& of = codes[output - first];
          std::vector<float>& its = values[output - first];
          take_apart(kind, list, of, its);
          singles.push_back({of.data(), its.data(), static_cast<int64_t>(of.size())});
        }
      }
      std::vector<int64_t> at, to;
      for (int64_t g = 0; g < count; ++g)
        for (int64_t r = 0; r < kind.rows; ++r) {
          at.push_back(g * q_.plane() + r * p_.rows.step * q_.in_wide * kLanes);
          to.push_back((g * q_.positions() + (kind.first_row + r * p_.rows.spread) * q_.wide + kind.first_column) * kLanes);
        }
      if (has_corners && plain)
        run_corners(kind, corners, parts, count, x, sums, positions);
      else if (has_corners)
        run_apart<4>(kind, corners, parts, at, to, x, sums, positions, true);
      if (has_singles || !has_corners) run_apart<1>(kind, singles, parts, at, to, x, sums, positions, !has_corners);
    }
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

  // Fetches the beginning of a list that is needed so many outputs later: lists lie apart, so that no processor foresees
  // them.
  static constexpr size_t kAhead = 2;
  template <int Taps>
  static void fetch(const std::vector<Rest>& lists, size_t output) {
    if (output >= lists.size()) return;
    const Rest& list = lists[output];
    __builtin_prefetch(list.codes);
    for (int line = 0; line < std::min(Taps, 3); ++line) __builtin_prefetch(list.weights + 16 * line);
  }

  void run_corners(const Kind& kind, const std::vector<Rest>& lists, const Blocks& blocks, int64_t count, const float* x,
                   float* sums, int64_t positions) const {
    // A corner begins at its first tap, or at its last where taps count backwards.
    const int32_t* place = kind.place.data() + (w_.turned ? w_.kw + 1 : 0);
    const int64_t pitch = q_.in_wide * kLanes, out_pitch = q_.wide * kLanes;
    const int64_t columns = div_up(q_.wide, div_up(q_.wide, kCornerColumns));
    for (int64_t g = 0; g < count; ++g)
      for (int64_t c = 0; c < q_.wide; c += columns) {
        const int n = static_cast<int>(std::min(columns, q_.wide - c));
        const int64_t turns = div_up(q_.high, std::min(4, kCornerSums / n)), rows = div_up(q_.high, turns);
        for (int64_t r = 0; r < q_.high; r += rows) {
          const int m = static_cast<int>(std::min(rows, q_.high - r));
          const size_t together = outputs_of(m * n);
          const CornerBlock alone = corner_block_for(m, n, 1), run = corner_block_for(m, n, together);
          const float* from = x + g * q_.plane() + r * pitch + c * kLanes;
          float* to = sums + g * q_.positions() * kLanes + r * out_pitch + c * kLanes;
          std::vector<Rest> rests = lists;
          for (int64_t block = 0; block < blocks.count; ++block) {
            const int32_t end = blocks.end(block);
            for (size_t output = 0; output < rests.size();) {
              const bool is_whole = output + together <= rests.size();
              for (size_t k = 0; k < together; ++k) fetch<4>(rests, output + kAhead * together + k);
              if (block == 0 || rests[output].has_below(end) || (is_whole && rests[output + together - 1].has_below(end)))
                (is_whole ? run : alone)(from, pitch, &rests[output], end, place, to + output * positions, out_pitch,
                                         positions, block == 0);
              output += is_whole ? together : 1;
            }
          }
        }
      }
  }

  // Entries of so many taps, each of which has a place of its own.
  template <int Taps>
  void run_apart(const Kind& kind, const std::vector<Rest>& lists, const Blocks& blocks, const std::vector<int64_t>& at,
                 const std::vector<int64_t>& to, const float* x, float* sums, int64_t positions, bool begins) const {
    const int64_t columns = div_up(kind.columns, div_up(kind.columns, kMostColumns));
    const int64_t step = p_.columns.step, out_step = p_.columns.spread * kLanes, all = static_cast<int64_t>(at.size());
    int32_t steps[4] = {0, 0, 0, 0};
    for (int j = 0; j < Taps && Taps > 1; ++j) steps[j] = corner_step(w_.turned ? 3 - j : j);
    for (int64_t c = 0; c < kind.columns; c += columns) {
      const int n = static_cast<int>(std::min(columns, kind.columns - c));
      const int64_t rows = div_up(all, div_up(all, std::min(kMostRows, kMostSums / n)));
      for (int64_t r = 0; r < all; r += rows) {
        const int m = static_cast<int>(std::min(rows, all - r));
        const int most = step <= 2 ? n : 1;
        const auto run = step == 2 ? lane_block_for<Taps, 2>(m, n) : lane_block_for<Taps, 1>(m, most);
        std::vector<Rest> rests = lists;
        for (int64_t block = 0; block < blocks.count; ++block) {
          const int32_t end = blocks.end(block);
          const bool is_first = begins && block == 0;
          for (size_t output = 0; output < rests.size(); ++output) {
            fetch<Taps>(rests, output + kAhead);
            if (!is_first && !rests[output].has_below(end)) continue;
            int64_t taken = 0;
            for (int64_t one = c; one < c + n; one += most)
              taken = run(x + one * step * kLanes, at.data() + r, rests[output], end, kind.place.data(), steps,
                          sums + output * positions + one * out_step, to.data() + r, out_step, is_first);
            rests[output].skip(taken, Taps);
          }
        }
      }
    }
  }

  // What becomes of sums of one pixel, outputs side by side from one on: a copy that a loop need not read again.
  struct Finish {
    Vec<kLanes> scale, bias;
    bool scales, biases, relu;
    Finish(const Epilogue& epilogue, int64_t output)
        : scale{}, bias{}, scales(epilogue.scale), biases(epilogue.bias), relu(epilogue.relu) {
      if (scales) scale = load<kLanes>(epilogue.scale + output);
      if (biases) bias = load<kLanes>(epilogue.bias + output);
    }
    // `added`: where what is added to them lies, or null.
    inline __attribute__((always_inline)) Vec<kLanes> operator()(Vec<kLanes> sums, const float* added) const {
      if (scales) sums *= scale;
      if (biases) sums += bias;
      if (added) sums += load<kLanes>(added);
      return relu ? rectified<kLanes>(sums) : sums;
    }
  };

  void from_lanes(int64_t first, int64_t last, const float* sums, int64_t positions, int64_t begin, int64_t count, float* y) const {
    const float* added = epilogue_.added;
    for (int64_t g = 0; g < count; ++g) {
      const std::vector<float*> at = places_of_lanes(q_, p_.batch, begin + g, y, p_.outputs, p_.rows.out, p_.columns.out, 0,
                                                     0, q_.high, q_.wide, q_.high, q_.wide);
      const float* from = sums + g * q_.positions() * kLanes;
      const int64_t all = q_.positions();
      int64_t output = first;
      for (; output + kLanes <= last; output += kLanes, from += kLanes * positions) {
        const Finish finish(epilogue_, output);
        for (int64_t i = 0; i < all; ++i) {
          float* const* to = at.data() + i * kLanes;
          Vec<kLanes> v[kLanes];
#pragma GCC unroll 16
          for (int k = 0; k < kLanes; ++k) v[k] = load<kLanes>(from + i * kLanes + k * positions);
          transpose<kLanes>(v);
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes; ++lane)
            if (to[lane]) store<kLanes>(to[lane] + output, finish(v[lane], added ? added + (to[lane] - y) + output : nullptr));
        }
      }
      for (; output < last; ++output, from += positions)
        for (int64_t i = 0; i < all * kLanes; ++i)
          if (at[i]) at[i][output] = clicktrain::CLICKTRAIN_ISA::finished(epilogue_, from[i], output, added ? at[i] - y + output : 0);
    }
  }

  const Product& p_;
  const LaneWeights& w_;
  const float* x_;
  const Epilogue& epilogue_;
  const Pieces q_;
};

}  // namespace clicktrain::CLICKTRAIN_ISA
