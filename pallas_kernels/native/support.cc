#include "support.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace clicktrain {

#if defined(CLICKTRAIN_CHECKED)

// For tests: nothing is used again, each piece is as large as was asked for, and holds NaN before it is written.
Scratch::Scratch(int64_t bytes) : data_(nullptr), bytes_(bytes) {
  if (posix_memalign(&data_, 64, static_cast<size_t>(std::max<int64_t>(bytes, 1))) != 0) throw std::bad_alloc();
  std::memset(data_, 0xFF, static_cast<size_t>(bytes));
}
Scratch::~Scratch() { std::free(data_); }

#else

namespace {

struct Free {
  void* data;
  int64_t bytes;
};
// Never destroyed: threads of the pool may end after static objects.
std::mutex& free_mutex() {
  static std::mutex* mutex = new std::mutex;
  return *mutex;
}
std::vector<Free>& free_list() {
  static std::vector<Free>* list = new std::vector<Free>;
  return *list;
}

}  // namespace

Scratch::Scratch(int64_t bytes) : data_(nullptr), bytes_(round_up(std::max<int64_t>(bytes, 64), 4096)) {
  {
    std::lock_guard<std::mutex> lock(free_mutex());
    auto& list = free_list();
    auto best = list.end();
    for (auto it = list.begin(); it != list.end(); ++it)
      if (it->bytes >= bytes_ && it->bytes <= 4 * bytes_ && (best == list.end() || it->bytes < best->bytes)) best = it;
    if (best != list.end()) {
      data_ = best->data;
      bytes_ = best->bytes;
      list.erase(best);
      return;
    }
  }
  data_ = std::aligned_alloc(4096, static_cast<size_t>(bytes_));
  if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() {
  constexpr int64_t kMostKept = int64_t{512} << 20;
  std::lock_guard<std::mutex> lock(free_mutex());
  auto& list = free_list();
  list.push_back({data_, bytes_});
  int64_t total = 0;
  for (const Free& each : list) total += each.bytes;
  while (total > kMostKept) {  // the oldest goes first
    total -= list.front().bytes;
    std::free(list.front().data);
    list.erase(list.begin());
  }
}

#endif

Product forward_product(const Geometry& g, const Mask& m) {
  return {g.batch, m.cin, m.cout,
          {g.in_h, g.out_h, g.kh, g.stride_h, 1, -g.pad_top, 1},
          {g.in_w, g.out_w, g.kw, g.stride_w, 1, -g.pad_left, 1}};
}

Product gradient_product(const Geometry& g, const Mask& m) {
  return {g.batch, m.cout, m.cin,
          {g.out_h, g.in_h, g.kh, 1, -1, g.pad_top, g.stride_h},
          {g.out_w, g.in_w, g.kw, 1, -1, g.pad_left, g.stride_w}};
}

Grouped by_filters(const Mask& m, const Geometry& g) {
  return {m.by_filters, m.filters, m.channels, m.cin, m.cout, g.kh, g.kw, false};
}
Grouped by_channels(const Mask& m, const Geometry& g) {
  return {m.by_channels, m.channels, m.filters, m.cout, m.cin, g.kh, g.kw, true};
}

std::vector<int64_t> Grouped::counts() const {
  std::vector<int64_t> found(groups(), inputs * taps());
  if (lists.entries == nullptr) return found;
  const int64_t last = (inputs - 1) / depth, missing = (last + 1) * depth - inputs;  // of the last block
  for (int64_t group = 0; group < groups(); ++group) {
    const int32_t* entries = lists.entries + group * lists.room;
    found[group] = lists.counts[group] * depth;
    for (int64_t k = lists.counts[group] - 1; missing > 0 && k >= 0 && entries[k] / taps() == last; --k)
      found[group] -= missing;
  }
  return found;
}

void Grouped::by_tap(int64_t group, int32_t* begin, int32_t* channels, bool firsts) const {
  std::fill(begin, begin + taps() + 1, 0);
  each_block(group, [&](int64_t first, int64_t last, const int32_t* found, int64_t n) {
    for (int64_t k = 0; k < (firsts ? 1 : n); ++k) begin[found[k] + 1] += static_cast<int32_t>(last - first);
  });
  for (int64_t tap = 0; tap < taps(); ++tap) begin[tap + 1] += begin[tap];
  std::vector<int32_t> next(begin, begin + taps());
  each_block(group, [&](int64_t first, int64_t last, const int32_t* found, int64_t n) {
    for (int64_t k = 0; k < (firsts ? 1 : n); ++k)
      for (int64_t i = first; i < last; ++i) channels[next[found[k]]++] = static_cast<int32_t>(i);
  });
}

void widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

void narrow(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded >> 16);
  }
}

}  // namespace clicktrain
