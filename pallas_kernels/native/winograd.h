// Kernels of one 2x2 corner each, in tiles of filters, on images that are not small: two outputs beside each other need
// three products in place of four (Winograd's minimal filtering), so a square of 2x2 outputs needs 9 in place of 16.
//
// Of outputs y0 = g0 d0 + g1 d1 and y1 = g0 d1 + g1 d2 the products are g0 (d0 - d1), (g0 + g1) d1 and g1 (d1 - d2):
// y0 is the first and the second, y1 the second less the third. In both directions that takes the image, its
// differences downwards, across, and both, whichever corner a kernel keeps; nine sums over all kernels of a filter,
// each like a convolution with one tap; and a few additions for each output at the end.
#pragma once

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace clicktrain::CLICKTRAIN_ISA {

constexpr int kPoints = 9;  // products of a square, three in each direction

// Lists by a corner's first tap; of each panel nine planes of weights (entry, output).
struct WinogradWeights : TileWeights {
  WinogradWeights(const Grouped& grouped, const int64_t* counts) : TileWeights(grouped, kernels(grouped, counts).data(), kPoints) {}

  // Whether each kernel that is kept keeps one 2x2 corner, and the outputs are enough to be worth the differences.
  static bool fits(const Grouped& grouped, const Geometry& g) {
    constexpr int64_t kLeastPixels = 64;
    bool fits = g.stride_h == 1 && g.stride_w == 1 && g.out_h * g.out_w >= kLeastPixels && grouped.lists.entries != nullptr;
    for (int64_t group = 0; fits && group < grouped.groups(); ++group)
      grouped.each_block(group, [&](int64_t, int64_t, const int32_t* taps, int64_t n) { fits = fits && grouped.is_corner(taps, n); });
    return fits;
  }
  void fill_lists(const Grouped& grouped, int64_t group) {
    kw = grouped.kw;
    grouped.by_tap(group, tap_begin + group * (taps + 1), channels + list_begin[group], true);
  }
  template <class Weight>
  void fill_task(const Weight* w, const WeightPlace& place, int64_t index) {
    const Panel& panel = panels[index];
    const int64_t width = panel.width();
    const int32_t* begin = tap_begin + panel.group * (taps + 1);
    const int32_t* list = channels + list_begin[panel.group];
    const int64_t plane = begin[taps] * width;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t k = begin[tap]; k < begin[tap + 1]; ++k)
        for (int64_t o = 0; o < width; ++o) {
          const Weight* from = w + tap * place.tap + list[k] * place.input + (panel.first + o) * place.output;
          float g[3][3] = {};
          if (o < panel.valid)
            for (int r = 0; r < 2; ++r)
              for (int c = 0; c < 2; ++c) g[2 * r][2 * c] = as_float(from[(r * kw + c) * place.tap]);
          for (int r = 0; r < 3; r += 2) g[r][1] = g[r][0] + g[r][2];
          for (int c = 0; c < 3; ++c) g[1][c] = g[0][c] + g[2][c];
          float* to = values + weight_begin[index] + k * width + o;
          for (int point = 0; point < kPoints; ++point) to[point * plane] = g[point / 3][point % 3];
        }
  }

 private:
  static std::vector<int64_t> kernels(const Grouped& grouped, const int64_t* counts) {
    std::vector<int64_t> found(counts, counts + grouped.groups());
    for (int64_t& count : found) count /= 4;
    return found;
  }
  int64_t kw = 0;
};

