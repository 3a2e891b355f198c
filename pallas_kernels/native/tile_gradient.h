// The weight gradient for tiles: a few entries of one tap times a panel of filters stay in registers while the pixels
// go by. A tap's pixels are a rectangle, so that what lies outside of the image is never met.
#pragma once

#include "tiles.h"

namespace clicktrain::CLICKTRAIN_ISA {

constexpr int kMostEntries = 8;
constexpr int64_t kFirstCache = 24 * 1024;  // of the first cache, for the images that all entries read
constexpr int64_t kFewPixels = 64;          // with fewer pixels at once the sums' loading and storing would show

template <int Lanes, int Vectors, int Entries>
void correlate(const float* x, const int32_t* channels, const float* dy, int64_t rows, int64_t columns, int64_t x_row,
               int64_t x_step, int64_t dy_row, float* sums, int64_t stride) {
  // From nothing, and added to what there is at the end: one long sum over all pixels would lose digits.
  Vec<Lanes> sum[Entries][Vectors] = {};
  int64_t channel[Entries];
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e) channel[e] = channels[e];
  for (int64_t r = 0; r < rows; ++r) {
    const float* at = x + r * x_row;
    const float* slope = dy + r * dy_row;
    for (int64_t c = 0; c < columns; ++c, at += x_step, slope += Vectors * Lanes) {
      Vec<Lanes> d[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) d[v] = load<Lanes>(slope + v * Lanes);
#pragma GCC unroll 8
      for (int e = 0; e < Entries; ++e) {
        const Vec<Lanes> s = splat<Lanes>(at[channel[e]]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[e][v] += s * d[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* total = sums + e * stride + v * Lanes;
      store<Lanes>(total, load<Lanes>(total) + sum[e][v]);
    }
}

using Correlate = void (*)(const float*, const int32_t*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                           float*, int64_t);
template <int Lanes, int Vectors>
Correlate correlate_entries(int entries) {
  constexpr int most = Vectors == 4 || (Vectors == 2 && kMostVectors == 2) ? 6 : kMostEntries;
  switch (entries) {
    case 1: return correlate<Lanes, Vectors, 1>;
    case 2: return correlate<Lanes, Vectors, 2>;
    case 3: return correlate<Lanes, Vectors, 3>;
    case 4: return correlate<Lanes, Vectors, 4>;
    case 5: return correlate<Lanes, Vectors, 5>;
    case 6: return correlate<Lanes, Vectors, 6>;
    case 7: return correlate<Lanes, Vectors, std::min(7, most)>;
    default: return correlate<Lanes, Vectors, most>;
  }
}
inline Correlate correlate_for(const Panel& panel, int entries) {
  if (panel.half) return correlate_entries<kLanes / 2 < 2 ? 2 : kLanes / 2, 1>(entries);
  if constexpr (kMostVectors == 4) {
    if (panel.vectors == 4) return correlate_entries<kLanes, 4>(entries);
    if (panel.vectors == 3) return correlate_entries<kLanes, 3>(entries);
  }
  if (panel.vectors == 2) return correlate_entries<kLanes, 2>(entries);
  return correlate_entries<kLanes, 1>(entries);
}

// Output places [first, last) whose tap reads inside of the image; step outputs are `axis.step` input places apart.
inline void places(const Axis& axis, int64_t tap, int64_t& first, int64_t& last) {
  first = 0;
  while (first < axis.out && axis.at(first, tap) < 0) ++first;
  last = axis.out;
  while (last > first && axis.at(last - 1, tap) < 0) --last;
}

inline void tile_weight_gradient(const Product& p, const Grouped& grouped, const float* x, const float* dy, float* dw,
                                 Pool& pool) {
  TileWeights lists(grouped, grouped.counts().data());
  Scratch memory(lists.bytes());  // the sums take the weights' place
  lists.place(memory.as<void>());
  parallel(pool, lists.groups, [&](int64_t group) { lists.fill_lists(grouped, group); });
  const int64_t taps = lists.taps, panels = static_cast<int64_t>(lists.panels.size());
  // A task is a panel, or some taps of one where there are few panels.
  const int64_t wanted = pool.threads() > 1 ? 3 * pool.threads() : 1;
  const int64_t parts = std::clamp<int64_t>(div_up(wanted, panels), 1, taps);
  // Pixels that all entries of a panel read one after the other: some rows of an image, or a few images.
  const int64_t pixel_bytes = 4 * p.inputs * p.rows.step * p.columns.step;
  const int64_t pixels = std::max(kFewPixels, kFirstCache / pixel_bytes);
  const int64_t most_rows = std::clamp<int64_t>(div_up(pixels, p.columns.out), 1, p.rows.out);
  const int64_t runs = div_up(p.rows.out, most_rows);
  const int64_t images = runs > 1 ? 1 : std::clamp<int64_t>(pixels / (p.columns.out * p.rows.out), 1, p.batch);

  parallel(pool, panels * parts, [&](int64_t task) {
    const Panel& panel = lists.panels[task / parts];
    const int32_t* begin = lists.tap_begin + panel.group * (taps + 1);
    const int32_t* channels = lists.channels + lists.list_begin[panel.group];
    const int64_t width = panel.width(), first_tap = taps * (task % parts) / parts, last_tap = taps * (task % parts + 1) / parts;
    float* sums = lists.values + lists.weight_begin[task / parts];
    std::fill(sums + begin[first_tap] * width, sums + begin[last_tap] * width, 0.0f);
    const int most = panel.vectors >= 4 ? 6 : panel.vectors == 2 && kMostVectors == 2 ? 6 : kMostEntries;
    Scratch slopes_memory(4 * images * most_rows * p.columns.out * width);
    float* slopes = slopes_memory.as<float>();
    for (int64_t image = 0; image < p.batch; image += images)
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t row0 = p.rows.out * run / runs, row1 = p.rows.out * (run + 1) / runs;
        const int64_t last_image = std::min(p.batch, image + images);
        const int64_t image_size = (row1 - row0) * p.columns.out;
        for (int64_t n = image; n < last_image; ++n) {
          const float* from = dy + ((n * p.rows.out + row0) * p.columns.out) * p.outputs + panel.first;
          float* to = slopes + (n - image) * image_size * width;
          for (int64_t i = 0; i < image_size; ++i) {
            for (int64_t o = 0; o < panel.valid; ++o) to[i * width + o] = from[i * p.outputs + o];
            for (int64_t o = panel.valid; o < width; ++o) to[i * width + o] = 0.0f;
          }
        }
        for (int64_t tap = first_tap; tap < last_tap; ++tap) {
          const int64_t entries = begin[tap + 1] - begin[tap];
          int64_t top, bottom, left, right;
          places(p.rows, tap / p.columns.taps, top, bottom);
          places(p.columns, tap % p.columns.taps, left, right);
          top = std::max(top, row0);
          bottom = std::min(bottom, row1);
          if (entries == 0 || top >= bottom || left >= right) continue;
          const int64_t blocks = div_up(entries, most);
          for (int64_t b = 0; b < blocks; ++b) {
            const int64_t k = begin[tap] + entries * b / blocks, end = begin[tap] + entries * (b + 1) / blocks;
            const Correlate correlate = correlate_for(panel, static_cast<int>(end - k));
            for (int64_t n = image; n < last_image; ++n) {
              const float* at = x + ((n * p.rows.in + p.rows.at(top, tap / p.columns.taps)) * p.columns.in +
                                     p.columns.at(left, tap % p.columns.taps)) * p.inputs;
              const float* slope = slopes + ((n - image) * image_size + (top - row0) * p.columns.out + left) * width;
              correlate(at, channels + k, slope, bottom - top, right - left, p.rows.step * p.columns.in * p.inputs,
                        p.columns.step * p.inputs, p.columns.out * width, sums + k * width, width);
            }
          }
        }
      }
    for (int64_t tap = first_tap; tap < last_tap; ++tap)
      for (int64_t k = begin[tap]; k < begin[tap + 1]; ++k)
        std::memcpy(dw + (tap * p.inputs + channels[k]) * p.outputs + panel.first, sums + k * width, 4 * panel.valid);
  });
}

}  // namespace clicktrain::CLICKTRAIN_ISA
