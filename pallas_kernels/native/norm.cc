// The functions of norm.h. Every sum is taken over pieces that the shape alone decides, and the pieces' sums in double
// and in order: so no bit depends on the number of threads, and a variance far below the mean's square is right.
#include "norm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "support.h"
#include "vector.h"

namespace clicktrain::CLICKTRAIN_ISA {
namespace {

constexpr int64_t kPiece = 1 << 15;  // numbers: they stay in the second cache while they are read twice
constexpr int64_t kLine = 64;        // numbers at least that one loop runs over

inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) {  // To the nearest, ties to even; a NaN stays one.
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
  *to = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

template <bool kRelu>
inline float rectified(float value) {
  return kRelu && value < 0 ? 0 : value;  // A NaN stays one.
}

// All numbers as lines of several pixels: `width` is a multiple of the channels, and so is the last line's length.
struct Lines {
  int64_t numbers, channels, width, piece;
  Lines(int64_t numbers, int64_t channels)
      : numbers(numbers), channels(channels), width(channels * std::max<int64_t>(1, kLine / channels)),
        piece(width * std::max<int64_t>(1, kPiece / width)) {}
  int64_t pieces() const { return div_up(numbers, piece); }
  int64_t pixels_of(int64_t index) const { return std::min(piece, numbers - index * piece) / channels; }
  // Calls use(first number, how many) for each line of a piece.
  template <class Use>
  void each(int64_t index, const Use& use) const {
    const int64_t end = std::min(numbers, (index + 1) * piece);
    for (int64_t at = index * piece; at < end; at += width) use(at, std::min(width, end - at));
  }
  // One entry a channel, for each pixel of a line.
  std::vector<float> repeated(const std::vector<float>& vector) const {
    std::vector<float> line(width);
    for (int64_t i = 0; i < width; ++i) line[i] = vector[i % channels];
    return line;
  }
  // The sums of a line's numbers, by channel.
  void fold(const float* line, double* sums) const {
    std::fill(sums, sums + channels, 0.0);
    for (int64_t i = 0; i < width; ++i) sums[i % channels] += line[i];
  }
};

// Two sums of each piece and channel.
struct Sums {
  int64_t pieces, channels;
  std::vector<double> numbers;
  Sums(int64_t pieces, int64_t channels) : pieces(pieces), channels(channels), numbers(2 * pieces * channels) {}
  double* first(int64_t piece) { return numbers.data() + 2 * piece * channels; }
  double* second(int64_t piece) { return first(piece) + channels; }
};

// Mean and squared distances from it, of one piece. The second reading has what the first mean was off, too.
template <class T>
void moments(const Lines& lines, int64_t piece, const T* x, double* mean, double* squares) {
  const int64_t pixels = lines.pixels_of(piece);
  std::vector<float> room(3 * lines.width, 0.0f);
  float *const sum = room.data(), *const square = sum + lines.width, *const shift = square + lines.width;
  lines.each(piece, [=](int64_t at, int64_t count) {
    CLICKTRAIN_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) sum[i] += as_float(x[at + i]);
  });
  lines.fold(sum, mean);
  for (int64_t i = 0; i < lines.width; ++i) shift[i] = static_cast<float>(mean[i % lines.channels] / pixels);
  std::fill(sum, sum + lines.width, 0.0f);
  lines.each(piece, [=](int64_t at, int64_t count) {
    CLICKTRAIN_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      const float d = as_float(x[at + i]) - shift[i];
      sum[i] += d;
      square[i] += d * d;
    }
  });
  lines.fold(sum, mean);
  lines.fold(square, squares);
  for (int64_t c = 0; c < lines.channels; ++c) {
    squares[c] = std::max(squares[c] - mean[c] * mean[c] / pixels, 0.0);  // A NaN stays one, as the first argument.
    mean[c] = std::isfinite(shift[c]) ? shift[c] + mean[c] / pixels : shift[c];  // Infinity less itself is no number.
  }
}

