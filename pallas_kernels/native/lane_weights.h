// The retained weights of kernels that choose each for itself: lists by output.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "support.h"
#include "vector.h"

namespace clicktrain::CLICKTRAIN_ISA {

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
    panels.reserve(outputs);
    list_begin.reserve(groups + 1);
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
      const bool corner = grouped.is_corner(block_taps, count);
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

// An output's sum at its end; `at`: where it stands in what is added.
inline float finished(const Epilogue& epilogue, float sum, int64_t output, int64_t at) {
  if (epilogue.scale) sum *= epilogue.scale[output];
  if (epilogue.bias) sum += epilogue.bias[output];
  if (epilogue.added) sum += epilogue.added[at];
  return epilogue.relu && sum < 0.0f ? 0.0f : sum;
}

// The part of a rising list whose codes lie in [low, high).
struct Part {
  int64_t begin, count;
};
inline Part part_of(const int32_t* list, int64_t count, int32_t low, int32_t high) {
  const int64_t begin = std::lower_bound(list, list + count, low) - list;
  return {begin, std::lower_bound(list + begin, list + count, high) - list - begin};
}

}  // namespace clicktrain::CLICKTRAIN_ISA
