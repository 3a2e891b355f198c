// Pixels side by side in vectors, for kernels that choose each for itself.
//
// The lanes of a vector are pieces of images: whole images, or one image cut into a grid. Every piece carries the rows
// and columns around it that its taps read, so that a tap is a whole number of vectors away, whatever the image's size:
// no load is unaligned, none is shuffled. A filter is a list of (place, weight); a block of positions stays in
// registers, and each entry of the list is multiplied by what lies at its place from every position of the block.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "support.h"
#include "vector.h"

namespace clicktrain::CLICKTRAIN_ISA {

constexpr int64_t kLaneCache = 512 * 1024;
constexpr int kMostSums = CLICKTRAIN_LANES == 8 ? 12 : 16;  // of a block: what the registers hold
constexpr int kMostRows = 8, kMostColumns = 8;

// Lists by output and weights beside them. A kernel that keeps one 2x2 corner is one entry with four weights: its rows
// are read once. Whatever else a kernel keeps stands in a list of single taps.
struct LaneWeights {
  struct One {
    int64_t group, begin;  // `begin`: of the output's weights
  };
  std::vector<One> panels;                            // one an output
  std::vector<int64_t> list_begin;                    // of each group
  int64_t groups, width, outputs, kh, kw, entries = 0, weights = 0;
  bool turned;
  int32_t* corner_count = nullptr;  // (groups,)
  int32_t* codes = nullptr;         // of each group: corners by their first tap, then single taps; input * taps + tap
  float* values = nullptr;

