// Filters side by side in vectors, for masks whose tiles hold eight outputs and more, and for dense convolutions.
//
// A panel is a few vectors of outputs that share a list of (tap, input channel). A block of pixels times a panel stays
// in registers: for each entry one number of each pixel is broadcast and multiplied by the entry's weights. Pixels
// are read where they lie: where all taps of a block's pixels lie inside of the image, an entry's offset is one
// number; elsewhere each pixel has a pointer for each tap, to zeros outside of the image. Pixels are taken in the order
// of which taps they have, so that most blocks are of one kind, and taps that none has are skipped.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "tile_weights.h"

namespace clicktrain::CLICKTRAIN_ISA {

// Of the second cache: for images that all panels read, and for weights that all of these images' blocks read.
constexpr int64_t kCache = 384 * 1024;
constexpr int64_t kWeightCache = 160 * 1024;
constexpr int kMostPixels = 8;          // of a block

inline int pixels_of(int vectors) { return vectors >= 4 ? 6 : vectors == 2 && kMostVectors == 2 ? 6 : 8; }

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

// A few output pixels that are computed together. Places count from the first image of the run that they are of.
struct Block {
  int32_t count;
  bool inside;     // all taps of all pixels lie inside of the image: one place a pixel, that of its first tap
  int64_t places;  // where its places begin: (taps or 1, kMostPixels); kOutside for what lies outside of the image
  uint64_t taps;   // which taps any of the pixels has
  int64_t out[kMostPixels];
};
struct Blocks {
  std::vector<Block> blocks;
  std::vector<int64_t> places;
};
constexpr int64_t kOutside = -1;

// Rows of output pixels that one task takes: whole images, or a part of one. Runs of one shape have the same blocks.
struct Rows {
  int64_t image, images, begin, end;
};

// Sums (pixel, width) of a panel to where their pixels are: `out` are those, of `outputs` numbers each.
inline void finish(const Panel& panel, const Epilogue& epilogue, float* sums, const int64_t* out, int64_t count, int64_t outputs,
                   float* y) {
  const int64_t width = panel.width();
  const float* scale = epilogue.scale ? epilogue.scale + panel.first : nullptr;
  const float* bias = epilogue.bias ? epilogue.bias + panel.first : nullptr;
  for (int64_t p = 0; p < count; ++p) {
    float* from = sums + p * width;
    float* to = y + out[p] * outputs + panel.first;
    if (scale) for (int64_t o = 0; o < panel.valid; ++o) from[o] *= scale[o];
    if (bias) for (int64_t o = 0; o < panel.valid; ++o) from[o] += bias[o];
    if (epilogue.added) {
      const float* added = epilogue.added + (to - y);
      for (int64_t o = 0; o < panel.valid; ++o) from[o] += added[o];
    }
    if (epilogue.relu) for (int64_t o = 0; o < panel.valid; ++o) from[o] = from[o] < 0.0f ? 0.0f : from[o];
    if (panel.valid == width && width % kLanes == 0) {
      for (int64_t o = 0; o < width; o += kLanes) store<kLanes>(to + o, load<kLanes>(from + o));
    } else {
      std::memcpy(to, from, 4 * panel.valid);
    }
  }
}

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
        column_at_.push_back(c < 0 ? kOutside : c * p_.inputs);
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
    // Runs of nearly equal length: of whole images, or the same parts of each.
    const int64_t whole = chunk / p_.rows.out, cuts = whole > 0 ? 1 : div_up(p_.rows.out, chunk);
    const int64_t chunks = whole > 0 ? div_up(p_.batch, whole) : p_.batch * cuts, shapes = whole > 0 ? 2 : cuts;
    const auto rows_of = [&](int64_t c) {
      if (whole == 0) return Rows{c / cuts, 1, p_.rows.out * (c % cuts) / cuts, p_.rows.out * (c % cuts + 1) / cuts};
      const int64_t first = p_.batch * c / chunks;
      return Rows{first, p_.batch * (c + 1) / chunks - first, 0, p_.rows.out};
    };
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
    // Blocks of the runs of one shape, where there are more runs than shapes. Panels of different widths take different
    // numbers of pixels.
    using ByWidth = std::array<Blocks, kMostPixels + 1>;
    std::vector<ByWidth> shared(shapes < chunks ? shapes : 0);
    const auto shape_of = [&](int64_t c) { return whole > 0 ? rows_of(c).images - p_.batch / chunks : c % cuts; };
    const auto most_of = [](const Panel& panel) { return panel.half ? 8 : pixels_of(panel.vectors); };
    if (!shared.empty()) {
      std::vector<Rows> example(shapes, Rows{0, 0, 0, 0});
      for (int64_t c = 0; c < chunks; ++c) example[shape_of(c)] = rows_of(c);
      parallel(pool, shapes, [&](int64_t shape) {
        if (example[shape].images == 0) return;
        for (const Panel& panel : w_.panels) {
          Blocks& found = shared[shape][most_of(panel)];
          if (found.blocks.empty()) find(example[shape], most_of(panel), found);
        }
      });
    }
    parallel(pool, chunks * parts, [&](int64_t task) {
      const int64_t c = task / parts, part = task % parts;
      const Rows run = rows_of(c);
      ByWidth own;
      ByWidth& blocks = shared.empty() ? own : shared[shape_of(c)];
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
        const int most = most_of(w_.panels[i]);
        if (blocks[most].blocks.empty()) find(run, most, blocks[most]);
        const int64_t at = run.image * p_.rows.out * p_.columns.out * p_.outputs;
        Epilogue epilogue = epilogue_;
        if (epilogue.added) epilogue.added += at;
        run_panel(i, blocks[most], offsets, x_ + run.image * p_.rows.in * p_.columns.in * p_.inputs, epilogue, y + at);
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

  void find(const Rows& run, int most, Blocks& found) const {
    const int64_t kh = p_.rows.taps, kw = p_.columns.taps, columns = p_.columns.out;
    const uint64_t all_rows = (uint64_t{1} << kh) - 1, all_columns = (uint64_t{1} << kw) - 1;
    std::vector<std::vector<int32_t>> columns_of(column_kinds_.size());
    for (int64_t w = 0; w < columns; ++w) columns_of[column_kind_[w]].push_back(static_cast<int32_t>(w));
    // Where a row's taps lie.
    std::vector<int64_t> row_at((run.end - run.begin) * kh);
    for (int64_t row = run.begin; row < run.end; ++row)
      for (int64_t i = 0; i < kh; ++i) {
        const int64_t r = p_.rows.at(row, i);
        row_at[(row - run.begin) * kh + i] = r < 0 ? kOutside : r * p_.columns.in * p_.inputs;
      }
    const int64_t image_in = p_.rows.in * p_.columns.in * p_.inputs, image_out = p_.rows.out * columns;
    const int64_t pixels = run.images * (run.end - run.begin) * columns;
    found.blocks.reserve(pixels / most + 2);
    found.places.reserve((pixels / most + 2) * kMostPixels);
    bool was_inside = false;
    for (size_t rk = 0; rk < row_kinds_.size(); ++rk)
      for (size_t ck = 0; ck < column_kinds_.size(); ++ck) {
        const bool inside = uniform_ && row_kinds_[rk] == all_rows && column_kinds_[ck] == all_columns;
        for (int64_t image = 0; image < run.images; ++image)
          for (int64_t row = run.begin; row < run.end; ++row) {
            if (row_kind_[row] != static_cast<int32_t>(rk)) continue;
            const int64_t* rows = row_at.data() + (row - run.begin) * kh;
            const int64_t in = image * image_in, out = image * image_out + row * columns;
            for (const int32_t w : columns_of[ck]) {
              if (found.blocks.empty() || found.blocks.back().count == most || was_inside != inside) {
                found.blocks.push_back({0, inside, static_cast<int64_t>(found.places.size()), 0, {}});
                found.places.resize(found.places.size() + (inside ? 1 : w_.taps) * kMostPixels, kOutside);
                was_inside = inside;
              }
              Block& block = found.blocks.back();
              int64_t* at = found.places.data() + block.places + block.count;
              if (inside) {
                *at = in + rows[0] + column_at_[w * kw];
              } else {
                for (int64_t tap = 0; tap < w_.taps; ++tap) {
                  const int64_t above = rows[tap / kw], left = column_at_[w * kw + tap % kw];
                  if (above == kOutside || left == kOutside) continue;
                  at[tap * kMostPixels] = in + above + left;
                  block.taps |= uint64_t{1} << tap;
                }
              }
              block.out[block.count++] = out + w;
            }
          }
      }
    // Kernels take more pixels than a short block has: its first one again.
    for (const Block& block : found.blocks)
      for (int64_t tap = 0; tap < (block.inside ? 1 : w_.taps); ++tap) {
        int64_t* at = found.places.data() + block.places + tap * kMostPixels;
        std::fill(at + block.count, at + kMostPixels, at[0]);
      }
  }

  void run_panel(int64_t index, const Blocks& blocks, const int32_t* offsets, const float* x,
                 const Epilogue& epilogue, float* y) const {
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
    std::vector<const float*> pointers(w_.taps * kMostPixels);
    const float* zeros = zeros_.as<float>();
    // Where a tap of a block reads.
    const auto point = [&, x, zeros](const int64_t* places, int64_t tap) {
      const float** at = pointers.data() + tap * kMostPixels;
      for (int p = 0; p < kMostPixels; ++p) {
        const int64_t place = places[tap * kMostPixels + p];
        at[p] = place == kOutside ? zeros : x + place;
      }
      return at;
    };
    for (int64_t part = 0; part < parts; ++part) {
      const int32_t low = static_cast<int32_t>(entries * part / parts), high = static_cast<int32_t>(entries * (part + 1) / parts);
      float* sums = parts > 1 ? memory.as<float>() : few;
      for (const Block& block : blocks.blocks) {
        const int64_t* places = blocks.places.data() + block.places;
        int used = 0;
        if (block.inside) {
          segments[used++] = {point(places, 0), low, high};
        } else {
          for (int64_t tap = 0; tap < w_.taps; ++tap) {
            const int32_t first = std::max(begin[tap], low), last = std::min(begin[tap + 1], high);
            if (first < last && (block.taps >> tap & 1)) segments[used++] = {point(places, tap), first, last};
          }
        }
        multiply_for(panel, block.count)(segments.data(), used, (block.inside ? offsets : w_.channels) + list, weights, sums,
                                         part == 0);
        if (part == parts - 1) finish(panel, epilogue, sums, block.out, block.count, p_.outputs, y);
        if (parts > 1) sums += size;
      }
    }
  }

  const Product& p_;
  const TileWeights& w_;
  const float* x_;
  const Epilogue& epilogue_;
  Scratch zeros_;
  std::vector<int32_t> row_kind_, column_kind_;
  std::vector<int64_t> column_at_;
  std::vector<uint64_t> row_kinds_, column_kinds_;
  bool uniform_ = false;
};

}  // namespace clicktrain::CLICKTRAIN_ISA
