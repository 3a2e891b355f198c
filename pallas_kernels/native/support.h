// What every instruction set's kernels share: memory that is used again, where taps read, lists of what is retained.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core.h"

namespace clicktrain {

// Memory from a list of buffers that were used before: fresh pages cost more than many a convolution.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_;
  int64_t bytes_;
};

// Calls body(index) for each of [0, count) on the pool.
template <class Body>
void parallel(Pool& pool, int64_t count, const Body& body) {
  if (count <= 0) return;
  if (count == 1) {
    body(int64_t{0});
    return;
  }
  pool.run(count, [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
           const_cast<void*>(static_cast<const void*>(&body)));
}

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// Where taps read along one axis: output o reads (o * step + tap * turn + shift) / spread, where that is whole and inside.
// A convolution has turn 1 and spread 1; its transpose turn -1, step 1, and the stride for spread.
struct Axis {
  int64_t in, out, taps;
  int64_t step, turn, shift, spread;
  // The input place, or -1 for none.
  int64_t at(int64_t output, int64_t tap) const {
    const int64_t place = output * step + tap * turn + shift;
    if (place < 0 || place % spread != 0) return -1;
    return place / spread < in ? place / spread : -1;
  }
};

// A sum of products over retained (input channel, tap), in either direction.
struct Product {
  int64_t batch, inputs, outputs;
  Axis rows, columns;
  int64_t taps() const { return rows.taps * columns.taps; }
};
Product forward_product(const Geometry& g, const Mask& m);
Product gradient_product(const Geometry& g, const Mask& m);

// Where the weight of (tap, input, output) lies in the kernel.
struct WeightPlace {
  int64_t tap, input, output;  // strides
  int64_t inputs;
};

// Lists by groups of `width` outputs that share what they retain.
struct Grouped {
  Lists lists;      // null entries: everything
  int64_t width;    // outputs of a group
  int64_t depth;    // inputs of a block
  int64_t inputs, outputs, kh, kw;
  bool turned;      // whether taps count backwards, as in the transposed convolution
  int64_t taps() const { return kh * kw; }
  int64_t groups() const { return div_up(outputs, width); }
  std::vector<int64_t> counts() const;  // retained (input, tap) of each group
  // begin: (taps + 1,), from 0; `firsts`: each block by its first tap alone.
  void by_tap(int64_t group, int32_t* begin, int32_t* channels, bool firsts = false) const;
  bool is_corner(const int32_t* block, int64_t count) const {
    const int64_t tap = block[0];
    return count == 4 && tap % kw + 1 < kw && block[1] == tap + 1 && block[2] == tap + kw && block[3] == tap + kw + 1;
  }
  // Calls use(first input, last input, taps, how many) for each block that retains any, in rising order.
  template <class Use>
  void each_block(int64_t group, const Use& use) const {
    std::vector<int32_t> found(taps());
    if (lists.entries == nullptr) {
      for (int64_t tap = 0; tap < taps(); ++tap) found[tap] = static_cast<int32_t>(tap);
      use(int64_t{0}, inputs, found.data(), taps());
      return;
    }
    const int32_t* entries = lists.entries + group * lists.room;
    for (int64_t k = 0, count = lists.counts[group]; k < count;) {
      const int64_t block = entries[k] / taps();
      int64_t n = 0;
      for (; k < count && entries[k] < (block + 1) * taps(); ++k) found[n++] = static_cast<int32_t>(entries[k] - block * taps());
      use(block * depth, std::min(inputs, (block + 1) * depth), found.data(), n);
    }
  }
};
Grouped by_filters(const Mask& m, const Geometry& g);
Grouped by_channels(const Mask& m, const Geometry& g);

void widen(const uint16_t* from, float* to, int64_t count);   // bfloat16 -> float32
void narrow(const float* from, uint16_t* to, int64_t count);  // float32 -> bfloat16, to nearest even

}  // namespace clicktrain