template <class T>
void statistics(const Lines& lines, const T* x, float* mean, float* var, Pool& pool) {
  Sums sums(lines.pieces(), lines.channels);
  parallel(pool, sums.pieces, [&](int64_t piece) { moments(lines, piece, x, sums.first(piece), sums.second(piece)); });
  const double pixels = static_cast<double>(lines.numbers / lines.channels);
  for (int64_t c = 0; c < lines.channels; ++c) {
    double total = 0, squares = 0;
    for (int64_t p = 0; p < sums.pieces; ++p) total += sums.first(p)[c] * lines.pixels_of(p);
    total /= pixels;
    for (int64_t p = 0; p < sums.pieces; ++p) {
      const double d = sums.first(p)[c] - total;
      squares += sums.second(p)[c] + d * d * lines.pixels_of(p);
    }
    mean[c] = static_cast<float>(total);
    var[c] = static_cast<float>(squares / pixels);
  }
}

// What is done to each channel: z = (x - mean) * factor + bias.
struct Affine {
  std::vector<float> mean, factor, bias;
  Affine(const Norm& norm, const float* scale, const float* given_bias, const float* given_mean, const float* var)
      : mean(given_mean, given_mean + norm.channels), factor(norm.channels), bias(given_bias, given_bias + norm.channels) {
    for (int64_t c = 0; c < norm.channels; ++c)
      factor[c] = static_cast<float>(scale[c] / std::sqrt(static_cast<double>(var[c]) + norm.epsilon));
  }
  Affine on_lines(const Lines& lines) const {
    Affine wide = *this;
    wide.mean = lines.repeated(mean);
    wide.factor = lines.repeated(factor);
    wide.bias = lines.repeated(bias);
    return wide;
  }
};

// Calls body with compile-time truth values.
template <class Body>
void with(bool first, const Body& body) {
  first ? body(std::true_type()) : body(std::false_type());
}

// Rows of windows, and pieces of them.
struct Windows {
  const Norm& norm;
  int64_t rows, run;
  explicit Windows(const Norm& norm)
      : norm(norm), rows(norm.batch * (norm.height / 2)),
        run(std::max<int64_t>(1, kPiece / (2 * norm.width * norm.channels))) {}
  int64_t pieces() const { return div_up(rows, run); }
  // Calls use(first number of each of the window's two rows, first number of the result) for each window of a piece.
  template <class Use>
  void each(int64_t piece, const Use& use) const {
    const int64_t line = norm.width * norm.channels, end = std::min(rows, (piece + 1) * run);
    for (int64_t row = piece * run; row < end; ++row)
      for (int64_t window = 0; window < norm.width / 2; ++window) {
        const int64_t at = 2 * row * line + 2 * window * norm.channels;
        use(at, at + line, (row * (norm.width / 2) + window) * norm.channels);
      }
  }
};

// The larger of two z, the first of equal ones, its x - mean, and whether it is the second: -1, else 0. A number, as
// compilers make no vectors of truth values that are kept.
struct Larger {
  float z, d;
  int32_t second;
};
inline __attribute__((always_inline)) Larger larger(float z0, float d0, float z1, float d1) {
  return {z1 > z0 ? z1 : z0, z1 > z0 ? d1 : d0, -static_cast<int32_t>(z1 > z0)};
}

