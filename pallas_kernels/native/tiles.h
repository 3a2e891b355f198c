// Filters side by side in vectors, for masks whose tiles hold eight outputs and more, and for dense convolutions.
//
// A panel is a few vectors of outputs that share a list of (tap, input channel). A block of pixels times a panel stays
// in registers: for each entry one number of each pixel is broadcast and multiplied by the entry's weights. Pixels
// are read where they lie: where all taps of a block's pixels lie inside of the image, an entry's offset is one
// number; elsewhere each pixel has a pointer for each tap, to zeros outside of the image. Pixels are taken in the order
// of which taps they have, so that most blocks are of one kind, and taps that none has are skipped.
#pragma once

#include <algorithm>
#include <vector>

#include "support.h"
#include "vector.h"

namespace clicktrain::CLICKTRAIN_ISA {

// Of the second cache: for images that all panels read, and for weights that all of these images' blocks read.
constexpr int64_t kCache = 384 * 1024;
constexpr int64_t kWeightCache = 160 * 1024;
constexpr int kMostPixels = 8;          // of a block

inline int pixels_of(int vectors) { return vectors >= 4 ? 6 : vectors == 2 && kMostVectors == 2 ? 6 : 8; }

// Outputs of one panel: `vectors` of kLanes, or one of half as many where that suffices.
struct Panel {
  int64_t group, first, valid;  // first output, and how many there are
  int vectors;
  bool half;
  int64_t width() const { return half ? kLanes / 2 : int64_t{vectors} * kLanes; }
};

inline std::vector<Panel> panels_of(const Grouped& grouped) {
  std::vector<Panel> panels;
  for (int64_t group = 0; group < grouped.groups(); ++group) {
    const int64_t begin = group * grouped.width, end = std::min(grouped.outputs, begin + grouped.width);
    const int64_t parts = div_up(end - begin, kMostVectors * kLanes);
    // Alike, not one short rest: 80 outputs are 48 and 32, not 64 and 16.
    const int64_t width = round_up(div_up(end - begin, parts), kLanes);
    for (int64_t first = begin; first < end; first += width) {
      const int64_t valid = std::min(width, end - first);
      panels.push_back({group, first, valid, static_cast<int>(div_up(valid, kLanes)), kLanes >= 8 && valid <= kLanes / 2});
    }
  }
  return panels;
}

// Lists by tap and weights by panel, in one piece of memory.
struct TileWeights {
  std::vector<Panel> panels;
  std::vector<int64_t> list_begin;    // of each group, in channels
  std::vector<int64_t> weight_begin;  // of each panel
  int64_t taps, groups, entries = 0, weights = 0;
  int32_t* tap_begin = nullptr;  // (groups, taps + 1)
  int32_t* channels = nullptr;
  float* values = nullptr;

