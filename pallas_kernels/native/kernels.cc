// The functions of core.h, for the instruction set that the library is compiled for.
#include "few_pixels.h"
#include "lane_gradient.h"
#include "lanes.h"
#include <algorithm>
#include <cstring>
#include "tile_gradient.h"
#include "tiles.h"
#include "winograd.h"

namespace clicktrain::CLICKTRAIN_ISA {
namespace {

// From so many outputs that share a list on, they lie side by side in vectors.
constexpr int64_t kLeastWidth = 8;

// Tiles keep taps as bits of a number.
constexpr int64_t kMostTaps = 63;

bool is_tiled(const Grouped& grouped) {
  return grouped.width >= std::min<int64_t>(kLeastWidth, grouped.outputs) && grouped.outputs >= 4 &&
         grouped.taps() <= kMostTaps;
}

// A kernel's or an image's numbers in float32, where they are not already.
class Wide {
 public:
  Wide(Type type, const void* data, int64_t count, Pool& pool) : memory_(type == Type::f32 ? 0 : 4 * count) {
    if (type == Type::f32) {
      data_ = static_cast<const float*>(data);
      return;
    }
    float* to = memory_.as<float>();
    constexpr int64_t kRun = 1 << 16;
    parallel(pool, div_up(count, kRun), [&](int64_t run) {
      widen(static_cast<const uint16_t*>(data) + run * kRun, to + run * kRun, std::min(kRun, count - run * kRun));
    });
    data_ = to;
  }
  const float* get() const { return data_; }

 private:
  Scratch memory_;
  const float* data_;
};

// A result in float32 that becomes bfloat16 at the end, where that is asked for.
class Result {
 public:
  Result(Type type, void* data, int64_t count) : type_(type), data_(data), count_(count), memory_(type == Type::f32 ? 0 : 4 * count) {}
  float* get() const { return type_ == Type::f32 ? static_cast<float*>(data_) : memory_.as<float>(); }
  void finish(Pool& pool) const {
    if (type_ == Type::f32) return;
    constexpr int64_t kRun = 1 << 16;
    parallel(pool, div_up(count_, kRun), [&](int64_t run) {
      narrow(get() + run * kRun, static_cast<uint16_t*>(data_) + run * kRun, std::min(kRun, count_ - run * kRun));
    });
  }

 private:
  Type type_;
  void* data_;
  int64_t count_;
  Scratch memory_;
};

class OneThread : public Pool {
 public:
  int64_t threads() const override { return 1; }
  void run(int64_t count, void (*task)(void*, int64_t), void* context) override {
    for (int64_t i = 0; i < count; ++i) task(context, i);
  }
};

template <class Weights>
void fill(Weights& weights, const Grouped& grouped, Type type, const void* w, const WeightPlace& place, Pool& pool) {
  parallel(pool, weights.groups, [&](int64_t group) { weights.fill_lists(grouped, group); });
  parallel(pool, weights.tasks(), [&](int64_t index) {
    if (type == Type::f32)
      weights.fill_task(static_cast<const float*>(w), place, index);
    else
      weights.fill_task(static_cast<const uint16_t*>(w), place, index);
  });
}

// Packed weights begin with how they are laid out and what their lists' lengths are: the mask's own lists are not read
// again.
enum Form : int64_t { in_lanes = 0, in_tiles = 1, by_winograd = 2 };
Form form_of(const Grouped& grouped, const Geometry& window) {
  return !is_tiled(grouped) ? in_lanes : WinogradWeights::fits(grouped, window) ? by_winograd : in_tiles;
}
constexpr int64_t kFormBytes = 64;
int64_t counts_bytes(const Grouped& grouped) { return kFormBytes + round_up(8 * grouped.groups(), 64); }
const int64_t* counts_at(const void* packed) {
  return reinterpret_cast<const int64_t*>(static_cast<const char*>(packed) + kFormBytes);
}

template <class Weights, class Compute>
void multiplied(const Product& product, const Grouped& grouped, Type type, const float* x, const void* w,
                const WeightPlace& place, const void* packed, const Epilogue& epilogue, float* y, Pool& pool) {
  if (packed != nullptr) {
    const char* at = static_cast<const char*>(packed);
    Weights weights(grouped, counts_at(packed));
    weights.place(const_cast<char*>(at + counts_bytes(grouped)));
    Compute(product, weights, x, epilogue).run(y, pool);
    return;
  }
  Weights weights(grouped, grouped.counts().data());
  Scratch memory(weights.bytes());
  weights.place(memory.as<void>());
  fill(weights, grouped, type, w, place, pool);
  Compute(product, weights, x, epilogue).run(y, pool);
}

void product_of(const Product& product, const Grouped& grouped, Type type, const void* x, const void* w,
                const WeightPlace& place, const void* packed, const Epilogue& epilogue, void* y, Pool& pool) {
  const Wide images(type, x, product.batch * product.rows.in * product.columns.in * product.inputs, pool);
  const Result result(type, y, product.batch * product.rows.out * product.columns.out * product.outputs);
  if (packed != nullptr && *static_cast<const int64_t*>(packed) == by_winograd)
    multiplied<WinogradWeights, WinogradProduct>(product, grouped, type, images.get(), w, place, packed, epilogue, result.get(), pool);
  else if (is_tiled(grouped))
    multiplied<TileWeights, TileProduct>(product, grouped, type, images.get(), w, place, packed, epilogue, result.get(), pool);
  else if (FewPixels::fits(product))
    multiplied<LaneWeights, FewPixels>(product, grouped, type, images.get(), w, place, packed, epilogue, result.get(), pool);
  else
    multiplied<LaneWeights, LaneProduct>(product, grouped, type, images.get(), w, place, packed, epilogue, result.get(), pool);
  result.finish(pool);
}

}  // namespace
}  // namespace clicktrain::CLICKTRAIN_ISA