// The value where `mask` is -1, zero where it is 0.
inline __attribute__((always_inline)) float only(int32_t mask, float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= mask;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
void forward(const Norm& norm, const T* x, const Affine& affine, const T* added, T* y, Pool& pool) {
  const int64_t channels = norm.channels;
  if (norm.pool) {
    const float *mean = affine.mean.data(), *factor = affine.factor.data(), *bias = affine.bias.data();
    const Windows windows(norm);
    with(norm.relu, [&](auto relu) {
      parallel(pool, windows.pieces(), [&](int64_t piece) {
        windows.each(piece, [=](int64_t upper, int64_t lower, int64_t to) {
          const T *__restrict p = x + upper, *__restrict q = x + lower;
          T* __restrict out = y + to;
          CLICKTRAIN_INDEPENDENT
          for (int64_t c = 0; c < channels; ++c) {
            const auto z = [=](T v) { return (as_float(v) - mean[c]) * factor[c] + bias[c]; };
            const float z0 = z(p[c]), z1 = z(p[c + channels]), z2 = z(q[c]), z3 = z(q[c + channels]);
            const float above = z1 > z0 ? z1 : z0, below = z3 > z2 ? z3 : z2;
            put(out + c, rectified<relu()>(below > above ? below : above));
          }
        });
      });
    });
    return;
  }
  const Lines lines(norm.batch * norm.height * norm.width * channels, channels);
  const Affine wide = affine.on_lines(lines);
  const float *mean = wide.mean.data(), *factor = wide.factor.data(), *bias = wide.bias.data();
  with(norm.relu, [&](auto relu) {
    with(added != nullptr, [&](auto sum) {
      // The last pieces were read last, and may still lie in a cache.
      parallel(pool, lines.pieces(), [&](int64_t index) {
        lines.each(lines.pieces() - 1 - index, [=](int64_t at, int64_t count) {
          const T *__restrict from = x + at, *__restrict more = sum() ? added + at : nullptr;
          T* __restrict to = y + at;
          CLICKTRAIN_INDEPENDENT
          for (int64_t i = 0; i < count; ++i) {
            float z = (as_float(from[i]) - mean[i]) * factor[i] + bias[i];
            if (sum()) z += as_float(more[i]);
            put(to + i, rectified<relu()>(z));
          }
        });
      });
    });
  });
}

// dx = dz * factor + (x - mean) * slope + constant, by channel.
struct Back {
  std::vector<float> slope, constant;
};

// The sums of all pieces, of dz and of dz * (x - mean): the gradients of bias and scale, and what they mean for x's.
Back back(const Norm& norm, Sums& sums, const Affine& affine, const float* var, const float* dmean, const float* dvar,
          float* dscale, float* dbias) {
  Back found{std::vector<float>(norm.channels), std::vector<float>(norm.channels)};
  const double pixels = static_cast<double>(norm.batch * norm.height * norm.width);
  for (int64_t c = 0; c < norm.channels; ++c) {
    double total = 0, product = 0;
    for (int64_t p = 0; p < sums.pieces; ++p) {
      total += sums.first(p)[c];
      product += sums.second(p)[c];
    }
    const double square = static_cast<double>(var[c]) + norm.epsilon, factor = affine.factor[c];
    dbias[c] = static_cast<float>(total);
    dscale[c] = static_cast<float>(product / std::sqrt(square));
    found.slope[c] = static_cast<float>((2.0 * dvar[c] - factor * product / square) / pixels);
    found.constant[c] = static_cast<float>((dmean[c] - factor * total) / pixels);
  }
  return found;
}

template <class T>
void pooled_gradient(const Norm& norm, const T* dy, const float* dmean, const float* dvar, const T* x, const Affine& affine,
                     const float* var, T* dx, float* dscale, float* dbias, Pool& pool) {
  const int64_t channels = norm.channels;
  const Windows windows(norm);
  Sums sums(windows.pieces(), channels);
  const float *mean = affine.mean.data(), *factor = affine.factor.data(), *bias = affine.bias.data();
  const auto larger_of = [=](float d0, float d1, int64_t c) {
    return larger(d0 * factor[c] + bias[c], d0, d1 * factor[c] + bias[c], d1);
  };
  with(norm.relu, [&](auto relu) {
    parallel(pool, sums.pieces, [&](int64_t piece) {
      std::vector<float> room(2 * channels, 0.0f);
      float *const total = room.data(), *const product = total + channels;
      windows.each(piece, [=](int64_t upper, int64_t lower, int64_t at) {
        const T *__restrict p = x + upper, *__restrict q = x + lower, *__restrict g = dy + at;
        float *__restrict to = total, *__restrict to_product = product;
        CLICKTRAIN_INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
          const Larger above = larger_of(as_float(p[c]) - mean[c], as_float(p[c + channels]) - mean[c], c);
          const Larger below = larger_of(as_float(q[c]) - mean[c], as_float(q[c + channels]) - mean[c], c);
          const Larger best = larger(above.z, above.d, below.z, below.d);
          const float given = as_float(g[c]), dz = !relu() || best.z > 0 ? given : 0.0f;
          to[c] += dz;
          to_product[c] += dz * best.d;
        }
      });
      std::copy(room.begin(), room.end(), sums.first(piece));
    });
    const Back found = back(norm, sums, affine, var, dmean, dvar, dscale, dbias);
    const float *slope = found.slope.data(), *constant = found.constant.data();
    parallel(pool, sums.pieces, [&](int64_t index) {
      windows.each(sums.pieces - 1 - index, [=](int64_t upper, int64_t lower, int64_t at) {
        const T *__restrict p = x + upper, *__restrict q = x + lower, *__restrict g = dy + at;
        T *__restrict to = dx + upper, *__restrict to_lower = dx + lower;
        CLICKTRAIN_INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
          const float d0 = as_float(p[c]) - mean[c], d1 = as_float(p[c + channels]) - mean[c];
          const float d2 = as_float(q[c]) - mean[c], d3 = as_float(q[c + channels]) - mean[c];
          const Larger above = larger_of(d0, d1, c), below = larger_of(d2, d3, c);
          const Larger best = larger(above.z, above.d, below.z, below.d);
          const float given = as_float(g[c]), dz = factor[c] * (!relu() || best.z > 0 ? given : 0.0f);
          const float dz_above = only(~best.second, dz), dz_below = only(best.second, dz);
          put(to + c, d0 * slope[c] + constant[c] + only(~above.second, dz_above));
          put(to + c + channels, d1 * slope[c] + constant[c] + only(above.second, dz_above));
          put(to_lower + c, d2 * slope[c] + constant[c] + only(~below.second, dz_below));
          put(to_lower + c + channels, d3 * slope[c] + constant[c] + only(below.second, dz_below));
        }
      });
    });
  });
}