  // `counts`: retained (tap, input) of each group.
  TileWeights(const Grouped& grouped, const int64_t* counts) : panels(panels_of(grouped)), taps(grouped.taps()), groups(grouped.groups()) {
    for (int64_t g = 0; g < groups; ++g) {
      list_begin.push_back(entries);
      entries += counts[g];
    }
    for (const Panel& panel : panels) {
      weight_begin.push_back(weights);
      weights += counts[panel.group] * panel.width();
    }
  }
  int64_t bytes() const {
    return round_up(4 * groups * (taps + 1), 64) + round_up(4 * entries, 64) + round_up(4 * weights, 64);
  }
  void place(void* memory) {
    char* at = static_cast<char*>(memory);
    tap_begin = reinterpret_cast<int32_t*>(at);
    at += round_up(4 * groups * (taps + 1), 64);
    channels = reinterpret_cast<int32_t*>(at);
    at += round_up(4 * entries, 64);
    values = reinterpret_cast<float*>(at);
  }
  void fill_lists(const Grouped& grouped, int64_t group) {
    grouped.by_tap(group, tap_begin + group * (taps + 1), channels + list_begin[group]);
  }
  int64_t tasks() const { return static_cast<int64_t>(panels.size()); }
  template <class Weight>
  void fill_task(const Weight* w, const WeightPlace& place, int64_t index);
};

template <class Weight>
void TileWeights::fill_task(const Weight* w, const WeightPlace& place, int64_t index) {
  const Panel& panel = panels[index];
  const int64_t width = panel.width(), valid = panel.valid;
  const int32_t* begin = tap_begin + panel.group * (taps + 1);
  const int32_t* list = channels + list_begin[panel.group];
  float* out = values + weight_begin[index];
  for (int64_t tap = 0; tap < taps; ++tap) {
    const Weight* base = w + tap * place.tap + panel.first * place.output;
    if (place.output == 1) {
      for (int64_t k = begin[tap]; k < begin[tap + 1]; ++k) {
        const Weight* from = base + list[k] * place.input;
        float* to = out + k * width;
        for (int64_t o = 0; o < valid; ++o) to[o] = as_float(from[o]);
        for (int64_t o = valid; o < width; ++o) to[o] = 0.0f;
      }
      continue;
    }
    // Outputs lie far apart: a few entries at a time, so that what is read together is used together.
    for (int64_t k0 = begin[tap]; k0 < begin[tap + 1]; k0 += 16) {
      const int64_t k1 = std::min<int64_t>(k0 + 16, begin[tap + 1]);
      for (int64_t o = 0; o < valid; ++o)
        for (int64_t k = k0; k < k1; ++k) out[k * width + o] = as_float(base[o * place.output + list[k] * place.input]);
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t o = valid; o < width; ++o) out[k * width + o] = 0.0f;
    }
  }
}

// A run of entries with a pointer for each pixel of the block.
struct Segment {
  const float* const* at;
  int32_t begin, end;
};

