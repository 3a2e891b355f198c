/* Vectors of 4, 8 and 16 floats on whatever the compiler was told to compile for. */
#define NET_INLINE static inline __attribute__((always_inline, unused))
#define NET_ALIGNED __attribute__((aligned(64)))
#define NET_SPARE __attribute__((unused)) /* on a machine with other registers */
/* Weights are read once, one after the other, and are more than the second cache holds. */
#define NET_FETCH(w) __builtin_prefetch((w) + 1024)
#ifdef _OPENMP
#define NET_PARALLEL _Pragma("omp parallel for schedule(static)")
#define NET_PARALLEL_3 _Pragma("omp parallel for collapse(3) schedule(static)")
#else
#define NET_PARALLEL
#define NET_PARALLEL_3
#endif

/* One vector type that the machine has: p is the prefix of its operations, MADD is a + b * c, KEEP is a where the mask's bits
   are set and zero elsewhere. */
#define NET_VECTOR(n, type, p, MADD, KEEP) \
  typedef type v##n; \
  NET_INLINE v##n load##n(const float *x) { return p##_loadu_ps(x); } \
  NET_INLINE void store##n(float *y, v##n a) { p##_storeu_ps(y, a); } \
  NET_INLINE v##n splat##n(float s) { return p##_set1_ps(s); } \
  NET_INLINE v##n madd##n(v##n a, v##n b, v##n c) { return MADD; } \
  NET_INLINE v##n add##n(v##n a, v##n b) { return p##_add_ps(a, b); } \
  NET_INLINE v##n max##n(v##n a, v##n b) { return p##_max_ps(a, b); } \
  NET_INLINE v##n min##n(v##n a, v##n b) { return p##_min_ps(a, b); } \
  NET_INLINE v##n keep##n(v##n a, const uint32_t *mask) { return KEEP; }

/* A vector of n made of two of h. */
#define NET_PAIR(n, h) \
  typedef struct { v##h low, high; } v##n; \
  NET_INLINE v##n load##n(const float *x) { v##n a = {load##h(x), load##h(x + h)}; return a; } \
  NET_INLINE void store##n(float *y, v##n a) { store##h(y, a.low); store##h(y + h, a.high); } \
  NET_INLINE v##n splat##n(float s) { v##n a = {splat##h(s), splat##h(s)}; return a; } \
  NET_INLINE v##n madd##n(v##n a, v##n b, v##n c) { \
    a.low = madd##h(a.low, b.low, c.low); \
    a.high = madd##h(a.high, b.high, c.high); \
    return a; \
  } \
  NET_INLINE v##n add##n(v##n a, v##n b) { v##n c = {add##h(a.low, b.low), add##h(a.high, b.high)}; return c; } \
  NET_INLINE v##n max##n(v##n a, v##n b) { v##n c = {max##h(a.low, b.low), max##h(a.high, b.high)}; return c; } \
  NET_INLINE v##n min##n(v##n a, v##n b) { v##n c = {min##h(a.low, b.low), min##h(a.high, b.high)}; return c; } \
  NET_INLINE v##n keep##n(v##n a, const uint32_t *mask) { \
    v##n c = {keep##h(a.low, mask), keep##h(a.high, mask + h)}; \
    return c; \
  }

#if defined(__x86_64__) || defined(__SSE2__)
#include <immintrin.h>
#if defined(__FMA__)
#define NET_MADD(p) p##_fmadd_ps(b, c, a)
#else
#define NET_MADD(p) p##_add_ps(a, p##_mul_ps(b, c))
#endif
NET_VECTOR(4, __m128, _mm, NET_MADD(_mm), _mm_and_ps(a, _mm_loadu_ps((const float *)mask)))
#if defined(__AVX__)
NET_VECTOR(8, __m256, _mm256, NET_MADD(_mm256), _mm256_and_ps(a, _mm256_loadu_ps((const float *)mask)))
#else
NET_PAIR(8, 4)
#endif
#if defined(__AVX512F__)
NET_VECTOR(16, __m512, _mm512, _mm512_fmadd_ps(b, c, a),
           _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_loadu_si512(mask))))
