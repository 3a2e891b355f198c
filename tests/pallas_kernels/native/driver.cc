// Draws convolutions and normalisations, and compares the native kernels with their definition, one sum at a time in
// double precision.
//
// For sanitizers, other compilers and other processors: no jax, no Python. Every array has a block of the heap of its
// own, exactly as large as it is; outputs are NaN before; what is not retained of the weights is NaN or infinite, and
// what lies behind a list's count is no entry. Where all numbers are small integers, every sum is exact in float32,
// whatever its order, and results must be equal; elsewhere they must be near, and of the same bits for any number of
// threads and for packed weights.
//
//   driver small|large|norms|chains FIRST_SEED HOW_MANY
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "chains.h"
#include "drawn.h"
#include "norms.h"

extern "C" {
const char* clicktrain_instruction_set();
int64_t clicktrain_packed_bytes(const int64_t*, const int32_t*, const int32_t*, const int32_t*, const int32_t*);
void clicktrain_pack(const int64_t*, const int32_t*, const int32_t*, const int32_t*, const int32_t*, const void*, void*);
void clicktrain_forward(const int64_t*, const int32_t*, const int32_t*, const int32_t*, const int32_t*, const void*,
                        const void*, const void*, const float*, const float*, int64_t, void*, int64_t);
void clicktrain_input_gradient(const int64_t*, const int32_t*, const int32_t*, const int32_t*, const int32_t*,
                               const void*, const void*, void*, int64_t);
void clicktrain_weight_gradient(const int64_t*, const int32_t*, const int32_t*, const int32_t*, const int32_t*,
                                const void*, const void*, float*, int64_t);
}

