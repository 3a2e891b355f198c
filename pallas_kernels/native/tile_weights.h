// The retained weights of masks whose tiles hold eight outputs and more: lists by tap, weights by panels of outputs.
#pragma once

#include <algorithm>
#include <vector>

#include "support.h"
#include "vector.h"

namespace clicktrain::CLICKTRAIN_ISA {

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

  // `counts`: entries of each group, as a rule retained (tap, input); `planes`: weights of each for an output.
  TileWeights(const Grouped& grouped, const int64_t* counts, int64_t planes = 1) : panels(panels_of(grouped)), taps(grouped.taps()), groups(grouped.groups()) {
    for (int64_t g = 0; g < groups; ++g) {
      list_begin.push_back(entries);
      entries += counts[g];
    }
    for (const Panel& panel : panels) {
      weight_begin.push_back(weights);
      weights += planes * counts[panel.group] * panel.width();
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

}  // namespace clicktrain::CLICKTRAIN_ISA
