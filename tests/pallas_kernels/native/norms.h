// Drawn normalisations of driver.cc. Statistics and values are compared with those of the images in double precision,
// gradients with those of the mean and variance that the kernel is given. Where two numbers that decide something, a
// ReLU or a maximum, are nearer than their rounding, either decision is right, and the bounds say so.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "drawn.h"

extern "C" {
void clicktrain_batch_norm_plain(const int64_t*, float, const void*, const float*, const float*, const void*, void*, float*,
                                 float*, int64_t);
void clicktrain_batch_norm_gradient_plain(const int64_t*, float, const void*, const float*, const float*, const void*,
                                          const void*, const float*, const float*, const float*, const float*, void*,
                                          float*, float*, void*, int64_t);
}

namespace {

class NormCheck {
 public:
  explicit NormCheck(uint64_t seed) : random_(seed) {
    const bool large = random_.one_in(12), wide = random_.one_in(30);
    const int64_t most = large ? 60 : 12;
    batch_ = random_.one_in(4) ? random_.of(1, 40) : random_.of(1, 4);
    height_ = random_.of(1, most), width_ = random_.of(1, most);
    channels_ = random_.one_in(3) ? random_.of(1, 150) : random_.one_in(3) ? 64 : random_.of(1, 20);
    if (large) batch_ = random_.of(1, 3), channels_ = random_.of(1, 40);
    // More channels than a piece has numbers.
    if (wide) batch_ = 1, height_ = random_.of(1, 2), width_ = random_.of(1, 2), channels_ = random_.of(32000, 34000);
    half_ = random_.one_in(2), relu_ = random_.one_in(2), pool_ = random_.one_in(2);
    if (pool_) height_ += height_ % 2, width_ += width_ % 2;
    added_ = !pool_ && random_.one_in(2);
    kind_ = random_.of(0, 2);
    char text[200];
    std::snprintf(text, sizeof text, "seed %d: %dx(%d, %d)x%d%s%s%s%s%s", int(seed), int(batch_), int(height_), int(width_),
                  int(channels_), half_ ? " bfloat16" : "", relu_ ? " relu" : "", pool_ ? " pool" : "",
                  added_ ? " added" : "", kind_ == 0 ? " integers" : kind_ == 1 ? "" : " far from zero");
    name_ = text;
  }

  bool run() {
    const int64_t numbers[] = {half_, batch_, height_, width_, channels_, relu_, pool_};
    const int64_t count = batch_ * height_ * width_ * channels_, results = pool_ ? count / 4 : count;
    Array x(half_, count), added(half_, added_ ? count : 0), dy(half_, results);
    Array scale(false, channels_), bias(false, channels_), dmean(false, channels_), dvar(false, channels_);
    for (int64_t i = 0; i < count; ++i)
      x.set(i, static_cast<float>(kind_ == 0 ? random_.of(-3, 3) : kind_ == 1 ? random_.unit() : 3000 + 0.1 * random_.unit()));
    for (Array* array : {&added, &dy, &scale, &bias, &dmean, &dvar})
      for (int64_t i = 0; i < array->count(); ++i) array->set(i, static_cast<float>(random_.unit()));
    for (int64_t c = 0; c < channels_; ++c)
      if (random_.one_in(6)) scale.set(c, 0), bias.set(c, random_.one_in(2) ? 0 : tie());
    const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
    const float never[] = {nan, inf, -inf};
    if (random_.one_in(8)) {  // As it is rounded, its digits must not run over.
      const uint32_t ones = 0x7FFFFFFF;
      std::memcpy(floats(bias) + random_.of(0, channels_ - 1), &ones, 4);
    }
    if (random_.one_in(5)) x.set(random_.of(0, count - 1), never[random_.of(0, 2)]);
    if (added_ && random_.one_in(5)) added.set(random_.of(0, count - 1), never[random_.of(0, 2)]);
    if (random_.one_in(8)) dy.set(random_.of(0, results - 1), nan);

    Array y(half_, results), mean(false, channels_), var(false, channels_);
    Array dx(half_, count), dscale(false, channels_), dbias(false, channels_), dadded(half_, added.count());
    Array* const outputs[] = {&y, &mean, &var, &dx, &dscale, &dbias, &dadded};
    std::vector<Array> kept;
    for (const Array* output : outputs) kept.emplace_back(output->half(), output->count());
    bool same = true;
    for (int64_t threads : {1, 2, 3, 8}) {
      for (Array* output : outputs) output->poison();
      clicktrain_batch_norm_plain(numbers, kEpsilon, x.data(), floats(scale), floats(bias), added_ ? added.data() : nullptr,
                                  y.data(), floats(mean), floats(var), threads);
      clicktrain_batch_norm_gradient_plain(numbers, kEpsilon, dy.data(), floats(dmean), floats(dvar), x.data(),
                                           added_ ? y.data() : nullptr, floats(scale), floats(bias), floats(mean),
                                           floats(var), dx.data(), floats(dscale), floats(dbias),
                                           added_ ? dadded.data() : nullptr, threads);
      for (int64_t i = 0; i < 7; ++i) {
        if (threads == 1) std::memcpy(kept[i].data(), outputs[i]->data(), kept[i].bytes());
        if (outputs[i]->same_bits(kept[i])) continue;
        std::printf("%s: output %d has other bits, %d threads\n", name_.c_str(), int(i), int(threads));
        same = false;
      }
    }
    bool right = true;
    for (int64_t c = 0; c < channels_; ++c) {
      right = values(c, x, added, scale.at(c), bias.at(c), y, mean.at(c), var.at(c)) && right;
      right = gradients(c, x, dy, y, scale.at(c), bias.at(c), mean.at(c), var.at(c), dmean.at(c), dvar.at(c), dx, dadded,
                        dscale.at(c), dbias.at(c)) && right;
    }
    return right && same;
  }

