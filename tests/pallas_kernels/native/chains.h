// Drawn chains of driver.cc: convolutions, pools and sums one after the other. All numbers are small integers, so that
// every sum is exact in float32, whatever its order; in half of the cases they are not, and results are near. Bits are
// the same for any number of threads. What is not retained of weights is NaN or infinite.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "drawn.h"

extern "C" {
int64_t clicktrain_packed_bytes(const int64_t*, const int32_t*, const int32_t*, const int32_t*, const int32_t*);
void clicktrain_pack(const int64_t*, const int32_t*, const int32_t*, const int32_t*, const int32_t*, const void*, void*);
void clicktrain_chain_plain(const int64_t*, const float*, const float* const*, const void* const*, const float* const*,
                            float*, int64_t);
}

namespace {

class ChainCheck {
 public:
  explicit ChainCheck(uint64_t seed) : random_(seed) {
    batch_ = random_.one_in(3) ? random_.of(1, 40) : random_.of(1, 5);
    whole_ = random_.one_in(2);
    // Small: steps whose threads would wait for weights are mixed with others, and groups are of one image; in between,
    // groups of few images, and steps whose groups differ.
    cache_ = random_.one_in(3) ? 64 : random_.one_in(2) ? random_.of(500, 8000) : 1 << 20;
    for (int64_t inputs = random_.of(1, 2); inputs > 0; --inputs) {
      Value x{random_.of(1, 9), random_.of(1, 9), random_.of(1, 6), {}, {}};
      if (!values_.empty() && random_.one_in(2)) x.height = values_[0].height, x.width = values_[0].width, x.channels = values_[0].channels;
      x.exact.resize(batch_ * x.size());
      x.size_of.resize(x.exact.size());
      inputs_.emplace_back(false, batch_ * x.size());
      for (int64_t i = 0; i < inputs_.back().count(); ++i) {
        inputs_.back().set(i, static_cast<float>(whole_ ? random_.of(-2, 2) : random_.unit()));
        x.exact[i] = inputs_.back().at(i), x.size_of[i] = std::fabs(x.exact[i]);
      }
      values_.push_back(std::move(x));
    }
    int64_t convolutions = 0;
    for (int64_t steps = random_.of(1, 7); steps > 0; --steps) {
      const int64_t kind = random_.of(0, 3);
      if (kind == 0 && convolutions < 3) {
        draw_convolution();
        ++convolutions;
      } else if (kind == 3) {
        draw_sum();
      } else {
        draw_pool(kind == 1);
      }
    }
    name_ = "seed " + std::to_string(seed) + ": " + std::to_string(batch_) + " images, " + std::to_string(count()) + " steps";
  }

  bool run() {
    std::vector<int64_t> numbers = {batch_, cache_, static_cast<int64_t>(inputs_.size()), count()};
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const Value& x = values_[i];
      numbers.insert(numbers.end(), {x.height, x.width, x.channels});
    }
    numbers.insert(numbers.end(), steps_.begin(), steps_.end());
    std::vector<const float*> inputs;
    for (const Array& x : inputs_) inputs.push_back(static_cast<const float*>(x.data()));
    std::vector<const void*> packed;
    std::vector<const float*> biases;
    for (int64_t k = 0; k < count(); ++k) {
      packed.push_back(packed_[k].get());
      biases.push_back(biases_[k] ? static_cast<const float*>(biases_[k]->data()) : nullptr);
    }
    const Value& wanted = values_.back();
    Array y(false, batch_ * wanted.size()), y2(false, y.count());
    for (int64_t threads : {1, 2, 3, 8}) {
      Array& found = threads == 1 ? y : y2;
      found.poison();
      clicktrain_chain_plain(numbers.data(), factors_.data(), inputs.data(), packed.data(), biases.data(),
                             static_cast<float*>(found.data()), threads);
      if (threads > 1 && !y2.same_bits(y)) {
        std::printf("%s: other bits, %d threads\n", name_.c_str(), static_cast<int>(threads));
        return false;
      }
    }
    for (int64_t i = 0; i < y.count(); ++i) {
      const double bound = whole_ ? 0 : 2e-5 * wanted.size_of[i];
      if (std::fabs(y.at(i) - wanted.exact[i]) <= bound) continue;
      if (std::isinf(wanted.exact[i]) && y.at(i) == wanted.exact[i]) continue;
      std::printf("%s: %.9g at %d, expected %.9g\n", name_.c_str(), y.at(i), static_cast<int>(i), wanted.exact[i]);
      return false;
    }
    return true;
  }

