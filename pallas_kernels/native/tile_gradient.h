// The weight gradient for tiles: a few entries times a panel of filters stay in registers while the pixels go by.
//
// Entries of one tap: its pixels are a rectangle, so that what lies outside of the image is never met. Where a tap has
// too few entries to fill the registers, entries of all taps go together, over images that are copied with zeros around.
#pragma once

#include "tiles.h"

namespace clicktrain::CLICKTRAIN_ISA {

constexpr int kMostEntries = 8;
constexpr int64_t kFirstCache = 24 * 1024;  // of the first cache, for the images that all entries read
constexpr int64_t kShares = 12;             // of the images, at most, where a panel's entries go together
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

// Processor cycles that a pixel takes: blocks of `most` entries and fewer, whose sums are ready after four.
inline double correlate_cycles(int64_t entries, int most, int64_t vectors) {
  const int64_t blocks = div_up(entries, most);
  const double each = blocks > 0 ? static_cast<double>(entries * vectors) / blocks : 0;
  return blocks * (std::max(4.0, each) + vectors + 1);
}

inline int most_entries(const Panel& panel) {
  return panel.vectors >= 4 || (panel.vectors == 2 && kMostVectors == 2) ? 6 : kMostEntries;
}

// Whether entries of all taps should go together.
inline bool is_joint(const Product& p, const TileWeights& lists) {
  double apart = 0, together = 0;
  for (const Panel& panel : lists.panels) {
    const int32_t* begin = lists.tap_begin + panel.group * (lists.taps + 1);
    const int64_t vectors = panel.half ? 1 : panel.vectors;
    for (int64_t tap = 0; tap < lists.taps; ++tap) {
      int64_t top, bottom, left, right;
      places(p.rows, tap / p.columns.taps, top, bottom);
      places(p.columns, tap % p.columns.taps, left, right);
      const double share = static_cast<double>((bottom - top) * (right - left)) / (p.rows.out * p.columns.out);
      apart += share * correlate_cycles(begin[tap + 1] - begin[tap], most_entries(panel), vectors);
    }
    together += correlate_cycles(begin[lists.taps], most_entries(panel), vectors);
    together += 2.0 * p.inputs * p.rows.step * p.columns.step / kLanes;  // the copy
  }
  return together < apart;
}

// Some rows of an image with what lies around them, zeros outside of it: (high, wide, channels).
inline void copy_with_zeros(const Product& p, const float* image, int64_t first_row, int64_t high, int64_t wide, float* to) {
  const int64_t line = wide * p.inputs, before = std::clamp<int64_t>(-p.columns.shift, 0, wide) * p.inputs;
  const int64_t skipped = std::max<int64_t>(p.columns.shift, 0) * p.inputs;
  const int64_t count = std::max<int64_t>(0, std::min(p.columns.in * p.inputs - skipped, line - before));
  for (int64_t h = 0; h < high; ++h, to += line) {
    const int64_t row = first_row + h;
    const bool inside = row >= 0 && row < p.rows.in && count > 0;
    const int64_t begin = inside ? before : line, end = inside ? before + count : line;
    std::fill(to, to + begin, 0.0f);
    if (inside) std::memcpy(to + begin, image + row * p.columns.in * p.inputs + skipped, 4 * count);
    std::fill(to + end, to + line, 0.0f);
  }
}

// A panel's sums of one tap to where the kernel has them.
inline void put_weights(const TileWeights& lists, int64_t index, int64_t tap, const Product& p, float* dw) {
  const Panel& panel = lists.panels[index];
  const int32_t* begin = lists.tap_begin + panel.group * (lists.taps + 1);
  const int32_t* channels = lists.channels + lists.list_begin[panel.group];
  const float* sums = lists.values + lists.weight_begin[index];
  for (int64_t k = begin[tap]; k < begin[tap + 1]; ++k)
    std::memcpy(dw + (tap * p.inputs + channels[k]) * p.outputs + panel.first, sums + k * panel.width(), 4 * panel.valid);
}

inline void tile_weight_gradient(const Product& p, const Grouped& grouped, const float* x, const float* dy, float* dw,
                                 Pool& pool) {
  TileWeights lists(grouped, grouped.counts().data());
  Scratch memory(lists.bytes());  // the sums take the weights' place
  lists.place(memory.as<void>());
  parallel(pool, lists.groups, [&](int64_t group) { lists.fill_lists(grouped, group); });
  const int64_t taps = lists.taps, panels = static_cast<int64_t>(lists.panels.size());
  // Pixels that all entries of a panel read one after the other: some rows of an image, or a few images.
  const int64_t pixel_bytes = 4 * p.inputs * p.rows.step * p.columns.step;
  const int64_t pixels = std::max(kFewPixels, kFirstCache / pixel_bytes);
  const int64_t most_rows = std::clamp<int64_t>(div_up(pixels, p.columns.out), 1, p.rows.out);
  const int64_t runs = div_up(p.rows.out, most_rows);
  const int64_t images = runs > 1 ? 1 : std::clamp<int64_t>(pixels / (p.columns.out * p.rows.out), 1, p.batch);
  // A task is a panel, or some taps of one where there are few panels. Together, some images of one, whose sums are
  // added up in the end: how many is the shape's to say, and no bit depends on the number of threads.
  const bool joint = is_joint(p, lists);
  const int64_t wanted = pool.threads() > 1 ? 3 * pool.threads() : 1;
  const int64_t parts = joint ? 1 : std::clamp<int64_t>(div_up(wanted, panels), 1, taps);
  const int64_t shares = joint ? std::clamp<int64_t>(div_up(kShares, panels), 1, div_up(p.batch, images)) : 1;
  const int64_t high = (most_rows - 1) * p.rows.step + p.rows.taps, wide = (p.columns.out - 1) * p.columns.step + p.columns.taps;
  std::vector<int32_t> offsets(joint ? lists.entries : 0);
  for (int64_t g = 0; joint && g < lists.groups; ++g)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int32_t* begin = lists.tap_begin + g * (taps + 1);
      const int64_t place = (tap / p.columns.taps * wide + tap % p.columns.taps) * p.inputs;
      for (int64_t k = lists.list_begin[g] + begin[tap]; k < lists.list_begin[g] + begin[tap + 1]; ++k)
        offsets[k] = static_cast<int32_t>(place + lists.channels[k]);
    }
  const Scratch more(4 * (shares - 1) * lists.weights);