template <int Lanes, int Vectors, int Pixels>
inline __attribute__((always_inline)) void multiply(const Segment* segments, int count, const int32_t* offsets,
                                                    const float* weights, float* sums, bool begins) {
  Vec<Lanes> sum[Pixels][Vectors];
#pragma GCC unroll 8
  for (int p = 0; p < Pixels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      sum[p][v] = begins ? Vec<Lanes>{} : load<Lanes>(sums + (p * Vectors + v) * Lanes);
  for (int s = 0; s < count; ++s) {
    const float* at[Pixels];
#pragma GCC unroll 8
    for (int p = 0; p < Pixels; ++p) at[p] = segments[s].at[p];
    const float* w = weights + int64_t{segments[s].begin} * (Vectors * Lanes);
    for (int32_t k = segments[s].begin, end = segments[s].end; k < end; ++k, w += Vectors * Lanes) {
      const int64_t offset = offsets[k];
      Vec<Lanes> weight[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) weight[v] = load<Lanes>(w + v * Lanes);
#pragma GCC unroll 8
      for (int p = 0; p < Pixels; ++p) {
        const Vec<Lanes> x = splat<Lanes>(at[p][offset]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[p][v] += x * weight[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < Pixels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store<Lanes>(sums + (p * Vectors + v) * Lanes, sum[p][v]);
}

using Multiply = void (*)(const Segment*, int, const int32_t*, const float*, float*, bool);

template <int Lanes, int Vectors, int Pixels>
void multiply_alone(const Segment* s, int n, const int32_t* offsets, const float* w, float* sums, bool begins) {
  multiply<Lanes, Vectors, Pixels>(s, n, offsets, w, sums, begins);
}
template <int Lanes, int Vectors>
Multiply multiply_for_pixels(int pixels) {
  // Short blocks are rounded up; what is too much reads the block's first pixel again and is not stored.
  return pixels <= 2 ? multiply_alone<Lanes, Vectors, 2>
         : pixels <= 4 ? multiply_alone<Lanes, Vectors, 4>
         : pixels <= 6 ? multiply_alone<Lanes, Vectors, 6>
                       : multiply_alone<Lanes, Vectors, 8>;
}
inline Multiply multiply_for(const Panel& panel, int pixels) {
  if (panel.half) return multiply_for_pixels<kLanes / 2 < 2 ? 2 : kLanes / 2, 1>(pixels);
  if constexpr (kMostVectors == 4) {
    if (panel.vectors == 4) return multiply_for_pixels<kLanes, 4>(pixels);
    if (panel.vectors == 3) return multiply_for_pixels<kLanes, 3>(pixels);
  }
  if (panel.vectors == 2) return multiply_for_pixels<kLanes, 2>(pixels);
  return multiply_for_pixels<kLanes, 1>(pixels);
}

// A few output pixels that are computed together.
struct Block {
  int32_t count;
  bool inside;       // all taps of all pixels lie inside of the image: one pointer a pixel, to its first tap
  int64_t pointers;  // where its pointers begin: (taps or 1, kMostPixels)
  uint64_t taps;     // which taps any of the pixels has
  int64_t out[kMostPixels];
};
struct Blocks {
  std::vector<Block> blocks;
  std::vector<const float*> pointers;
};

class TileProduct {
 public:
  TileProduct(const Product& product, const TileWeights& weights, const float* x, const Epilogue& epilogue)
      : p_(product), w_(weights), x_(x), epilogue_(epilogue), zeros_(4 * round_up(product.inputs, 16)) {
    float* zeros = zeros_.as<float>();
    std::fill(zeros, zeros + p_.inputs, 0.0f);
    sort_places(p_.rows, row_kind_, row_kinds_);
    sort_places(p_.columns, column_kind_, column_kinds_);
    for (int64_t w = 0; w < p_.columns.out; ++w)
      for (int64_t j = 0; j < p_.columns.taps; ++j) {
        const int64_t c = p_.columns.at(w, j);
        column_at_.push_back(static_cast<int32_t>(c < 0 ? -1 : c * p_.inputs));
      }
  }

  void run(float* y, Pool& pool) {
    const int64_t rows = p_.batch * p_.rows.out;
    const int64_t row_bytes = 4 * p_.columns.in * p_.inputs * std::max<int64_t>(1, p_.rows.in) / std::max<int64_t>(1, p_.rows.out);
    int64_t chunk = std::clamp<int64_t>(kCache / std::max<int64_t>(row_bytes, 1), 1, rows);
    const int64_t threads = pool.threads(), count = static_cast<int64_t>(w_.panels.size());
    int64_t parts = 1;
    if (threads > 1) {
      const int64_t wanted = 3 * threads;
      parts = std::clamp<int64_t>(div_up(wanted, div_up(rows, chunk)), 1, std::min(count, like_the_longest()));
      if (div_up(rows, chunk) * parts < wanted) chunk = std::max<int64_t>(1, std::min(chunk, div_up(rows, div_up(wanted, parts))));
    }
    // Runs of equal length.
    const int64_t chunks = div_up(rows, chunk);
    // An entry's offset for windows inside of the image: the tap's place and the channel.
    Scratch memory(4 * w_.entries + 64);
    int32_t* offsets = memory.as<int32_t>();
    uniform_ = is_uniform();
    if (uniform_) {
      for (int64_t g = 0; g < w_.groups; ++g) {
        const int32_t* begin = w_.tap_begin + g * (w_.taps + 1);
        for (int64_t tap = 0; tap < w_.taps; ++tap) {
          const int32_t place = static_cast<int32_t>(tap_offset(tap));
          for (int64_t k = w_.list_begin[g] + begin[tap]; k < w_.list_begin[g] + begin[tap + 1]; ++k)
            offsets[k] = w_.channels[k] + place;
        }
      }
    }
    parallel(pool, chunks * parts, [&](int64_t task) {
      const int64_t c = task / parts, part = task % parts;
      // Panels of different widths take different numbers of pixels.
      Blocks blocks[kMostPixels + 1];
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
        const int most = w_.panels[i].half ? 8 : pixels_of(w_.panels[i].vectors);
        if (blocks[most].blocks.empty()) find(rows * c / chunks, rows * (c + 1) / chunks, most, blocks[most]);
        run_panel(i, blocks[most], offsets, y);
      }
    });
  }

 private:
  // Which places along an axis have the same taps: a number for each, and each number's taps.
  static void sort_places(const Axis& axis, std::vector<int32_t>& kind, std::vector<uint64_t>& kinds) {
    for (int64_t o = 0; o < axis.out; ++o) {
      uint64_t bits = 0;
      for (int64_t k = 0; k < axis.taps; ++k) bits |= uint64_t{axis.at(o, k) >= 0} << k;
      const auto found = std::find(kinds.begin(), kinds.end(), bits);
      kind.push_back(static_cast<int32_t>(found - kinds.begin()));
      if (found == kinds.end()) kinds.push_back(bits);
    }
  }
  // Where one tap reads of a pixel that has all of them, from where its first tap reads.
  int64_t tap_offset(int64_t tap) const {
    const int64_t row = tap / p_.columns.taps, column = tap % p_.columns.taps;
    return (p_.rows.turn * row * p_.columns.in + p_.columns.turn * column) * p_.inputs;
  }
  // How many panels there would be if all had as much to do as the one that has most: it cannot be cut, rows can.
  int64_t like_the_longest() const {
    int64_t most = 1;
    for (size_t i = 0; i < w_.panels.size(); ++i)
      most = std::max(most, (i + 1 < w_.panels.size() ? w_.weight_begin[i + 1] : w_.weights) - w_.weight_begin[i]);
    return std::max<int64_t>(1, div_up(w_.weights, most));
  }
  bool is_uniform() const {
    const int64_t span = (p_.rows.taps * p_.columns.in + p_.columns.taps) * p_.inputs;
    return p_.rows.spread == 1 && p_.columns.spread == 1 && span < (int64_t{1} << 30);
  }

  // One output pixel of a run of rows.
  struct Place {
    int32_t row, column;  // the row of the run, the column of the image
    bool inside;
  };

  void find(int64_t begin, int64_t end, int most, Blocks& found) const {
    const int64_t kh = p_.rows.taps, kw = p_.columns.taps;
    const uint64_t all_rows = (uint64_t{1} << kh) - 1, all_columns = (uint64_t{1} << kw) - 1;
    std::vector<Place> places;
    places.reserve((end - begin) * p_.columns.out);
    for (size_t rk = 0; rk < row_kinds_.size(); ++rk)
      for (size_t ck = 0; ck < column_kinds_.size(); ++ck) {
        const bool inside = uniform_ && row_kinds_[rk] == all_rows && column_kinds_[ck] == all_columns;
        for (int64_t row = begin, h = begin % p_.rows.out; row < end; ++row, h = h + 1 == p_.rows.out ? 0 : h + 1)
          if (row_kind_[h] == static_cast<int32_t>(rk))
            for (int64_t w = 0; w < p_.columns.out; ++w)
              if (column_kind_[w] == static_cast<int32_t>(ck))
                places.push_back({static_cast<int32_t>(row - begin), static_cast<int32_t>(w), inside});
      }
    // Where a row's taps lie; null outside.
    std::vector<const float*> row_at((end - begin) * kh);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < kh; ++i) {
        const int64_t r = p_.rows.at(row % p_.rows.out, i);
        row_at[(row - begin) * kh + i] =
            r < 0 ? nullptr : x_ + (row / p_.rows.out * p_.rows.in + r) * p_.columns.in * p_.inputs;
      }
    const float* zeros = zeros_.as<float>();
    const int64_t count = static_cast<int64_t>(places.size());
    for (int64_t first = 0; first < count;) {
      Block block;
      block.inside = places[first].inside;
      block.taps = 0;
      block.count = 1;
      while (block.count < most && first + block.count < count && places[first + block.count].inside == block.inside)
        ++block.count;
      block.pointers = static_cast<int64_t>(found.pointers.size());
      for (int p = 0; p < block.count; ++p)
        block.out[p] = (begin + places[first + p].row) * p_.columns.out + places[first + p].column;
      for (int64_t tap = 0; tap < (block.inside ? 1 : w_.taps); ++tap)
        for (int p = 0; p < kMostPixels; ++p) {
          const Place& place = places[first + (p < block.count ? p : 0)];
          const float* row = row_at[place.row * kh + tap / kw];
          const int32_t column = column_at_[place.column * kw + tap % kw];
          const bool reads = row != nullptr && column >= 0;
          if (reads) block.taps |= uint64_t{1} << tap;
          found.pointers.push_back(reads ? row + column : zeros);
        }
      found.blocks.push_back(block);
      first += block.count;
    }
  }

  void run_panel(int64_t index, const Blocks& blocks, const int32_t* offsets, float* y) const {
    const Panel& panel = w_.panels[index];
    const int32_t* begin = w_.tap_begin + panel.group * (w_.taps + 1);
    const int64_t list = w_.list_begin[panel.group];
    const float* weights = w_.values + w_.weight_begin[index];
    const int64_t width = panel.width(), entries = begin[w_.taps];
    // Where a panel's weights are more than the cache holds, the sums of a part of them are kept meanwhile.
    const int64_t parts = std::max<int64_t>(1, div_up(4 * entries * width, kWeightCache));
    const int64_t size = kMostPixels * width;
    alignas(64) float few[kMostPixels * kMostVectors * kLanes];
    const Scratch memory(parts > 1 ? 4 * size * static_cast<int64_t>(blocks.blocks.size()) : 0);
    std::vector<Segment> segments(w_.taps);
    for (int64_t part = 0; part < parts; ++part) {
      const int32_t low = static_cast<int32_t>(entries * part / parts), high = static_cast<int32_t>(entries * (part + 1) / parts);
      float* sums = parts > 1 ? memory.as<float>() : few;
      for (const Block& block : blocks.blocks) {
        const float* const* pointers = blocks.pointers.data() + block.pointers;
        int used = 0;
        if (block.inside) {
          segments[used++] = {pointers, low, high};
        } else {
          for (int64_t tap = 0; tap < w_.taps; ++tap) {
            const int32_t first = std::max(begin[tap], low), last = std::min(begin[tap + 1], high);
            if (first < last && (block.taps >> tap & 1)) segments[used++] = {pointers + tap * kMostPixels, first, last};
          }
        }
        multiply_for(panel, block.count)(segments.data(), used, (block.inside ? offsets : w_.channels) + list, weights, sums,
                                         part == 0);
        if (part == parts - 1) finish(panel, sums, block.out, block.count, y);
        if (parts > 1) sums += size;
      }
    }
  }

  void finish(const Panel& panel, float* sums, const int64_t* out, int count, float* y) const {
    const int64_t width = panel.width();
    const float* scale = epilogue_.scale ? epilogue_.scale + panel.first : nullptr;
    const float* bias = epilogue_.bias ? epilogue_.bias + panel.first : nullptr;
    for (int p = 0; p < count; ++p) {
      float* from = sums + p * width;
      float* to = y + out[p] * p_.outputs + panel.first;
      if (scale) for (int64_t o = 0; o < panel.valid; ++o) from[o] *= scale[o];
      if (bias) for (int64_t o = 0; o < panel.valid; ++o) from[o] += bias[o];
      if (epilogue_.relu) for (int64_t o = 0; o < panel.valid; ++o) from[o] = from[o] < 0.0f ? 0.0f : from[o];
      if (panel.valid == width && width % kLanes == 0) {
        for (int64_t o = 0; o < width; o += kLanes) store<kLanes>(to + o, load<kLanes>(from + o));
      } else {
        std::memcpy(to, from, 4 * panel.valid);
      }
    }
  }

  const Product& p_;
  const TileWeights& w_;
  const float* x_;
  const Epilogue& epilogue_;
  Scratch zeros_;
  std::vector<int32_t> row_kind_, column_kind_, column_at_;
  std::vector<uint64_t> row_kinds_, column_kinds_;
  bool uniform_ = false;
};

}  // namespace clicktrain::CLICKTRAIN_ISA