class WinogradProduct {
 public:
  WinogradProduct(const Product& product, const WinogradWeights& weights, const float* x, const Epilogue& epilogue)
      : p_(product), w_(weights), x_(x), epilogue_(epilogue), high_(div_up(product.rows.out, 2)), across_(div_up(product.columns.out, 2)),
        wide_(2 * across_ + product.columns.taps - 1), zeros_(4 * product.inputs), offsets_(4 * weights.entries + 4) {
    std::fill(zeros_.as<float>(), zeros_.as<float>() + p_.inputs, 0.0f);
    for (int64_t g = 0; g < w_.groups; ++g)
      for (int64_t tap = 0; tap < w_.taps; ++tap) {
        const int32_t* begin = w_.tap_begin + g * (w_.taps + 1) + tap;
        const int64_t place = (tap / p_.columns.taps * wide_ + tap % p_.columns.taps) * p_.inputs;
        for (int64_t k = w_.list_begin[g] + begin[0]; k < w_.list_begin[g] + begin[1]; ++k)
          offsets_.as<int32_t>()[k] = static_cast<int32_t>(w_.channels[k] + place);
      }
  }

  void run(float* y, Pool& pool) const {
    const int64_t threads = pool.threads(), wanted = threads > 1 ? 3 * threads : 1, panels = static_cast<int64_t>(w_.panels.size());
    // Rows of squares whose maps stay in the cache; for many threads fewer, but some blocks.
    int64_t rows = kCache / (4 * sizeof(float) * wide_ * p_.inputs) / 2 - p_.rows.taps / 2;
    rows = std::clamp<int64_t>(rows, std::min(high_, div_up(2 * kMostPixels, across_)), high_);
    if (threads > 1) rows = std::clamp<int64_t>(div_up(p_.batch * high_, wanted), std::min(rows, div_up(2 * kMostPixels, across_)), rows);
    const int64_t cuts = div_up(high_, rows), bands = p_.batch * cuts;
    const int64_t parts = std::min(panels, div_up(wanted, bands));
    const auto band_of = [&](int64_t band) {
      return Band{band / cuts, high_ * (band % cuts) / cuts, high_ * (band % cuts + 1) / cuts};
    };
    if (parts == 1) {
      parallel(pool, bands, [&](int64_t index) {
        const Band band = band_of(index);
        const Scratch maps(4 * size(band));
        for (int64_t row = 0; row < rows_of(band); ++row) subtract(band, row, maps.as<float>());
        multiply(band, maps.as<float>(), 0, panels, y);
      });
      return;
    }
    // All threads make the maps, then share the panels.
    std::vector<int64_t> begin(1, 0), first_row(1, 0);
    for (int64_t band = 0; band < bands; ++band) {
      begin.push_back(begin.back() + size(band_of(band)));
      first_row.push_back(first_row.back() + rows_of(band_of(band)));
    }
    const Scratch maps(4 * begin.back());
    const int64_t tasks = std::min(first_row.back(), wanted);
    parallel(pool, tasks, [&](int64_t task) {
      for (int64_t row = first_row.back() * task / tasks; row < first_row.back() * (task + 1) / tasks; ++row) {
        const int64_t band = std::upper_bound(first_row.begin(), first_row.end(), row) - first_row.begin() - 1;
        subtract(band_of(band), row - first_row[band], maps.as<float>() + begin[band]);
      }
    });
    parallel(pool, bands * parts, [&](int64_t task) {
      const int64_t band = task / parts, part = task % parts;
      multiply(band_of(band), maps.as<float>() + begin[band], panels * part / parts, panels * (part + 1) / parts, y);
    });
  }

 private:
  // Some rows of squares of one image.
  struct Band {
    int64_t image, begin, end;
  };
  int64_t rows_of(const Band& band) const { return 2 * (band.end - band.begin) + p_.rows.taps - 1; }
  int64_t map_size(const Band& band) const { return rows_of(band) * wide_ * p_.inputs; }
  int64_t size(const Band& band) const { return 4 * map_size(band); }