// Where a ReLU lets the gradient through: by its result where something was added before it, else by z again.
enum class Gate { open, by_z, by_y };

template <class T, Gate kGate>
void plain_gradient(const Norm& norm, const T* dy, const float* dmean, const float* dvar, const T* x, const T* y,
                    const Affine& affine, const float* var, T* dx, float* dscale, float* dbias, T* dadded, Pool& pool) {
  const Lines lines(norm.batch * norm.height * norm.width * norm.channels, norm.channels);
  Sums sums(lines.pieces(), lines.channels);
  const Affine wide = affine.on_lines(lines);
  const float *mean = wide.mean.data(), *factor = wide.factor.data(), *bias = wide.bias.data();
  const auto gated = [=](float g, float d, float result, int64_t i) {
    if (kGate == Gate::open) return g;
    return (kGate == Gate::by_y ? result : d * factor[i] + bias[i]) > 0 ? g : 0.0f;
  };
  constexpr bool kReadsY = kGate == Gate::by_y;
  parallel(pool, sums.pieces, [&](int64_t piece) {
    std::vector<float> room(2 * lines.width, 0.0f);
    float *const total = room.data(), *const product = total + lines.width;
    lines.each(piece, [=](int64_t at, int64_t count) {
      const T *__restrict from = x + at, *__restrict g = dy + at, *__restrict result = kReadsY ? y + at : nullptr;
      float *__restrict to = total, *__restrict to_product = product;
      CLICKTRAIN_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) {
        const float d = as_float(from[i]) - mean[i];
        const float dz = gated(as_float(g[i]), d, kReadsY ? as_float(result[i]) : 0, i);
        to[i] += dz;
        to_product[i] += dz * d;
      }
    });
    lines.fold(total, sums.first(piece));
    lines.fold(product, sums.second(piece));
  });
  const Back found = back(norm, sums, affine, var, dmean, dvar, dscale, dbias);
  const std::vector<float> slopes = lines.repeated(found.slope), constants = lines.repeated(found.constant);
  const float *slope = slopes.data(), *constant = constants.data();
  with(dadded != nullptr, [&](auto has_added) {
    parallel(pool, sums.pieces, [&](int64_t index) {
      lines.each(sums.pieces - 1 - index, [=](int64_t at, int64_t count) {
        const T *__restrict from = x + at, *__restrict g = dy + at, *__restrict result = kReadsY ? y + at : nullptr;
        T *__restrict to = dx + at, *__restrict to_added = has_added() ? dadded + at : nullptr;
        CLICKTRAIN_INDEPENDENT
        for (int64_t i = 0; i < count; ++i) {
          const float d = as_float(from[i]) - mean[i];
          const float dz = gated(as_float(g[i]), d, kReadsY ? as_float(result[i]) : 0, i);
          put(to + i, dz * factor[i] + (d * slope[i] + constant[i]));
          if (has_added()) put(to_added + i, dz);
        }
      });
    });
  });
}

