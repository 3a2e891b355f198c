// Kernels that choose each for itself, on so few pixels that a vector or two hold those of all images.
//
// What each (channel, tap) reads is laid out as one row of all output pixels. Where a vector is longer than the pixels
// are many, the four rows of a corner share vectors: one load, one product and one shuffle of its weights do all four
// taps. Each output's list is walked once, its sums stay in registers.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "lane_weights.h"

namespace clicktrain::CLICKTRAIN_ISA {

class FewPixels {
 public:
  static constexpr int64_t kLeast = 3, kMost = 32;  // pixels: of all images
  static bool fits(const Product& p) {
    const int64_t pixels = p.batch * p.rows.out * p.columns.out;
    return pixels >= kLeast && pixels <= kMost;
  }

  FewPixels(const Product& product, const LaneWeights& weights, const float* x, const Epilogue& epilogue)
      : p_(product), w_(weights), x_(x), epilogue_(epilogue), pixels_(product.batch * product.rows.out * product.columns.out) {
    while (width_ < pixels_) width_ *= 2;
    shares_ = width_ < kLanes;
    bool has_singles = false;
    for (int64_t g = 0; g < w_.groups; ++g)
      has_singles = has_singles || w_.list_begin[g + 1] - w_.list_begin[g] > 4 * int64_t{w_.corner_count[g]};
    const int64_t corner[4] = {0, 1, w_.kw, w_.kw + 1};
    for (int j = 0; j < 4; ++j) steps_[j] = corner[w_.turned ? 3 - j : j] * width_;
    at_.resize(w_.taps() * unit(), nullptr);
    for (int64_t tap = 0; tap < w_.taps(); ++tap) {
      const bool is_corner = tap % w_.kw + 1 < w_.kw && tap + w_.kw + 1 < w_.taps();
      if (!shares_) {
        point(tap, tap * width_);
      } else if (is_corner) {
        for (int j = 0; j < 4; ++j) point(tap + corner[w_.turned ? 3 - j : j], (4 * tap + j) * width_);
      } else if (has_singles) {
        point(tap, (4 * tap + own()) * width_);
      } else {
        continue;
      }
      for (int64_t begin = tap * unit(); begin < (tap + 1) * unit(); begin += kLanes) used_.push_back(begin);
    }
  }

  void run(float* y, Pool& pool) {
    Scratch memory(4 * p_.inputs * row_size());
    float* rows = memory.as<float>();
    parallel(pool, div_up(p_.inputs, kTogether), [&](int64_t task) {
      const int64_t first = task * kTogether;
      lay_out(first, std::min(p_.inputs, first + kTogether), rows);
    });
    parallel(pool, div_up(p_.outputs, kTogether), [&](int64_t task) {
      const int64_t first = task * kTogether, last = std::min(p_.outputs, first + kTogether);
      alignas(64) float sums[kTogether * kMost];
      switch (width_) {
        case 4: add_up<4>(first, last, rows, sums); break;
        case 8: add_up<8>(first, last, rows, sums); break;
        case 16: add_up<16>(first, last, rows, sums); break;
        default: add_up<32>(first, last, rows, sums);
      }
      finish(first, last, sums, y);
    });
  }

 private:
  static constexpr int64_t kTogether = 32;  // channels of one task
  // Numbers of a (channel, tap): the rows of the corner that begins there, or its own.
  int64_t unit() const { return shares_ ? 4 * width_ : width_; }
  int64_t row_size() const { return w_.taps() * unit(); }
  // Which row of a corner is that of the tap where it begins.
  int own() const { return w_.turned ? 3 : 0; }

  // Where a tap's row lies in the images.
  void point(int64_t tap, int64_t begin) {
    for (int64_t pixel = 0; pixel < pixels_; ++pixel) {
      const int64_t image = pixel / (p_.rows.out * p_.columns.out);
      const int64_t row = p_.rows.at(pixel / p_.columns.out % p_.rows.out, tap / w_.kw);
      const int64_t column = p_.columns.at(pixel % p_.columns.out, tap % w_.kw);
      if (row >= 0 && column >= 0) at_[begin + pixel] = x_ + ((image * p_.rows.in + row) * p_.columns.in + column) * p_.inputs;
    }
  }

  // The rows of some channels.
  void lay_out(int64_t first, int64_t last, float* rows) const {
    alignas(64) static const float zeros[kLanes] = {};
    int64_t channel = first;
    for (; channel + kLanes <= last; channel += kLanes)
      for (const int64_t begin : used_) {
        Vec<kLanes> v[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) v[lane] = load<kLanes>(at_[begin + lane] ? at_[begin + lane] + channel : zeros);
        transpose<kLanes>(v);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store<kLanes>(rows + (channel + j) * row_size() + begin, v[j]);
      }
    for (; channel < last; ++channel)
      for (const int64_t begin : used_)
        for (int64_t k = begin; k < begin + kLanes; ++k) rows[channel * row_size() + k] = at_[k] ? at_[k][channel] : 0.0f;
  }

  // Sums (output, Width) of some outputs.
  template <int Width>
  void add_up(int64_t first, int64_t last, const float* rows, float* sums) const {
    for (int64_t output = first; output < last; ++output, sums += Width) {
      const LaneWeights::List list = w_.list_of(output);
      if constexpr (Width < kLanes) {
        add_shared<Width>(list, rows, sums);
      } else {
        add_apart<Width / kLanes>(list, rows, sums);
      }
    }
  }

