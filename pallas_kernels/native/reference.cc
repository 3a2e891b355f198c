// The meaning of core.h in plain loops: the oracle of the native tests, and what serves until faster kernels do.
#include <cmath>
#include <cstring>
#include <vector>

#include "core.h"

namespace clicktrain {
namespace {

float load(Type type, const void* data, int64_t index) {
  if (type == Type::f32) return static_cast<const float*>(data)[index];
  uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void store(Type type, void* data, int64_t index, float value) {
  if (type == Type::f32) {
    static_cast<float*>(data)[index] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  // To the nearest, ties to even; a NaN stays one.
  bits = std::isnan(value) ? (bits | 0x400000u) : bits + 0x7fffu + ((bits >> 16) & 1u);
  static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(bits >> 16);
}

int64_t blocks_of(const Mask& mask) { return (mask.cin + mask.channels - 1) / mask.channels; }
int64_t tiles_of(const Mask& mask) { return (mask.cout + mask.filters - 1) / mask.filters; }

// For each (block, tap, tile) whether it is retained, at (block * taps + tap) * tiles + tile.
std::vector<uint8_t> table_of(const Mask& mask, int64_t taps) {
  const int64_t tiles = tiles_of(mask);
  std::vector<uint8_t> table(blocks_of(mask) * taps * tiles, mask.by_filters.entries == nullptr);
  if (mask.by_filters.entries != nullptr) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int32_t* row = mask.by_filters.entries + tile * mask.by_filters.room;
      for (int32_t place = 0; place < mask.by_filters.counts[tile]; ++place) table[row[place] * tiles + tile] = 1;
    }
  }
  return table;
}

// Calls visit(tap, channel, filter) for all that is retained, in this order.
template <typename Visit>
void each_retained(const Mask& mask, int64_t taps, const std::vector<uint8_t>& table, Visit visit) {
  const int64_t tiles = tiles_of(mask);
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t channel = 0; channel < mask.cin; ++channel) {
      const uint8_t* row = &table[(channel / mask.channels * taps + tap) * tiles];
      for (int64_t filter = 0; filter < mask.cout; ++filter) {
        if (row[filter / mask.filters]) visit(tap, channel, filter);
      }
    }
  }
}

// Calls visit(in, out) for each pixel of the input that `tap` reads for a pixel of the output, in image `image`.
template <typename Visit>
void each_pixel(const Geometry& g, int64_t image, int64_t tap, Visit visit) {
  for (int64_t row = 0; row < g.out_h; ++row) {
    const int64_t in_row = row * g.stride_h + tap / g.kw - g.pad_top;
    if (in_row < 0 || in_row >= g.in_h) continue;
    for (int64_t column = 0; column < g.out_w; ++column) {
      const int64_t in_column = column * g.stride_w + tap % g.kw - g.pad_left;
      if (in_column < 0 || in_column >= g.in_w) continue;
      visit((image * g.in_h + in_row) * g.in_w + in_column, (image * g.out_h + row) * g.out_w + column);
    }
  }
}

template <typename Function>
void run(Pool& pool, int64_t count, Function function) {
  pool.run(count, [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); }, &function);
}

// Packed: the table, and all weights as float32, zeros where nothing is retained.
int64_t table_bytes(const Mask& mask, int64_t taps) { return blocks_of(mask) * taps * tiles_of(mask); }
int64_t weights_at(const Mask& mask, int64_t taps) { return (table_bytes(mask, taps) + 63) / 64 * 64; }

}  // namespace

int64_t packed_bytes(const Mask& mask, const Geometry& window) {
  const int64_t taps = window.kh * window.kw;
  return weights_at(mask, taps) + taps * mask.cin * mask.cout * static_cast<int64_t>(sizeof(float));
}

void pack(Type type, const Mask& mask, const Geometry& window, const void* w, void* packed) {
  const int64_t taps = window.kh * window.kw;
  std::memset(packed, 0, packed_bytes(mask, window));
  const std::vector<uint8_t> table = table_of(mask, taps);
  std::memcpy(packed, table.data(), table.size());
  float* weights = reinterpret_cast<float*>(static_cast<char*>(packed) + weights_at(mask, taps));
  each_retained(mask, taps, table, [&](int64_t tap, int64_t channel, int64_t filter) {
    const int64_t index = (tap * mask.cin + channel) * mask.cout + filter;
    weights[index] = load(type, w, index);
  });
}