  parallel(pool, panels * parts * shares, [&](int64_t task) {
    const int64_t share = task % shares, index = task / shares / parts, part = task / shares % parts;
    const Panel& panel = lists.panels[index];
    const int32_t* begin = lists.tap_begin + panel.group * (taps + 1);
    const int32_t* channels = (joint ? offsets.data() : lists.channels) + lists.list_begin[panel.group];
    const int64_t width = panel.width(), first_tap = taps * part / parts, last_tap = taps * (part + 1) / parts;
    float* const own = share == 0 ? lists.values : more.as<float>() + (share - 1) * lists.weights;
    float* sums = own + lists.weight_begin[index];
    std::fill(sums + begin[first_tap] * width, sums + begin[last_tap] * width, 0.0f);
    const int most = most_entries(panel);
    const bool whole = panel.valid == width && p.outputs == width;  // slopes lie as they are read
    Scratch slopes_memory(whole ? 0 : 4 * images * most_rows * p.columns.out * width);
    Scratch padded_memory(joint ? 4 * images * high * wide * p.inputs : 0);
    float* padded = padded_memory.as<float>();
    const int64_t image_begin = p.batch * share / shares, image_end = p.batch * (share + 1) / shares;
    for (int64_t image = image_begin; image < image_end; image += images)
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t row0 = p.rows.out * run / runs, row1 = p.rows.out * (run + 1) / runs;
        const int64_t last_image = std::min(image_end, image + images);
        const int64_t image_size = (row1 - row0) * p.columns.out;
        const auto slopes_of = [&](int64_t n) {
          if (whole) return dy + (n * p.rows.out + row0) * p.columns.out * width;
          return static_cast<const float*>(slopes_memory.as<float>()) + (n - image) * image_size * width;
        };
        for (int64_t n = image; !whole && n < last_image; ++n) {
          const float* from = dy + ((n * p.rows.out + row0) * p.columns.out) * p.outputs + panel.first;
          float* to = slopes_memory.as<float>() + (n - image) * image_size * width;
          for (int64_t i = 0; i < image_size; ++i) {
            for (int64_t o = 0; o < panel.valid; ++o) to[i * width + o] = from[i * p.outputs + o];
            for (int64_t o = panel.valid; o < width; ++o) to[i * width + o] = 0.0f;
          }
        }
        // Entries [first, last) of a rectangle of pixels; `from` gives what its first one reads of an image.
        const auto correlate_all = [&](int64_t first, int64_t last, int64_t top, int64_t bottom, int64_t left, int64_t right,
                                       int64_t line, const auto& from) {
          if (first >= last || top >= bottom || left >= right) return;
          const int64_t blocks = div_up(last - first, most);
          for (int64_t b = 0; b < blocks; ++b) {
            const int64_t k = first + (last - first) * b / blocks, end = first + (last - first) * (b + 1) / blocks;
            const Correlate correlate = correlate_for(panel, static_cast<int>(end - k));
            for (int64_t n = image; n < last_image; ++n)
              correlate(from(n), channels + k, slopes_of(n) + ((top - row0) * p.columns.out + left) * width, bottom - top,
                        right - left, p.rows.step * line, p.columns.step * p.inputs, p.columns.out * width,
                        sums + k * width, width);
          }
        };
        if (joint) {
          for (int64_t n = image; n < last_image; ++n)
            copy_with_zeros(p, x + n * p.rows.in * p.columns.in * p.inputs, row0 * p.rows.step + p.rows.shift, high, wide,
                            padded + (n - image) * high * wide * p.inputs);
          correlate_all(0, begin[taps], row0, row1, 0, p.columns.out, wide * p.inputs,
                        [&](int64_t n) { return padded + (n - image) * high * wide * p.inputs; });
          continue;
        }
        for (int64_t tap = first_tap; tap < last_tap; ++tap) {
          int64_t top, bottom, left, right;
          places(p.rows, tap / p.columns.taps, top, bottom);
          places(p.columns, tap % p.columns.taps, left, right);
          top = std::max(top, row0);
          bottom = std::min(bottom, row1);
          correlate_all(begin[tap], begin[tap + 1], top, bottom, left, right, p.columns.in * p.inputs, [&](int64_t n) {
            const int64_t row = p.rows.at(top, tap / p.columns.taps), column = p.columns.at(left, tap % p.columns.taps);
            return x + ((n * p.rows.in + row) * p.columns.in + column) * p.inputs;
          });
        }
      }
    if (shares > 1) return;
    for (int64_t tap = first_tap; tap < last_tap; ++tap) put_weights(lists, index, tap, p, dw);
  });
  if (shares == 1) return;
  parallel(pool, panels, [&](int64_t index) {
    const Panel& panel = lists.panels[index];
    const int64_t count = lists.tap_begin[panel.group * (taps + 1) + taps] * panel.width();
    float* sums = lists.values + lists.weight_begin[index];
    for (int64_t share = 1; share < shares; ++share) {
      const float* other = more.as<float>() + (share - 1) * lists.weights + lists.weight_begin[index];
      for (int64_t i = 0; i < count; ++i) sums[i] += other[i];
    }
    for (int64_t tap = 0; tap < taps; ++tap) put_weights(lists, index, tap, p, dw);
  });
}

}  // namespace clicktrain::CLICKTRAIN_ISA