#define NET_WIDE 1
#else
NET_PAIR(16, 8)
#endif
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
typedef float32x4_t v4;
NET_INLINE v4 load4(const float *x) { return vld1q_f32(x); }
NET_INLINE void store4(float *y, v4 a) { vst1q_f32(y, a); }
NET_INLINE v4 splat4(float s) { return vdupq_n_f32(s); }
NET_INLINE v4 madd4(v4 a, v4 b, v4 c) { return vfmaq_f32(a, b, c); }
NET_INLINE v4 add4(v4 a, v4 b) { return vaddq_f32(a, b); }
NET_INLINE v4 max4(v4 a, v4 b) { return vmaxq_f32(a, b); }
NET_INLINE v4 min4(v4 a, v4 b) { return vminq_f32(a, b); }
NET_INLINE v4 keep4(v4 a, const uint32_t *mask) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vld1q_u32(mask)));
}
NET_PAIR(8, 4)
NET_PAIR(16, 8)
#else
typedef struct { float s[4]; } v4;
NET_INLINE v4 load4(const float *x) { v4 a = {{x[0], x[1], x[2], x[3]}}; return a; }
NET_INLINE void store4(float *y, v4 a) { memcpy(y, a.s, sizeof a.s); }
NET_INLINE v4 splat4(float s) { v4 a = {{s, s, s, s}}; return a; }
#define NET_EACH(expression) for (int i = 0; i < 4; ++i) a.s[i] = expression; return a
NET_INLINE v4 madd4(v4 a, v4 b, v4 c) { NET_EACH(a.s[i] + b.s[i] * c.s[i]); }
NET_INLINE v4 add4(v4 a, v4 b) { NET_EACH(a.s[i] + b.s[i]); }
NET_INLINE v4 max4(v4 a, v4 b) { NET_EACH(a.s[i] > b.s[i] ? a.s[i] : b.s[i]); }
NET_INLINE v4 min4(v4 a, v4 b) { NET_EACH(a.s[i] < b.s[i] ? a.s[i] : b.s[i]); }
NET_INLINE v4 keep4(v4 a, const uint32_t *mask) { NET_EACH(mask[i] ? a.s[i] : 0.0f); }
NET_PAIR(8, 4)
NET_PAIR(16, 8)
#endif

/* Zeros around a map that lies pixel by pixel; row and column in floats. */
NET_INLINE void net_rim(float *y, int height, int row, int above, int below, int left, int right) {
  memset(y, 0, sizeof(float) * (size_t)(above * row + left));
  for (int h = 0; h + 1 < height; ++h)
    memset(y + (size_t)(above + h + 1) * row - right, 0, sizeof(float) * (size_t)(right + left));
  memset(y + (size_t)(above + height) * row - right, 0, sizeof(float) * (size_t)(right + below * row));
}

/* Copies of neighbours' pixels around the pieces of a map that lies in lanes: what stands `from` a pixel that is
   itself `lanes` away, where the bits of the mask are set, zero elsewhere. */
typedef struct { int to, from, mask; } net_copy;
NET_INLINE void net_neighbours(float *y, int channels, int channel, int lanes, const net_copy *copies, int count,
                               const uint32_t *masks) {
  NET_PARALLEL
  for (int c = 0; c < channels; ++c) {
    float *yc = y + (size_t)c * channel;
    for (int k = 0; k < count; ++k) {
      const float *from = yc + copies[k].from;
      const uint32_t *mask = masks + copies[k].mask;
      if (lanes == 16)
        store16(yc + copies[k].to, keep16(load16(from), mask));
      else
        store4(yc + copies[k].to, keep4(load4(from), mask));
    }
  }
}