  // One of a few corners whose weights lie in a vector: each weight as many times as there are pixels, times the rows.
  template <int Width, int Entry, int Part, int... J>
  static inline __attribute__((always_inline)) Vec<kLanes> product(Vec<kLanes> w, const float* x, std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(w, w, (4 * Entry + (Part * kLanes + J) / Width)...) * load<kLanes>(x + Part * kLanes);
  }
  template <int Width, int Entry, int... Part>
  static inline __attribute__((always_inline)) void add_corner(Vec<kLanes> w, const float* x, Vec<kLanes>* sums,
                                                               std::integer_sequence<int, Part...>) {
    ((sums[Part] += product<Width, Entry, Part>(w, x, std::make_integer_sequence<int, kLanes>())), ...);
  }
  template <int Width, int... Entry>
  static inline __attribute__((always_inline)) void add_corners(const int32_t* codes, const float* weights, int64_t count,
                                                                const float* rows, Vec<kLanes>* sums,
                                                                std::integer_sequence<int, Entry...>) {
    constexpr int kVectors = 4 * Width / kLanes, kSets = 4 / kVectors;
    const Vec<kLanes> w = load<kLanes>(weights);
    const auto parts = std::make_integer_sequence<int, kVectors>();
    ((Entry < count ? add_corner<Width, Entry>(w, rows + codes[Entry] * (4 * Width), sums + Entry % kSets * kVectors, parts)
                    : void()), ...);
  }

  template <int Width>
  void add_shared(const LaneWeights::List& list, const float* rows, float* sums) const {
    // Several sets: one sum would wait for its last product.
    constexpr int kVectors = 4 * Width / kLanes, kSets = 4 / kVectors, kEntries = kLanes / 4;
    Vec<kLanes> sum[4] = {};
    const auto entries = std::make_integer_sequence<int, kEntries>();
    int64_t k = 0;
    for (; k + kEntries <= list.corner_count; k += kEntries)
      add_corners<Width>(list.corners + k, list.corner_values + 4 * k, kEntries, rows, sum, entries);
    if (k < list.corner_count) {
      alignas(64) float rest[kLanes] = {};
      std::memcpy(rest, list.corner_values + 4 * k, 16 * (list.corner_count - k));
      add_corners<Width>(list.corners + k, rest, list.corner_count - k, rows, sum, entries);
    }
    alignas(64) float all[4 * Width];
    if constexpr (kSets == 4) sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    if constexpr (kSets == 2) sum[0] += sum[2], sum[1] += sum[3];
    store<kLanes>(all, sum[0]);
    if constexpr (kVectors >= 2) store<kLanes>(all + kLanes, sum[1]);
    if constexpr (kVectors == 4) store<kLanes>(all + 2 * kLanes, sum[2]), store<kLanes>(all + 3 * kLanes, sum[3]);
    Vec<Width> total = (load<Width>(all) + load<Width>(all + Width)) + (load<Width>(all + 2 * Width) + load<Width>(all + 3 * Width));
    for (k = 0; k < list.single_count; ++k)
      total += splat<Width>(list.single_values[k]) * load<Width>(rows + list.singles[k] * (4 * Width) + own() * Width);
    store<Width>(sums, total);
  }

  template <int Vectors>
  void add_apart(const LaneWeights::List& list, const float* rows, float* sums) const {
    constexpr int kSets = Vectors <= 2 ? 4 : 1;
    Vec<kLanes> sum[kSets][Vectors] = {};
    const auto at = [&](int32_t code) { return rows + code * int64_t{Vectors * kLanes}; };
    const int64_t step1 = steps_[1], step0 = steps_[0], step2 = steps_[2], step3 = steps_[3];
    for (int64_t k = 0; k < list.corner_count; ++k) {
      const float* x = at(list.corners[k]);
      const float* from[4] = {x + step0, x + step1, x + step2, x + step3};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec<kLanes> w = splat<kLanes>(list.corner_values[4 * k + j]);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[j % kSets][v] += w * load<kLanes>(from[j] + v * kLanes);
      }
    }
    for (int64_t k = 0; k < list.single_count; ++k) {
      const float* x = at(list.singles[k]);
      const Vec<kLanes> w = splat<kLanes>(list.single_values[k]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[0][v] += w * load<kLanes>(x + v * kLanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      if constexpr (kSets == 4) sum[0][v] = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
      store<kLanes>(sums + v * kLanes, sum[0][v]);
    }
  }

  void finish(int64_t first, int64_t last, const float* sums, float* y) const {
    for (int64_t pixel = 0; pixel < pixels_; ++pixel)
      for (int64_t output = first; output < last; ++output) {
        const int64_t at = pixel * p_.outputs + output;
        y[at] = finished(epilogue_, sums[(output - first) * width_ + pixel], output, at);
      }
  }

  const Product& p_;
  const LaneWeights& w_;
  const float* x_;
  const Epilogue& epilogue_;
  const int64_t pixels_;
  int64_t width_ = 4;  // pixels of a row, those added to make it a power of two included
  bool shares_ = false;
  int64_t steps_[4];              // from a corner's first row to those of its four weights
  std::vector<const float*> at_;  // where each number of a channel's rows lies in the images; null for zero
  std::vector<int64_t> used_;     // where the vectors of them begin that any entry may read
};

}  // namespace clicktrain::CLICKTRAIN_ISA