 private:
  struct Value {
    int64_t height, width, channels;
    std::vector<double> exact, size_of;  // `size_of`: of what was added up
    int64_t size() const { return height * width * channels; }
  };
  int64_t count() const { return static_cast<int64_t>(factors_.size()); }
  // As a rule what was made last.
  int64_t draw_source() {
    const int64_t last = static_cast<int64_t>(values_.size()) - 1;
    return random_.one_in(4) ? random_.of(0, last) : last;
  }
  void add(std::vector<int64_t> numbers, float factor, Value value, bool relu) {
    for (double& each : value.exact)
      if (relu && each < 0) each = 0;
    steps_.insert(steps_.end(), numbers.begin(), numbers.end());
    factors_.push_back(factor);
    values_.push_back(std::move(value));
    if (packed_.size() < factors_.size()) packed_.emplace_back(nullptr, &std::free), biases_.emplace_back();
  }

  struct Window {
    int64_t kh, kw, stride_h, stride_w, top, left, out_h, out_w;
  };
  Window draw_window(const Value& in) {
    for (;;) {
      Window w{random_.of(1, 3), random_.of(1, 3), random_.of(1, 2), random_.of(1, 2), 0, 0, 0, 0};
      w.top = random_.of(0, w.kh - 1), w.left = random_.of(0, w.kw - 1);
      const int64_t high = in.height + w.top + random_.of(0, w.kh - 1) - w.kh;
      const int64_t wide = in.width + w.left + random_.of(0, w.kw - 1) - w.kw;
      if (high < 0 || wide < 0) continue;
      w.out_h = high / w.stride_h + 1, w.out_w = wide / w.stride_w + 1;
      return w;
    }
  }
  // Calls use(image, place in the input, tap, pixel of the output) for all that a window reads.
  template <class Use>
  void each(const Value& in, const Window& w, const Use& use) const {
    for (int64_t n = 0; n < batch_; ++n)
      for (int64_t pixel = 0; pixel < w.out_h * w.out_w; ++pixel)
        for (int64_t tap = 0; tap < w.kh * w.kw; ++tap) {
          const int64_t h = pixel / w.out_w * w.stride_h + tap / w.kw - w.top;
          const int64_t v = pixel % w.out_w * w.stride_w + tap % w.kw - w.left;
          if (h < 0 || h >= in.height || v < 0 || v >= in.width) continue;
          use(((n * in.height + h) * in.width + v) * in.channels, tap, n * w.out_h * w.out_w + pixel);
        }
  }