namespace {

struct Sum {
  double value = 0, size = 0;  // `size`: of what is added up, for the bound
  int64_t terms = 0;
  void add(double a, double b) {
    value += a * b;
    size += std::fabs(a * b);
    ++terms;
  }
};

struct Case {
  int64_t batch, in_h, in_w, out_h, out_w, kh, kw, stride_h, stride_w, top, left, cin, cout, filters, channels;
  bool half, dense, whole;  // `whole`: all numbers are small integers
  std::vector<uint8_t> retained;  // (blocks, tiles, taps)
  std::vector<int64_t> block_of, tile_of;  // by channel and by filter: asked for with every product, divided once
  int64_t taps() const { return kh * kw; }
  int64_t blocks() const { return (cin + channels - 1) / channels; }
  int64_t tiles() const { return (cout + filters - 1) / filters; }
  bool keeps(int64_t tap, int64_t c, int64_t f) const {
    return dense || retained[(block_of[c] + tile_of[f]) * taps() + tap];
  }
};

int64_t length(Random& random, bool small) { return small ? random.of(1, 19) : random.of(100, 224); }

Case draw(Random& random, bool small) {
  Case k{};
  for (;;) {
    k.batch = small ? random.one_in(3) ? random.of(1, 35) : random.of(1, 4) : random.of(1, 2);
    k.in_h = length(random, small), k.in_w = length(random, small);
    k.kh = random.of(1, 5), k.kw = random.of(1, 5);
    if (random.one_in(3)) k.kh = k.kw = 3;
    if (random.one_in(12)) k.kh = k.kw = 7;
    if (random.one_in(40)) k.kh = 2, k.kw = 31;
    if (random.one_in(40)) k.kh = 9, k.kw = 8;  // more taps than a number has bits
    k.stride_h = random.of(1, 3), k.stride_w = random.one_in(3) ? random.of(1, 3) : k.stride_h;
    if (random.one_in(3)) k.stride_h = k.stride_w = 1;
    const bool same = random.one_in(2);
    k.top = same ? k.kh / 2 : random.of(0, k.kh), k.left = same ? k.kw / 2 : random.of(0, k.kw);
    const int64_t bottom = same ? (k.kh - 1) / 2 : random.of(0, k.kh), right = same ? (k.kw - 1) / 2 : random.of(0, k.kw);
    const int64_t high = k.in_h + k.top + bottom - k.kh, wide = k.in_w + k.left + right - k.kw;
    k.cin = random.one_in(4) ? random.of(1, 80) : random.of(1, 20);
    k.cout = random.one_in(3) ? random.of(1, 150) : random.of(1, 40);
    if (!small) k.cin = random.of(1, 5), k.cout = random.of(1, 70);
    // So many channels that their images pass the second cache: they are taken in runs.
    if (small && random.one_in(8)) k.batch = random.of(1, 2), k.cin = random.of(200, 700), k.cout = random.of(1, 9);
    if (high < 0 || wide < 0) continue;
    k.out_h = high / k.stride_h + 1, k.out_w = wide / k.stride_w + 1;
    if (!small || k.batch * k.out_h * k.out_w * k.taps() * k.cin * k.cout < 4000000) break;
  }
  const int64_t sizes[] = {1, 4, 8, 16, 32, 64};
  k.filters = random.one_in(3) ? random.of(1, k.cout) : std::min(sizes[random.of(0, 5)], k.cout);
  k.channels = random.one_in(2) ? 1 : random.of(1, k.cin);
  k.half = random.one_in(3), k.dense = random.one_in(8), k.whole = random.one_in(2);
  // One corner a kernel, in tiles of filters: packed, such have a form of their own.
  const bool corners = k.kh > 1 && k.kw > 1 && k.cout >= 8 && random.one_in(3);
  if (corners) k.dense = false, k.filters = std::max<int64_t>(k.filters, 8);
  k.retained.assign(k.blocks() * k.tiles() * k.taps(), 0);
  for (int64_t c = 0; c < k.cin; ++c) k.block_of.push_back(c / k.channels * k.tiles());
  for (int64_t f = 0; f < k.cout; ++f) k.tile_of.push_back(f / k.filters);
  const int64_t kind = corners ? 6 : random.of(0, 5), heavy = random.of(0, k.tiles() - 1);
  for (int64_t block = 0; block < k.blocks(); ++block)
    for (int64_t tile = 0; tile < k.tiles(); ++tile) {
      uint8_t* taps = &k.retained[(block * k.tiles() + tile) * k.taps()];
      if (kind == 0 || (kind == 1 && tile != heavy)) continue;  // nothing; one tile alone
      const bool corner = kind >= 4 && k.kh > 1 && k.kw > 1 && (corners || !random.one_in(5));
      if (kind >= 5 && random.one_in(2)) continue;
      const int64_t row = random.of(0, std::max<int64_t>(k.kh - 2, 0)), column = random.of(0, std::max<int64_t>(k.kw - 2, 0));
      if (corner && !corners && k.kh > 2 && random.one_in(8)) {  // a corner's distances, over the edge: none
        const int64_t last = row * k.kw + k.kw - 1;
        for (int64_t tap : {last, last + 1, last + k.kw, last + k.kw + 1})
          if (tap < k.taps()) taps[tap] = 1;
        continue;
      }
      for (int64_t tap = 0; tap < k.taps(); ++tap) {
        const int64_t i = tap / k.kw - row, j = tap % k.kw - column;
        taps[tap] = corner ? i >= 0 && i < 2 && j >= 0 && j < 2 : kind <= 2 || random.one_in(3);
      }
    }
  return k;
}

struct Lists {
  int64_t room;
  std::vector<int32_t> entries, counts;
};

Lists lists_of(const Case& k, bool by_filters, int64_t more) {
  const int64_t rows = by_filters ? k.tiles() : k.blocks(), others = by_filters ? k.blocks() : k.tiles();
  std::vector<std::vector<int32_t>> found(rows);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t other = 0; other < others; ++other)
      for (int64_t tap = 0; tap < k.taps(); ++tap)
        if (k.retained[((by_filters ? other : row) * k.tiles() + (by_filters ? row : other)) * k.taps() + tap])
          found[row].push_back(static_cast<int32_t>(other * k.taps() + tap));
  Lists lists{more, {}, {}};
  for (const auto& row : found) lists.room = std::max(lists.room, static_cast<int64_t>(row.size()) + more);
  lists.entries.assign(rows * lists.room + 1, std::numeric_limits<int32_t>::max());
  lists.entries.resize(std::max<int64_t>(rows * lists.room, 1));
  lists.entries.shrink_to_fit();
  for (int64_t row = 0; row < rows; ++row) {
    std::copy(found[row].begin(), found[row].end(), lists.entries.begin() + row * lists.room);
    lists.counts.push_back(static_cast<int32_t>(found[row].size()));
  }
  lists.counts.shrink_to_fit();
  return lists;
}

class Check {
 public:
  Check(uint64_t seed, bool small) : random_(seed), k_(draw(random_, small)), name_(describe(seed)) {}