  // `counts`: retained (tap, input) of each group.
  LaneWeights(const Grouped& grouped, const int64_t* counts)
      : groups(grouped.groups()), width(grouped.width), outputs(grouped.outputs), kh(grouped.kh), kw(grouped.kw),
        turned(grouped.turned) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t n = counts[g];
      list_begin.push_back(entries);
      entries += n;
      for (int64_t o = g * width, end = std::min(outputs, o + width); o < end; ++o) {
        panels.push_back({g, weights});
        weights += n;
      }
    }
    list_begin.push_back(entries);
  }
  int64_t taps() const { return kh * kw; }
  int64_t bytes() const { return round_up(4 * groups, 64) + round_up(4 * entries, 64) + round_up(4 * weights, 64); }
  void place(void* memory) {
    char* at = static_cast<char*>(memory);
    corner_count = reinterpret_cast<int32_t*>(at);
    at += round_up(4 * groups, 64);
    codes = reinterpret_cast<int32_t*>(at);
    at += round_up(4 * entries, 64);
    values = reinterpret_cast<float*>(at);
  }
  struct List {
    const int32_t *corners, *singles;
    int64_t corner_count, single_count;
    const float *corner_values, *single_values;
  };
  List list_of(int64_t output) const {
    const One& one = panels[output];
    const int32_t* list = codes + list_begin[one.group];
    const int64_t corners = corner_count[one.group], all = list_begin[one.group + 1] - list_begin[one.group];
    const float* at = values + one.begin;
    return {list, list + corners, corners, all - 4 * corners, at, at + 4 * corners};
  }

  // Codes behind a group's corners and single taps are not used.
  void fill_lists(const Grouped& grouped, int64_t group) {
    int32_t* to = codes + list_begin[group];
    std::vector<int32_t> singles;
    int32_t corners = 0;
    grouped.each_block(group, [&](int64_t first, int64_t last, const int32_t* block_taps, int64_t count) {
      const int64_t tap = block_taps[0];
      const bool corner = count == 4 && tap % kw + 1 < kw && block_taps[1] == tap + 1 && block_taps[2] == tap + kw &&
                          block_taps[3] == tap + kw + 1;
      for (int64_t input = first; input < last; ++input) {
        const int32_t code = static_cast<int32_t>(input * taps());
        if (corner) {
          to[corners++] = code + block_taps[0];
        } else {
          for (int64_t k = 0; k < count; ++k) singles.push_back(code + block_taps[k]);
        }
      }
    });
    std::copy(singles.begin(), singles.end(), to + corners);
    corner_count[group] = corners;
  }

  // Outputs of one task: a few cache lines of a kernel whose outputs lie side by side.
  static constexpr int64_t kTogether = 64;
  int64_t tasks() const { return div_up(outputs, kTogether); }

  template <class Weight>
  void fill_task(const Weight* w, const WeightPlace& place, int64_t task) {
    const int64_t first = task * kTogether, last = std::min(outputs, first + kTogether), inputs = place.inputs;
    if (place.output != 1) {
      std::vector<int32_t> at(inputs * taps());
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t tap = 0; tap < taps(); ++tap)
          at[i * taps() + tap] = static_cast<int32_t>(tap * place.tap + i * place.input);
      const int64_t corner[4] = {0, place.tap, kw * place.tap, (kw + 1) * place.tap};
      for (int64_t o = first; o < last; ++o) {
        const List list = list_of(o);
        const Weight* from = w + o * place.output;
        float* to = values + panels[o].begin;
        for (int64_t k = 0; k < list.corner_count; ++k)
          for (int j = 0; j < 4; ++j) to[4 * k + j] = as_float(from[at[list.corners[k]] + corner[turned ? 3 - j : j]]);
        to += 4 * list.corner_count;
        for (int64_t k = 0; k < list.single_count; ++k) to[k] = as_float(from[at[list.singles[k]]]);
      }
      return;
    }
    each_chunk(first, last, inputs, [&](float* near, int64_t low, int64_t high, const auto& lists) {
      for (int64_t i = low; i < high; ++i)
        for (int64_t tap = 0; tap < taps(); ++tap) {
          const Weight* from = w + tap * place.tap + i * place.input + first;
          __builtin_prefetch(from + 8 * place.input);
          float* to = near + ((i - low) * taps() + tap) * kTogether;
          for (int64_t j = 0; j < last - first; ++j) to[j] = as_float(from[j]);
        }
      lists([](float& value, float& at) { value = at; });
    });
  }

  // The other way: a gradient's sums to where the kernel has them, zeros where nothing is retained.
  void spread_task(float* w, const WeightPlace& place, int64_t task) {
    const int64_t first = task * kTogether, last = std::min(outputs, first + kTogether);
    each_chunk(first, last, place.inputs, [&](float* near, int64_t low, int64_t high, const auto& lists) {
      std::fill(near, near + (high - low) * taps() * kTogether, 0.0f);
      lists([](float& value, float& at) { at = value; });
      for (int64_t i = low; i < high; ++i)
        for (int64_t tap = 0; tap < taps(); ++tap)
          std::memcpy(w + tap * place.tap + i * place.input + first, near + ((i - low) * taps() + tap) * kTogether,
                      4 * (last - first));
    });
  }

 private:
  // Kernels of outputs [first, last), a few inputs at a time, as (code, output) in a buffer that stays in the cache: in
  // the kernel itself neighbours lie far apart, often at multiples of a power of two. `use` gets the buffer, its range
  // of inputs, and a function that visits each retained weight there and its place in the buffer.
  template <class Use>
  void each_chunk(int64_t first, int64_t last, int64_t inputs, const Use& use) {
    const int64_t step = std::max<int64_t>(1, 512 / taps());
    Scratch memory(4 * step * taps() * kTogether);
    float* near = memory.as<float>();
    std::vector<int64_t> corner(last - first, 0), single(last - first, 0);
    for (int64_t low = 0; low < inputs; low += step) {
      const int64_t high = std::min(inputs, low + step), begin = low * taps(), end = high * taps();
      use(near, low, high, [&](const auto& visit) {
        for (int64_t o = first; o < last; ++o) {
          const List list = list_of(o);
          float* value = values + panels[o].begin;
          float* at = near + (o - first);
          int64_t& c = corner[o - first];
          for (; c < list.corner_count && list.corners[c] < end; ++c) {
            const int64_t code = list.corners[c] - begin;
            const int64_t steps[4] = {code, code + 1, code + kw, code + kw + 1};
            // In the order in which their places lie.
            for (int j = 0; j < 4; ++j) visit(value[4 * c + j], at[steps[turned ? 3 - j : j] * kTogether]);
          }
          value += 4 * list.corner_count;
          int64_t& s = single[o - first];
          for (; s < list.single_count && list.singles[s] < end; ++s)
            visit(value[s], at[(list.singles[s] - begin) * kTogether]);
        }
      });
    }
  }
};

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

// One list on a block of rows x columns positions; `at` are the rows' places, `apart` vectors lie between columns.
template <int Rows, int Columns, int Apart>
void lane_block(const float* x, const int64_t* at, const int32_t* codes, const float* weights, int64_t count,
                const int32_t* place, float* y, const int64_t* to, int64_t out_apart, bool begins) {
  Vec<kLanes> sum[Rows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c)
      sum[r][c] = begins ? Vec<kLanes>{} : load<kLanes>(y + to[r] + c * out_apart);
  const float* row[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) row[r] = x + at[r];
  for (int64_t k = 0; k < count; ++k) {
    const int64_t offset = place[codes[k]];
    const Vec<kLanes> w = splat<kLanes>(weights[k]);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[r][c] += w * load<kLanes>(row[r] + offset + c * (Apart * kLanes));
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) store<kLanes>(y + to[r] + c * out_apart, sum[r][c]);
}

using LaneBlock = void (*)(const float*, const int64_t*, const int32_t*, const float*, int64_t, const int32_t*, float*,
                           const int64_t*, int64_t, bool);