  void draw_convolution() {
    const int64_t source = draw_source();
    const Value& in = values_[source];
    const Window w = draw_window(in);
    const int64_t sizes[] = {1, 8, 16, 64}, taps = w.kh * w.kw, cin = in.channels;
    int64_t cout = random_.one_in(2) ? random_.of(1, 6) : random_.of(7, 40);
    for (const Value& each : values_)
      if (each.height == w.out_h && each.width == w.out_w && random_.one_in(2)) cout = each.channels;
    const int64_t filters = std::min(sizes[random_.of(0, 3)], cout), tiles = (cout + filters - 1) / filters;
    std::vector<int32_t> entries(tiles * cin * taps, std::numeric_limits<int32_t>::max()), counts(tiles, 0);
    std::vector<bool> kept(tiles * cin * taps);
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t i = 0; i < cin * taps; ++i)
        if ((kept[tile * cin * taps + i] = !random_.one_in(3))) entries[tile * cin * taps + counts[tile]++] = static_cast<int32_t>(i);
    Array weights(false, std::max<int64_t>(taps * cin * cout, 1));
    const float never[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
    for (int64_t i = 0; i < weights.count(); ++i) {
      const int64_t f = i % cout, c = i / cout % cin, tap = i / cout / cin;
      const bool is_kept = kept[(f / filters * cin + c) * taps + tap];
      weights.set(i, !is_kept ? never[i % 2] : static_cast<float>(whole_ ? random_.of(-1, 1) : random_.unit()));
    }
    const bool has_bias = random_.one_in(2), relu = random_.one_in(2);
    std::unique_ptr<Array> bias;
    if (has_bias) bias = std::make_unique<Array>(false, cout);
    for (int64_t f = 0; has_bias && f < cout; ++f) bias->set(f, static_cast<float>(whole_ ? random_.of(-3, 3) : random_.unit()));
    const int64_t facts[] = {0, 0, 0, 0, 0, 0, w.kh, w.kw, 0, 0, 0, 0, cin, cout, filters, 1, cin * taps, 0};
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, clicktrain_packed_bytes(facts, entries.data(), counts.data(), nullptr, nullptr)) != 0) std::abort();
    clicktrain_pack(facts, entries.data(), counts.data(), nullptr, nullptr, weights.data(), memory);
    packed_.emplace_back(memory, &std::free);

    Value out{w.out_h, w.out_w, cout, {}, {}};
    out.exact.assign(batch_ * out.size(), 0), out.size_of = out.exact;
    each(in, w, [&](int64_t place, int64_t tap, int64_t pixel) {
      for (int64_t c = 0; c < cin; ++c)
        for (int64_t f = 0; f < cout; ++f)
          if (kept[(f / filters * cin + c) * taps + tap]) {
            const double weight = weights.at((tap * cin + c) * cout + f);
            out.exact[pixel * cout + f] += in.exact[place + c] * weight;
            out.size_of[pixel * cout + f] += in.size_of[place + c] * std::fabs(weight);
          }
    });
    for (size_t i = 0; has_bias && i < out.exact.size(); ++i) out.exact[i] += bias->at(i % cout), out.size_of[i] += 1;
    biases_.push_back(std::move(bias));
    const int64_t second = find_like(out, -1);
    if (second >= 0) add_up(out, values_[second]);
    add({0, source, second, out.height, out.width, cout, w.kh, w.kw, w.stride_h, w.stride_w, w.top, w.left, relu, filters, 1, 0, 0},
        1, std::move(out), relu);
  }

  void draw_pool(bool is_max) {
    const int64_t source = draw_source();
    const Value& in = values_[source];
    const Window w = draw_window(in);
    const bool relu = random_.one_in(4);
    const float factor = random_.one_in(2) ? 1.0f : 0.5f;
    Value out{w.out_h, w.out_w, in.channels, {}, {}};
    out.exact.assign(batch_ * out.size(), is_max ? -std::numeric_limits<double>::infinity() : 0);
    out.size_of.assign(out.exact.size(), 0);
    each(in, w, [&](int64_t place, int64_t, int64_t pixel) {
      for (int64_t c = 0; c < in.channels; ++c) {
        double &to = out.exact[pixel * in.channels + c], &size = out.size_of[pixel * in.channels + c];
        to = is_max ? std::max(to, in.exact[place + c]) : to + in.exact[place + c] * factor;
        size = is_max ? std::max(size, in.size_of[place + c]) : size + in.size_of[place + c] * factor;
      }
    });
    add({is_max ? 1 : 2, source, -1, out.height, out.width, out.channels, w.kh, w.kw, w.stride_h, w.stride_w, w.top, w.left,
         relu, 0, 0, 0, 0}, factor, std::move(out), relu);
  }

  // A value of such a shape, or the one that is given.
  int64_t find_like(const Value& a, int64_t otherwise) {
    for (int64_t i = 0; i < static_cast<int64_t>(values_.size()); ++i) {
      const Value& b = values_[i];
      if (b.height == a.height && b.width == a.width && b.channels == a.channels && random_.one_in(2)) otherwise = i;
    }
    return otherwise;
  }
  static void add_up(Value& to, const Value& other) {
    for (size_t i = 0; i < to.exact.size(); ++i) to.exact[i] += other.exact[i], to.size_of[i] += other.size_of[i];
  }

  // Of a value and one of its shape, or itself.
  void draw_sum() {
    const int64_t source = draw_source();
    const Value& a = values_[source];
    const int64_t second = find_like(a, source);
    const bool relu = random_.one_in(2);
    Value out{a.height, a.width, a.channels, a.exact, a.size_of};
    add_up(out, values_[second]);
    add({3, source, second, a.height, a.width, a.channels, 0, 0, 0, 0, 0, 0, relu, 0, 0, 0, 0}, 1, std::move(out), relu);
  }

  Random random_;
  int64_t batch_, cache_;
  bool whole_;
  std::vector<Array> inputs_;
  std::vector<Value> values_;
  std::vector<int64_t> steps_;
  std::vector<float> factors_;
  std::vector<std::unique_ptr<void, decltype(&std::free)>> packed_;
  std::vector<std::unique_ptr<Array>> biases_;
  std::string name_;
};

}  // namespace