void forward(Type type, const Geometry& g, const Mask& mask, const void* x, const void* w, const void* packed,
             const Epilogue& epilogue, void* y, Pool& pool) {
  const int64_t taps = g.kh * g.kw, pixels = g.out_h * g.out_w;
  std::vector<uint8_t> table;
  if (packed != nullptr) {
    const uint8_t* begin = static_cast<const uint8_t*>(packed);
    table.assign(begin, begin + table_bytes(mask, taps));
    w = begin + weights_at(mask, taps);
  } else {
    table = table_of(mask, taps);
  }
  const Type w_type = packed != nullptr ? Type::f32 : type;
  run(pool, g.batch, [&](int64_t image) {
    std::vector<float> sums(pixels * mask.cout, 0.0f);
    each_retained(mask, taps, table, [&](int64_t tap, int64_t channel, int64_t filter) {
      const float weight = load(w_type, w, (tap * mask.cin + channel) * mask.cout + filter);
      each_pixel(g, image, tap, [&](int64_t in, int64_t out) {
        sums[(out - image * pixels) * mask.cout + filter] += load(type, x, in * mask.cin + channel) * weight;
      });
    });
    for (int64_t index = 0; index < pixels * mask.cout; ++index) {
      float value = sums[index];
      if (epilogue.scale != nullptr) value *= epilogue.scale[index % mask.cout];
      if (epilogue.bias != nullptr) value += epilogue.bias[index % mask.cout];
      if (epilogue.added != nullptr) value += epilogue.added[index];
      if (epilogue.relu && value < 0) value = 0;  // A NaN stays one.
      store(type, y, image * pixels * mask.cout + index, value);
    }
  });
}

void input_gradient(Type type, const Geometry& g, const Mask& mask, const void* dy, const void* w, void* dx,
                    Pool& pool) {
  const int64_t taps = g.kh * g.kw, pixels = g.in_h * g.in_w;
  const std::vector<uint8_t> table = table_of(mask, taps);
  run(pool, g.batch, [&](int64_t image) {
    std::vector<float> sums(pixels * mask.cin, 0.0f);
    each_retained(mask, taps, table, [&](int64_t tap, int64_t channel, int64_t filter) {
      const float weight = load(type, w, (tap * mask.cin + channel) * mask.cout + filter);
      each_pixel(g, image, tap, [&](int64_t in, int64_t out) {
        sums[(in - image * pixels) * mask.cin + channel] += load(type, dy, out * mask.cout + filter) * weight;
      });
    });
    for (int64_t index = 0; index < pixels * mask.cin; ++index) {
      store(type, dx, image * pixels * mask.cin + index, sums[index]);
    }
  });
}

void weight_gradient(Type type, const Geometry& g, const Mask& mask, const void* x, const void* dy, float* dw,
                     Pool& pool) {
  const int64_t taps = g.kh * g.kw;
  const std::vector<uint8_t> table = table_of(mask, taps);
  run(pool, taps, [&](int64_t only) {
    std::memset(dw + only * mask.cin * mask.cout, 0, mask.cin * mask.cout * sizeof(float));
    each_retained(mask, taps, table, [&](int64_t tap, int64_t channel, int64_t filter) {
      if (tap != only) return;
      float sum = 0;
      for (int64_t image = 0; image < g.batch; ++image) {
        each_pixel(g, image, tap, [&](int64_t in, int64_t out) {
          sum += load(type, x, in * mask.cin + channel) * load(type, dy, out * mask.cout + filter);
        });
      }
      dw[(tap * mask.cin + channel) * mask.cout + filter] = sum;
    });
  });
}

bool is_tiled(const Mask&, const Geometry&) { return true; }

bool can_take(const void*, const Geometry&) { return true; }

const char* instruction_set() { return "reference"; }

}  // namespace clicktrain