namespace clicktrain {

using namespace CLICKTRAIN_ISA;

bool is_tiled(const Mask& mask, const Geometry& window) { return is_tiled(by_filters(mask, window)); }

namespace {

// Calls use(weights to be filled) with those of the form that the weights of a forward pass are packed in.
template <class Use>
void in_form(Form form, const Grouped& grouped, const int64_t* counts, const Use& use) {
  if (form == by_winograd)
    use(WinogradWeights(grouped, counts));
  else if (form == in_tiles)
    use(TileWeights(grouped, counts));
  else
    use(LaneWeights(grouped, counts));
}

}  // namespace

int64_t packed_bytes(const Mask& mask, const Geometry& window) {
  const Grouped grouped = by_filters(mask, window);
  int64_t bytes = counts_bytes(grouped);
  in_form(form_of(grouped, window), grouped, grouped.counts().data(), [&](const auto& weights) { bytes += weights.bytes(); });
  return bytes;
}

void pack(Type type, const Mask& mask, const Geometry& window, const void* w, void* packed) {
  const Grouped grouped = by_filters(mask, window);
  const WeightPlace place{mask.cin * mask.cout, mask.cout, 1, mask.cin};
  const std::vector<int64_t> counts = grouped.counts();
  const Form form = form_of(grouped, window);
  OneThread pool;
  std::memset(packed, 0, kFormBytes);
  *static_cast<int64_t*>(packed) = form;
  std::copy(counts.begin(), counts.end(), const_cast<int64_t*>(counts_at(packed)));
  in_form(form, grouped, counts.data(), [&](auto weights) {
    weights.place(static_cast<char*>(packed) + counts_bytes(grouped));
    fill(weights, grouped, type, w, place, pool);
  });
}

bool can_take(const void* packed, const Geometry& g) {
  return *static_cast<const int64_t*>(packed) != by_winograd || (g.stride_h == 1 && g.stride_w == 1);
}

void forward(Type type, const Geometry& g, const Mask& mask, const void* x, const void* w, const void* packed,
             const Epilogue& epilogue, void* y, Pool& pool) {
  product_of(forward_product(g, mask), by_filters(mask, g), type, x, w, {mask.cin * mask.cout, mask.cout, 1, mask.cin},
             packed, epilogue, y, pool);
}

void input_gradient(Type type, const Geometry& g, const Mask& mask, const void* dy, const void* w, void* dx, Pool& pool) {
  product_of(gradient_product(g, mask), by_channels(mask, g), type, dy, w, {mask.cin * mask.cout, 1, mask.cout, mask.cout},
             nullptr, {nullptr, nullptr, false}, dx, pool);
}

void weight_gradient(Type type, const Geometry& g, const Mask& mask, const void* x, const void* dy, float* dw, Pool& pool) {
  const Wide images(type, x, g.batch * g.in_h * g.in_w * mask.cin, pool);
  const Wide slopes(type, dy, g.batch * g.out_h * g.out_w * mask.cout, pool);
  const Grouped grouped = by_filters(mask, g);
  const Product product = forward_product(g, mask);
  if (is_tiled(grouped)) {
    constexpr int64_t kRun = 1 << 18;
    const int64_t size = g.kh * g.kw * mask.cin * mask.cout;
    if (grouped.lists.entries != nullptr)
      parallel(pool, div_up(size, kRun), [&](int64_t run) {
        std::memset(dw + run * kRun, 0, 4 * std::min(kRun, size - run * kRun));
      });
    tile_weight_gradient(product, grouped, images.get(), slopes.get(), dw, pool);
  } else {
    lane_weight_gradient(product, grouped, images.get(), slopes.get(), dw, pool);
  }
}

const char* instruction_set() {
#define CLICKTRAIN_NAME_(isa) #isa
#define CLICKTRAIN_NAME(isa) CLICKTRAIN_NAME_(isa)
  return CLICKTRAIN_NAME(CLICKTRAIN_ISA);
}

}  // namespace clicktrain
