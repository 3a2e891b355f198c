// What is drawn for the native kernels, in exactly as many bytes as it takes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

namespace {

// The same numbers everywhere, unlike those of <random>.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ * 0x2545F4914F6CDD1Du >> 16;
  }
  int64_t of(int64_t low, int64_t high) { return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1)); }
  bool one_in(int64_t n) { return of(1, n) == 1; }
  double unit() { return static_cast<double>(next() & 0xFFFFFF) / 0x800000 - 1; }

 private:
  uint64_t state_;
};

float of_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// To the nearest, ties to even, by looking at both neighbours.
uint16_t to_bf16(double value) {
  if (std::isnan(value)) return 0x7FC0;
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  const uint16_t low = static_cast<uint16_t>(bits >> 16), high = static_cast<uint16_t>(low + 1);
  const double below = std::fabs(single - double{of_bf16(low)}), above = std::fabs(double{of_bf16(high)} - single);
  if (below != above) return below < above ? low : high;
  return low & 1 ? high : low;
}

// Numbers in float32 or bfloat16, in exactly as many bytes as they take.
class Array {
 public:
  Array(bool half, int64_t count) : half_(half), count_(count), data_(new char[bytes()]) {}
  bool half() const { return half_; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * (half_ ? 2 : 4); }
  void* data() const { return data_.get(); }
  float at(int64_t i) const {
    if (half_) return of_bf16(reinterpret_cast<uint16_t*>(data_.get())[i]);
    return reinterpret_cast<float*>(data_.get())[i];
  }
  void set(int64_t i, float value) {
    if (half_) {
      reinterpret_cast<uint16_t*>(data_.get())[i] = std::isinf(value) ? (value < 0 ? 0xFF80 : 0x7F80) : to_bf16(value);
    } else {
      reinterpret_cast<float*>(data_.get())[i] = value;
    }
  }
  void poison() {
    for (int64_t i = 0; i < count_; ++i) set(i, std::numeric_limits<float>::quiet_NaN());
  }
  bool same_bits(const Array& other) const { return std::memcmp(data(), other.data(), bytes()) == 0; }

 private:
  bool half_;
  int64_t count_;
  std::unique_ptr<char[]> data_;
};

}  // namespace