 private:
  static constexpr float kEpsilon = 1e-5f;
  static float* floats(const Array& array) { return static_cast<float*>(array.data()); }

  int64_t pixels() const { return batch_ * height_ * width_; }
  // The pixels that the result's number is of: four, or one.
  std::vector<int64_t> sources(int64_t result) const {
    if (!pool_) return {result};
    const int64_t columns = width_ / 2, row = result / columns, column = result % columns;
    const int64_t first = 2 * row * width_ + 2 * column;
    return {first, first + 1, first + width_, first + width_ + 1};
  }
  int64_t results() const { return pool_ ? pixels() / 4 : pixels(); }

  bool near(const char* what, int64_t c, int64_t i, double found, double exact, double bound) {
    const bool equal = found == exact || (std::isnan(found) && std::isnan(exact));
    if (equal || std::fabs(found - exact) <= bound) return true;
    std::printf("%s: %s of channel %d is %.9g at pixel %d, expected %.9g within %.3g\n", name_.c_str(), what, int(c), found,
                int(i), exact, bound);
    return false;
  }
  // Half between two bfloat16.
  float tie() { return static_cast<float>((random_.one_in(2) ? 1 : -1) * (257 + 2 * random_.of(0, 127)) / 256.0); }
  double rounding(double value) const { return half_ ? std::fabs(value) / 250 : 0; }

  bool values(int64_t c, const Array& x, const Array& added, double scale, double bias, const Array& y, double mean, double var) {
    const double n = static_cast<double>(pixels());
    double exact_mean = 0, exact_var = 0;
    for (int64_t p = 0; p < pixels(); ++p) exact_mean += x.at(p * channels_ + c) / n;
    for (int64_t p = 0; p < pixels(); ++p) {
      const double d = x.at(p * channels_ + c) - exact_mean;
      exact_var += d * d / n;
    }
    const double off_mean = 1.2e-7 * std::fabs(exact_mean) + 1e-6 * std::sqrt(exact_var);
    // A sum of a thousand squares, each rounded the same way.
    const double off_var = 6e-5 * exact_var + 1e-13 * exact_mean * exact_mean;
    if (!near("mean", c, 0, mean, exact_mean, off_mean) || !near("variance", c, 0, var, exact_var, off_var)) return false;
    const double square = exact_var + kEpsilon, factor = scale / std::sqrt(square);
    for (int64_t r = 0; r < results(); ++r) {
      double exact = 0, size = 0;
      bool first = true;
      for (int64_t p : sources(r)) {
        const double z = (x.at(p * channels_ + c) - exact_mean) * factor, more = added_ ? added.at(p * channels_ + c) : 0.0;
        size = std::max(size, std::fabs(z) * (1 + off_var / square * 1e6) + std::fabs(bias) + std::fabs(more));
        const double sum = z + bias + more;
        exact = first || sum > exact ? sum : exact;
        first = false;
      }
      if (relu_ && exact < 0) exact = 0;
      // Nothing but the bias is rounded, and to even.
      if (scale == 0 && !added_ && half_ && !near("value of the bias", c, r, y.at(r * channels_ + c), of_bf16(to_bf16(exact)), 0))
        return false;
      const double bound = 1e-6 * size + std::fabs(factor) * off_mean + rounding(exact);
      if (!near("value", c, r, y.at(r * channels_ + c), exact, bound)) return false;
    }
    return true;
  }

