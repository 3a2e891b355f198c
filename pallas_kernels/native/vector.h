// Vectors of the instruction set that this file is compiled for, by the compiler's own vector types.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#define CLICKTRAIN_ISA avx512
#define CLICKTRAIN_LANES 16
#define CLICKTRAIN_MOST_VECTORS 4  // of a panel: 4 x 6 sums and 4 weights fit 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
#define CLICKTRAIN_ISA avx2
#define CLICKTRAIN_LANES 8
#define CLICKTRAIN_MOST_VECTORS 2  // 2 x 6 sums and 2 weights fit 16 registers
#elif defined(__ARM_NEON)
#define CLICKTRAIN_ISA neon
#define CLICKTRAIN_LANES 4
#define CLICKTRAIN_MOST_VECTORS 4
#else
#define CLICKTRAIN_ISA portable
#define CLICKTRAIN_LANES 4
#define CLICKTRAIN_MOST_VECTORS 2
#endif

// Before a loop whose turns do not touch what other turns write: the compiler need not ask at every beginning.
#if defined(__clang__)
#define CLICKTRAIN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define CLICKTRAIN_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace clicktrain::CLICKTRAIN_ISA {

constexpr int kLanes = CLICKTRAIN_LANES;
constexpr int kMostVectors = CLICKTRAIN_MOST_VECTORS;

template <int Lanes>
struct VectorOf {
  typedef float type __attribute__((vector_size(4 * Lanes)));
};
template <int Lanes>
using Vec = typename VectorOf<Lanes>::type;

template <int Lanes>
inline __attribute__((always_inline)) Vec<Lanes> load(const float* p) {
  Vec<Lanes> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <int Lanes>
inline __attribute__((always_inline)) void store(float* p, Vec<Lanes> v) {
  std::memcpy(p, &v, sizeof v);
}
template <int Lanes>
inline __attribute__((always_inline)) Vec<Lanes> splat(float s) {
  return s - Vec<Lanes>{};  // one broadcast; the subtraction of zero is folded away
}

// What is negative becomes 0; a NaN stays one.
template <int Lanes>
inline __attribute__((always_inline)) Vec<Lanes> rectified(Vec<Lanes> v) {
  const auto stays = ~(v < Vec<Lanes>{});
  Vec<Lanes> result;
  const auto bits = stays & reinterpret_cast<decltype(stays)>(v);
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float as_float(float value) { return value; }
inline float as_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Exchanges rows and columns of Lanes x Lanes numbers, in log2(Lanes) rounds of exchanges between pairs of rows.
template <int Step, int Lanes, int... J>
inline __attribute__((always_inline)) void transpose_round(Vec<Lanes>* rows, std::integer_sequence<int, J...>) {
#pragma GCC unroll 16
  for (int i = 0; i < Lanes; ++i) {
    if (i & Step) continue;
    const Vec<Lanes> a = rows[i], b = rows[i + Step];
    rows[i] = __builtin_shufflevector(a, b, ((J & Step) ? Lanes + J - Step : J)...);
    rows[i + Step] = __builtin_shufflevector(a, b, ((J & Step) ? Lanes + J : J + Step)...);
  }
}
template <int Lanes>
inline __attribute__((always_inline)) void transpose(Vec<Lanes>* rows) {
  transpose_round<1, Lanes>(rows, std::make_integer_sequence<int, Lanes>());
  if constexpr (Lanes > 2) transpose_round<2, Lanes>(rows, std::make_integer_sequence<int, Lanes>());
  if constexpr (Lanes > 4) transpose_round<4, Lanes>(rows, std::make_integer_sequence<int, Lanes>());
  if constexpr (Lanes > 8) transpose_round<8, Lanes>(rows, std::make_integer_sequence<int, Lanes>());
}

}  // namespace clicktrain::CLICKTRAIN_ISA