template <class T>
void gradient(const Norm& norm, const T* dy, const float* dmean, const float* dvar, const T* x, const T* y,
              const Affine& affine, const float* var, T* dx, float* dscale, float* dbias, T* dadded, Pool& pool) {
  const auto run = [&](auto gate) {
    plain_gradient<T, gate()>(norm, dy, dmean, dvar, x, y, affine, var, dx, dscale, dbias, dadded, pool);
  };
  if (norm.pool)
    pooled_gradient(norm, dy, dmean, dvar, x, affine, var, dx, dscale, dbias, pool);
  else if (!norm.relu)
    run(std::integral_constant<Gate, Gate::open>());
  else if (y != nullptr)
    run(std::integral_constant<Gate, Gate::by_y>());
  else
    run(std::integral_constant<Gate, Gate::by_z>());
}

// Calls body with the images' element type.
template <class Body>
void by_type(Type type, const Body& body) {
  type == Type::f32 ? body(float()) : body(uint16_t());
}

}  // namespace
}  // namespace clicktrain::CLICKTRAIN_ISA

namespace clicktrain {

using namespace CLICKTRAIN_ISA;

void batch_norm(Type type, const Norm& norm, const void* x, const float* scale, const float* bias, const void* added,
                void* y, float* mean, float* var, Pool& pool) {
  by_type(type, [&](auto of) {
    using T = decltype(of);
    const Lines lines(norm.batch * norm.height * norm.width * norm.channels, norm.channels);
    statistics(lines, static_cast<const T*>(x), mean, var, pool);
    forward(norm, static_cast<const T*>(x), Affine(norm, scale, bias, mean, var), static_cast<const T*>(added),
            static_cast<T*>(y), pool);
  });
}

void batch_norm_gradient(Type type, const Norm& norm, const void* dy, const float* dmean, const float* dvar,
                         const void* x, const void* y, const float* scale, const float* bias, const float* mean,
                         const float* var, void* dx, float* dscale, float* dbias, void* dadded, Pool& pool) {
  by_type(type, [&](auto of) {
    using T = decltype(of);
    gradient(norm, static_cast<const T*>(dy), dmean, dvar, static_cast<const T*>(x), static_cast<const T*>(y),
             Affine(norm, scale, bias, mean, var), var, static_cast<T*>(dx), dscale, dbias, static_cast<T*>(dadded), pool);
  });
}

}  // namespace clicktrain