  bool run() {
    const Case& k = k_;
    const Lists by_filters = lists_of(k, true, random_.of(0, 3)), by_channels = lists_of(k, false, random_.of(0, 3));
    const int64_t numbers[] = {k.half, k.batch, k.in_h, k.in_w, k.out_h, k.out_w, k.kh, k.kw, k.stride_h, k.stride_w,
                               k.top, k.left, k.cin, k.cout, k.filters, k.channels, by_filters.room, by_channels.room};
    const int32_t* l[4] = {by_filters.entries.data(), by_filters.counts.data(), by_channels.entries.data(),
                           by_channels.counts.data()};
    if (k.dense) std::fill(l, l + 4, nullptr);
    Array x(k.half, k.batch * k.in_h * k.in_w * k.cin), w(k.half, k.taps() * k.cin * k.cout);
    Array dy(k.half, k.batch * k.out_h * k.out_w * k.cout), scale(false, k.cout), bias(false, k.cout);
    for (Array* array : {&x, &w, &dy, &scale, &bias})
      for (int64_t i = 0; i < array->count(); ++i)
        array->set(i, static_cast<float>(k.whole ? random_.of(-3, 3) : random_.unit()));
    for (int64_t tap = 0; tap < k.taps(); ++tap)
      for (int64_t c = 0; c < k.cin; ++c)
        for (int64_t f = 0; f < k.cout; ++f)
          if (!k.keeps(tap, c, f)) w.set((tap * k.cin + c) * k.cout + f, kNever[(c + f) % 3]);
    const int64_t lost = random_.one_in(8) ? random_.of(0, x.count() - 1) : -1;
    if (lost >= 0) x.set(lost, kNever[0]);  // must come through, ReLU or not
    const bool relu = random_.one_in(2);
    const Array* scaled = random_.one_in(2) ? &scale : nullptr;
    const Array* shifted = random_.one_in(2) ? &bias : nullptr;
    const float* scales = scaled ? static_cast<float*>(scale.data()) : nullptr;
    const float* biases = shifted ? static_cast<float*>(bias.data()) : nullptr;

    Array y(k.half, dy.count()), dx(k.half, x.count()), dw(false, w.count());
    Array y2(k.half, dy.count()), dx2(k.half, x.count()), dw2(false, w.count());
    bool same = true;
    for (int64_t threads : {1, 2, 3, 8}) {
      const bool first = threads == 1;
      Array &a = first ? y : y2, &b = first ? dx : dx2, &c = first ? dw : dw2;
      for (Array* array : {&a, &b, &c}) array->poison();
      clicktrain_forward(numbers, l[0], l[1], l[2], l[3], x.data(), w.data(), nullptr, scales, biases, relu, a.data(), threads);
      clicktrain_input_gradient(numbers, l[0], l[1], l[2], l[3], dy.data(), w.data(), b.data(), threads);
      clicktrain_weight_gradient(numbers, l[0], l[1], l[2], l[3], x.data(), dy.data(), static_cast<float*>(c.data()), threads);
      same = (first || a.same_bits(y) || wrong("value", threads)) && same;
      same = (first || b.same_bits(dx) || wrong("input gradient", threads)) && same;
      same = (first || c.same_bits(dw) || wrong("weight gradient", threads)) && same;
    }
    // Packed for images of any size it is the same; for these it may be computed otherwise.
    int64_t unsized[18];
    std::copy(numbers, numbers + 18, unsized);
    std::fill(unsized + 1, unsized + 6, 0);
    Array near(k.half, dy.count());
    for (const bool sized : {false, true}) {
      const int64_t* facts = sized ? numbers : unsized;
      void* packed = nullptr;
      if (posix_memalign(&packed, 64, clicktrain_packed_bytes(facts, l[0], l[1], l[2], l[3])) != 0) std::abort();
      clicktrain_pack(facts, l[0], l[1], l[2], l[3], w.data(), packed);
      for (int64_t threads : {1, 2, 3, 8}) {
        Array& found = sized && threads == 1 ? near : y2;
        found.poison();
        clicktrain_forward(numbers, l[0], l[1], l[2], l[3], x.data(), nullptr, packed, scales, biases, relu, found.data(), threads);
        same = (found.same_bits(sized ? near : y) || wrong("value of packed weights", threads)) && same;
      }
      std::free(packed);
    }
    const auto finished = [&](Sum sum, int64_t f) {
      if (scaled) sum.value *= scale.at(f), sum.size *= std::fabs(scale.at(f));
      if (shifted) sum.value += bias.at(f), sum.size += std::fabs(bias.at(f));
      if (relu && sum.value < 0) sum.value = 0;
      return sum;
    };
    // Five outputs ask for each sum, and again where they are compared themselves: it is added up once.
    std::vector<Sum> known(y.count() <= 1 << 20 ? y.count() : 0, Sum{0, 0, -1});
    const auto value_of = [&](int64_t i) {
      if (known.empty()) return value(x, w, i);
      if (known[i].terms < 0) known[i] = value(x, w, i);
      return known[i];
    };
    same = check("value of weights packed for the size", near, [&](int64_t i) {
      // The numbers of a square of outputs come together.
      const int64_t f = i % k.cout, ow = i / k.cout % k.out_w, oh = i / k.cout / k.out_w % k.out_h, n = i / k.cout / k.out_w / k.out_h;
      Sum sum = finished(value_of(i), f);
      for (int64_t row = oh / 2 * 2; row < oh / 2 * 2 + 2; ++row)
        for (int64_t column = ow / 2 * 2; column < ow / 2 * 2 + 2; ++column) {
          const bool is_output = row < k.out_h && column < k.out_w;
          const int64_t at = ((n * k.out_h + row) * k.out_w + column) * k.cout + f;
          const Sum other = finished(is_output ? value_of(at) : value(x, w, n, row, column, f), f);
          if (!std::isnan(other.value)) sum.size += other.size;
          if (std::isnan(other.value) && std::isnan(near.at(i))) sum.value = other.value;
        }
      return sum;
    }) && same;

    return check("value", y, [&](int64_t i) {
      return finished(value_of(i), i % k.cout);
    }) && check("input gradient", dx, [&](int64_t i) { return input_gradient(dy, w, i); }) &&
           check("weight gradient", dw, [&](int64_t i) {
             Sum sum = weight_gradient(x, dy, i);
             // It may be in all of its channel that is retained.
             const bool near = lost >= 0 && lost % k.cin == i / k.cout % k.cin && std::isnan(dw.at(i));
             if (near && k.keeps(i / k.cout / k.cin, lost % k.cin, i % k.cout)) sum.value = kNever[0];
             return sum;
           }) && same;
  }