template <int Apart, int Columns>
LaneBlock lane_block_rows(int rows) {
  constexpr int most = std::min(kMostRows, kMostSums / Columns);
  switch (rows) {
    case 1: return lane_block<1, Columns, Apart>;
    case 2: return lane_block<std::min(2, most), Columns, Apart>;
    case 3: return lane_block<std::min(3, most), Columns, Apart>;
    case 4: return lane_block<std::min(4, most), Columns, Apart>;
    case 5: return lane_block<std::min(5, most), Columns, Apart>;
    case 6: return lane_block<std::min(6, most), Columns, Apart>;
    case 7: return lane_block<std::min(7, most), Columns, Apart>;
    default: return lane_block<std::min(8, most), Columns, Apart>;
  }
}
template <int Apart>
LaneBlock lane_block_for(int rows, int columns) {
  switch (columns) {
    case 1: return lane_block_rows<Apart, 1>(rows);
    case 2: return lane_block_rows<Apart, 2>(rows);
    case 3: return lane_block_rows<Apart, 3>(rows);
    case 4: return lane_block_rows<Apart, 4>(rows);
    case 5: return lane_block_rows<Apart, 5>(rows);
    case 6: return lane_block_rows<Apart, 6>(rows);
    case 7: return lane_block_rows<Apart, 7>(rows);
    default: return lane_block_rows<Apart, 8>(rows);
  }
}

// Corners on a block of rows x columns positions that lie side by side: each vector is loaded once for all four weights.
template <int Rows, int Columns>
void corner_block(const float* x, int64_t pitch, const int32_t* codes, const float* weights, int64_t count,
                  const int32_t* place, float* y, int64_t out_pitch, bool begins) {
  Vec<kLanes> sum[Rows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c)
      sum[r][c] = begins ? Vec<kLanes>{} : load<kLanes>(y + r * out_pitch + c * kLanes);
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
        for (int c = 0; c < Columns; ++c) sum[r - 1][c] += w10 * v[c];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[r - 1][c] += w11 * v[c + 1];
      }
      if (r < Rows) {
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[r][c] += w00 * v[c];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sum[r][c] += w01 * v[c + 1];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) store<kLanes>(y + r * out_pitch + c * kLanes, sum[r][c]);
}

using CornerBlock = void (*)(const float*, int64_t, const int32_t*, const float*, int64_t, const int32_t*, float*, int64_t,
                             bool);
constexpr int kCornerSums = CLICKTRAIN_LANES == 8 ? 8 : 16;
constexpr int kCornerColumns = CLICKTRAIN_LANES == 8 ? 2 : 8;
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
    case 4: return corner_block_rows<4>(rows);
    case 5: return corner_block_rows<5>(rows);
    case 6: return corner_block_rows<6>(rows);
    case 7: return corner_block_rows<7>(rows);
    default: return corner_block_rows<8>(rows);
  }
}

// The part of a rising list whose codes lie in [low, high).
struct Part {
  int64_t begin, count;
};
inline Part part_of(const int32_t* list, int64_t count, int32_t low, int32_t high) {
  const int64_t begin = std::lower_bound(list, list + count, low) - list;
  return {begin, std::lower_bound(list + begin, list + count, high) - list - begin};
}

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
    for (int64_t g = 0; g < count; ++g)
      for (int64_t i = 0; i < q_.high; ++i)
        for (int64_t j = 0; j < q_.wide; ++j) {
          float* at[kLanes];
          each_lane(q_, p_.batch, begin + g, [&](int lane, int64_t image, int64_t row, int64_t column) {
            const int64_t h = row * q_.high + i, w = column * q_.wide + j;
            const bool inside = image >= 0 && h < p_.rows.out && w < p_.columns.out;
            at[lane] = inside ? y + ((image * p_.rows.out + h) * p_.columns.out + w) * p_.outputs : nullptr;
          });
          const float* from = sums + (g * q_.positions() + i * q_.wide + j) * kLanes;
          int64_t output = first;
          for (; output + kLanes <= last; output += kLanes) {
            Vec<kLanes> v[kLanes];
#pragma GCC unroll 16
            for (int k = 0; k < kLanes; ++k) v[k] = load<kLanes>(from + (output - first + k) * positions);
            transpose<kLanes>(v);
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes; ++lane)
              if (at[lane]) store<kLanes>(at[lane] + output, v[lane]);
          }
          for (; output < last; ++output)
            for (int lane = 0; lane < kLanes; ++lane)
              if (at[lane]) at[lane][output] = from[(output - first) * positions + lane];
        }
  }

  const Product& p_;
  const LaneWeights& w_;
  const float* x_;
  const Epilogue& epilogue_;
  const Pieces q_;
};

}  // namespace clicktrain::CLICKTRAIN_ISA