  bool gradients(int64_t c, const Array& x, const Array& dy, const Array& y, double scale, double bias, double mean,
                 double var, double dmean, double dvar, const Array& dx, const Array& dadded, double dscale, double dbias) {
    const double n = static_cast<double>(pixels()), square = var + kEpsilon, factor = scale / std::sqrt(square);
    std::vector<double> dz(pixels(), 0.0), d(pixels()), doubt(pixels(), 0.0);
    for (int64_t p = 0; p < pixels(); ++p) d[p] = x.at(p * channels_ + c) - mean;
    for (int64_t r = 0; r < results(); ++r) {
      const std::vector<int64_t> from = sources(r);
      const double given = dy.at(r * channels_ + c);
      int64_t best = from[0];
      for (int64_t p : from)
        if (d[p] * factor + bias > d[best] * factor + bias) best = p;
      const double z = d[best] * factor, off = scale == 0 ? 0 : 3e-7 * (std::fabs(z) + std::fabs(bias));
      const bool open = !relu_ || (added_ ? y.at(r * channels_ + c) : z + bias) > 0;
      if (open) dz[best] = given;
      const bool may_be_either = relu_ && !added_ && std::fabs(z + bias) < off;
      if (may_be_either) doubt[best] = std::fabs(given);
      for (int64_t p : from)
        if ((open || may_be_either) && d[p] != d[best] && z - d[p] * factor < off) doubt[p] = doubt[best] = std::fabs(given);
    }
    double total = 0, product = 0, off_total = 0, off_product = 0;
    const double terms = 1.2e-7 * (4 + 3 * std::sqrt(n));
    for (int64_t p = 0; p < pixels(); ++p) {
      total += dz[p], product += dz[p] * d[p];
      off_total += doubt[p] + terms * std::fabs(dz[p]);
      off_product += (doubt[p] + terms * std::fabs(dz[p])) * std::fabs(d[p]);
    }
    const double root = std::sqrt(square), by_product = std::fabs(factor) / square;
    if (!near("gradient of bias", c, 0, dbias, total, off_total + 1e-7 * std::fabs(total))) return false;
    if (!near("gradient of scale", c, 0, dscale, product / root, (off_product + 1e-7 * std::fabs(product)) / root)) return false;
    const double slope = (2 * dvar - factor / square * product) / n, constant = (dmean - factor * total) / n;
    const double off_slope = (by_product * (off_product + 1e-6 * std::fabs(product)) + 1e-6 * std::fabs(2 * dvar)) / n;
    const double off_constant = (std::fabs(factor) * (off_total + 1e-6 * std::fabs(total)) + 1e-6 * std::fabs(dmean)) / n;
    for (int64_t p = 0; p < pixels(); ++p) {
      const double exact = dz[p] * factor + d[p] * slope + constant;
      const double size = std::fabs(dz[p] * factor) + std::fabs(d[p] * slope) + std::fabs(constant);
      const double bound = 1e-6 * size + doubt[p] * std::fabs(factor) + std::fabs(d[p]) * off_slope + off_constant;
      if (!near("gradient", c, p, dx.at(p * channels_ + c), exact, bound + rounding(exact))) return false;
      if (added_ && !near("gradient of what was added", c, p, dadded.at(p * channels_ + c), dz[p], 0)) return false;
    }
    return true;
  }

  Random random_;
  int64_t batch_, height_, width_, channels_, kind_;
  bool half_, relu_, pool_, added_;
  std::string name_;
};

constexpr float NormCheck::kEpsilon;

}  // namespace