  // One row of the four maps: the image with what is around it, less its right neighbour, less the one below, less both.
  void subtract(const Band& band, int64_t row, float* maps) const {
    const int64_t channels = p_.inputs, size = map_size(band);
    const float* zeros = zeros_.as<float>();
    const auto at = [&](int64_t r, int64_t c) {
      const int64_t h = 2 * band.begin + r + p_.rows.shift, w = c + p_.columns.shift;
      if (h < 0 || h >= p_.rows.in || w < 0 || w >= p_.columns.in) return zeros;
      return x_ + ((band.image * p_.rows.in + h) * p_.columns.in + w) * channels;
    };
    for (int64_t column = 0; column < wide_; ++column) {
      const float *here = at(row, column), *right = at(row, column + 1), *below = at(row + 1, column), *both = at(row + 1, column + 1);
      float* to = maps + (row * wide_ + column) * channels;
      CLICKTRAIN_INDEPENDENT
      for (int64_t i = 0; i < channels; ++i) {
        const float across = here[i] - right[i];
        to[i] = here[i];
        to[size + i] = across;
        to[2 * size + i] = here[i] - below[i];
        to[3 * size + i] = across - (below[i] - both[i]);
      }
    }
  }

  void multiply(const Band& band, const float* maps, int64_t first_panel, int64_t last_panel, float* y) const {
    constexpr int kMostWidth = kMostVectors * kLanes;
    alignas(64) float sums[kPoints][kMostPixels * kMostWidth], results[4 * kMostPixels * kMostWidth];
    const int64_t squares = (band.end - band.begin) * across_, channels = p_.inputs;
    for (int64_t index = first_panel; index < last_panel; ++index) {
      const Panel& panel = w_.panels[index];
      const int64_t width = panel.width(), most = panel.half ? 8 : pixels_of(panel.vectors);
      const int32_t entries = w_.tap_begin[panel.group * (w_.taps + 1) + w_.taps];
      const int32_t* offsets = offsets_.as<int32_t>() + w_.list_begin[panel.group];
      const float* weights = w_.values + w_.weight_begin[index];
      for (int64_t first = 0; first < squares; first += most) {
        const int count = static_cast<int>(std::min(most, squares - first));
        for (int point = 0; point < kPoints; ++point) {
          const int row = point / 3, column = point % 3;
          const float* map = maps + ((row != 1) * 2 + (column != 1)) * map_size(band) + ((row > 0) * wide_ + (column > 0)) * channels;
          const float* at[kMostPixels];
          for (int p = 0; p < kMostPixels; ++p) {
            const int64_t square = first + (p < count ? p : 0);
            at[p] = map + 2 * (square / across_ * wide_ + square % across_) * channels;
          }
          const Segment all{at, 0, entries};
          multiply_for(panel, count)(&all, 1, offsets, weights + point * entries * width, sums[point], true);
        }
        int64_t out[4 * kMostPixels], made = 0;
        for (int p = 0; p < count; ++p) {
          const int64_t square = first + p, row = 2 * (band.begin + square / across_), column = 2 * (square % across_);
          for (int64_t r = row; r < std::min(row + 2, p_.rows.out); ++r)
            for (int64_t c = column; c < std::min(column + 2, p_.columns.out); ++c) {
              add_up(r - row, c - column, &sums[0][p * width], kMostPixels * kMostWidth, width, results + made * width);
              out[made++] = (band.image * p_.rows.out + r) * p_.columns.out + c;
            }
        }
        finish(panel, epilogue_, results, out, made, p_.outputs, y);
      }
    }
  }

  // One output of a square of the nine sums, `apart` numbers from one to the next.
  static void add_up(int64_t row, int64_t column, const float* sums, int64_t apart, int64_t width, float* result) {
    const float *a = sums + (3 * row + column) * apart, *b = a + apart, *c = a + 3 * apart, *d = c + apart;
    // The second in a direction is the second product less the third.
    const float across = column ? -1.0f : 1.0f, down = row ? -1.0f : 1.0f;
    CLICKTRAIN_INDEPENDENT
    for (int64_t o = 0; o < width; ++o) result[o] = (a[o] + across * b[o]) + down * (c[o] + across * d[o]);
  }

  const Product& p_;
  const WinogradWeights& w_;
  const float* x_;
  const Epilogue& epilogue_;
  const int64_t high_, across_, wide_;  // rows and columns of squares, columns of a map
  Scratch zeros_, offsets_;             // offsets: of each entry, from where a square's window begins in a map
};

}  // namespace clicktrain::CLICKTRAIN_ISA