 private:
  static constexpr float kNever[3] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                                      -std::numeric_limits<float>::infinity()};

  std::string describe(uint64_t seed) const {
    const Case& k = k_;
    char text[400];
    std::snprintf(text, sizeof text,
                  "seed %d: %dx(%d, %d)x%d -> (%d, %d)x%d window (%d, %d) strides (%d, %d) padding (%d, %d) tile (%d, %d)%s%s%s",
                  int(seed), int(k.batch), int(k.in_h), int(k.in_w), int(k.cin), int(k.out_h), int(k.out_w), int(k.cout),
                  int(k.kh), int(k.kw), int(k.stride_h), int(k.stride_w), int(k.top), int(k.left), int(k.filters),
                  int(k.channels), k.half ? " bfloat16" : "", k.dense ? " dense" : "", k.whole ? " integers" : "");
    return text;
  }
  bool wrong(const char* what, int64_t threads) const {
    std::printf("%s: %s has other bits, %d threads\n", name_.c_str(), what, int(threads));
    return false;
  }

  template <class Exact>
  bool check(const char* what, const Array& result, const Exact& exact) {
    const int64_t most = 60000000 / (k_.batch * k_.out_h * k_.out_w * k_.taps() * k_.cin * k_.cout / result.count() + 1);
    const bool all = result.count() <= most;  // else that many, drawn
    for (int64_t n = 0; n < std::min(result.count(), most); ++n) {
      const int64_t i = all ? n : random_.of(0, result.count() - 1);
      const Sum sum = exact(i);
      const double found = result.at(i);
      const bool half = k_.half && result.bytes() == 2 * result.count();
      bool right;
      if (std::isnan(sum.value) || std::isnan(found)) {
        right = std::isnan(sum.value) && std::isnan(found);
      } else if (k_.whole) {
        right = found == (half ? double{of_bf16(to_bf16(sum.value))} : sum.value);
      } else {
        const double bound = 1.2e-7 * (4 + 3 * std::sqrt(double(sum.terms))) * sum.size + (half ? std::fabs(sum.value) / 250 : 0);
        right = std::fabs(found - sum.value) <= bound;
      }
      if (!right) {
        std::printf("%s: %s is %.9g at %d, expected %.9g\n", name_.c_str(), what, found, int(i), sum.value);
        return false;
      }
    }
    return true;
  }

  Sum value(const Array& x, const Array& w, int64_t i) const {
    const Case& k = k_;
    return value(x, w, i / k.cout / k.out_w / k.out_h, i / k.cout / k.out_w % k.out_h, i / k.cout % k.out_w, i % k.cout);
  }
  Sum value(const Array& x, const Array& w, int64_t n, int64_t oh, int64_t ow, int64_t f) const {
    const Case& k = k_;
    Sum sum;
    for (int64_t tap = 0; tap < k.taps(); ++tap) {
      const int64_t h = oh * k.stride_h + tap / k.kw - k.top, v = ow * k.stride_w + tap % k.kw - k.left;
      if (h < 0 || h >= k.in_h || v < 0 || v >= k.in_w) continue;
      for (int64_t c = 0; c < k.cin; ++c)
        if (k.keeps(tap, c, f)) sum.add(x.at(((n * k.in_h + h) * k.in_w + v) * k.cin + c), w.at((tap * k.cin + c) * k.cout + f));
    }
    return sum;
  }
  Sum input_gradient(const Array& dy, const Array& w, int64_t i) const {
    const Case& k = k_;
    const int64_t c = i % k.cin, v = i / k.cin % k.in_w, h = i / k.cin / k.in_w % k.in_h, n = i / k.cin / k.in_w / k.in_h;
    Sum sum;
    for (int64_t tap = 0; tap < k.taps(); ++tap) {
      const int64_t down = h + k.top - tap / k.kw, across = v + k.left - tap % k.kw;
      if (down < 0 || across < 0 || down % k.stride_h || across % k.stride_w) continue;
      const int64_t oh = down / k.stride_h, ow = across / k.stride_w;
      if (oh >= k.out_h || ow >= k.out_w) continue;
      for (int64_t f = 0; f < k.cout; ++f)
        if (k.keeps(tap, c, f)) sum.add(dy.at(((n * k.out_h + oh) * k.out_w + ow) * k.cout + f), w.at((tap * k.cin + c) * k.cout + f));
    }
    return sum;
  }
  Sum weight_gradient(const Array& x, const Array& dy, int64_t i) const {
    const Case& k = k_;
    const int64_t f = i % k.cout, c = i / k.cout % k.cin, tap = i / k.cout / k.cin;
    Sum sum;
    if (!k.keeps(tap, c, f)) return sum;
    for (int64_t n = 0; n < k.batch; ++n)
      for (int64_t oh = 0; oh < k.out_h; ++oh)
        for (int64_t ow = 0; ow < k.out_w; ++ow) {
          const int64_t h = oh * k.stride_h + tap / k.kw - k.top, v = ow * k.stride_w + tap % k.kw - k.left;
          if (h < 0 || h >= k.in_h || v < 0 || v >= k.in_w) continue;
          sum.add(x.at(((n * k.in_h + h) * k.in_w + v) * k.cin + c), dy.at(((n * k.out_h + oh) * k.out_w + ow) * k.cout + f));
        }
    return sum;
  }

  Random random_;
  const Case k_;
  const std::string name_;
};

constexpr float Check::kNever[3];

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s small|large|norms|chains FIRST_SEED HOW_MANY\n", argv[0]);
    return 2;
  }
  const std::string what = argv[1];
  const long first = std::atol(argv[2]), count = std::atol(argv[3]);
  long failed = 0;
  for (long seed = first; seed < first + count; ++seed) {
    const uint64_t drawn = static_cast<uint64_t>(seed);
    if (what == "norms")
      failed += !NormCheck(drawn).run();
    else if (what == "chains")
      failed += !ChainCheck(drawn).run();
    else
      failed += !Check(drawn, what == "small").run();
  }
  std::printf("%s: %ld of %ld %s wrong\n", clicktrain_instruction_set(), failed, count,
              what == "norms" ? "normalisations" : what == "chains" ? "chains" : "convolutions");
  return failed != 0;
}
