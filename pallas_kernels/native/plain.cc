// The kernels as plain C functions, without jax: packing on the host (ctypes), tests, sanitizers.
//
// `numbers` holds, as int64: type, batch, in_h, in_w, out_h, out_w, kh, kw, stride_h, stride_w, pad_top, pad_left, cin,
// cout, filters, channels, room of by_filters, room of by_channels. Null lists are a dense convolution.
// Packed weights begin with 64 bytes that say what they are of, so that others are refused (plain.h).
#include "plain.h"

#include <cstring>

#include "chain.h"
#include "norm.h"
#include "pool.h"

#if defined(_WIN32)
#define CLICKTRAIN_PUBLIC extern "C" __declspec(dllexport)
#else
#define CLICKTRAIN_PUBLIC extern "C" __attribute__((visibility("default")))
#endif

namespace clicktrain {
namespace {

struct Given {
  Type type;
  Geometry geometry;
  Mask mask;
};

Given read(const int64_t* n, const int32_t* entries, const int32_t* counts, const int32_t* entries_by_channels,
           const int32_t* counts_by_channels) {
  const bool dense = entries == nullptr;
  return Given{static_cast<Type>(n[0]),
               Geometry{n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11]},
               Mask{n[12], n[13], dense ? n[13] : n[14], dense ? n[12] : n[15], Lists{entries, counts, n[16]},
                    Lists{entries_by_channels, counts_by_channels, n[17]}}};
}

PackedHead head_of(Type type, const Mask& mask, const Geometry& window) {
  PackedHead head{};
  std::memcpy(head.magic, "ctpack2", sizeof head.magic);
  std::strncpy(head.instructions, instruction_set(), sizeof head.instructions - 1);
  head.type = static_cast<int32_t>(type);
  head.cin = static_cast<int32_t>(mask.cin);
  head.cout = static_cast<int32_t>(mask.cout);
  head.kh = static_cast<int32_t>(window.kh);
  head.kw = static_cast<int32_t>(window.kw);
  head.filters = static_cast<int32_t>(mask.filters);
  head.channels = static_cast<int32_t>(mask.channels);
  return head;
}

}  // namespace

const void* packed_content(Type type, const Mask& mask, const Geometry& window, const void* packed, int64_t bytes) {
  if (bytes < static_cast<int64_t>(sizeof(PackedHead))) return nullptr;
  const PackedHead wanted = head_of(type, mask, window);
  PackedHead found;
  std::memcpy(&found, packed, sizeof found);
  const int64_t content = found.content_bytes;
  found.content_bytes = 0;
  if (std::memcmp(&found, &wanted, sizeof found) != 0) return nullptr;
  if (content != bytes - static_cast<int64_t>(sizeof(PackedHead))) return nullptr;
  const char* found_content = static_cast<const char*>(packed) + sizeof(PackedHead);
  return can_take(found_content, window) ? found_content : nullptr;
}

}  // namespace clicktrain

using clicktrain::Epilogue;
using clicktrain::Given;
using clicktrain::OwnThreads;
using clicktrain::PackedHead;

CLICKTRAIN_PUBLIC const char* clicktrain_instruction_set() { return clicktrain::instruction_set(); }

CLICKTRAIN_PUBLIC int64_t clicktrain_packed_bytes(const int64_t* numbers, const int32_t* entries, const int32_t* counts,
                                                  const int32_t* entries_by_channels,
                                                  const int32_t* counts_by_channels) {
  const Given given = clicktrain::read(numbers, entries, counts, entries_by_channels, counts_by_channels);
  return static_cast<int64_t>(sizeof(PackedHead)) + clicktrain::packed_bytes(given.mask, given.geometry);
}

// `packed` starts at a multiple of 64 bytes and has room for as many as clicktrain_packed_bytes says.
CLICKTRAIN_PUBLIC void clicktrain_pack(const int64_t* numbers, const int32_t* entries, const int32_t* counts,
                                       const int32_t* entries_by_channels, const int32_t* counts_by_channels,
                                       const void* w, void* packed) {
  const Given given = clicktrain::read(numbers, entries, counts, entries_by_channels, counts_by_channels);
  PackedHead head = clicktrain::head_of(given.type, given.mask, given.geometry);
  head.content_bytes = clicktrain::packed_bytes(given.mask, given.geometry);
  std::memcpy(packed, &head, sizeof head);
  clicktrain::pack(given.type, given.mask, given.geometry, w, static_cast<char*>(packed) + sizeof head);
}

// One of w and packed (of clicktrain_pack) is null; so may be scale and bias.
CLICKTRAIN_PUBLIC void clicktrain_forward(const int64_t* numbers, const int32_t* entries, const int32_t* counts,
                                          const int32_t* entries_by_channels, const int32_t* counts_by_channels,
                                          const void* x, const void* w, const void* packed, const float* scale,
                                          const float* bias, int64_t relu, void* y, int64_t threads) {
  const Given given = clicktrain::read(numbers, entries, counts, entries_by_channels, counts_by_channels);
  OwnThreads pool(threads);
  const void* content = packed == nullptr ? nullptr : static_cast<const char*>(packed) + sizeof(PackedHead);
  clicktrain::forward(given.type, given.geometry, given.mask, x, w, content, Epilogue{scale, bias, relu != 0}, y, pool);
}

CLICKTRAIN_PUBLIC void clicktrain_input_gradient(const int64_t* numbers, const int32_t* entries, const int32_t* counts,
                                                 const int32_t* entries_by_channels, const int32_t* counts_by_channels,
                                                 const void* dy, const void* w, void* dx, int64_t threads) {
  const Given given = clicktrain::read(numbers, entries, counts, entries_by_channels, counts_by_channels);
  OwnThreads pool(threads);
  clicktrain::input_gradient(given.type, given.geometry, given.mask, dy, w, dx, pool);
}

CLICKTRAIN_PUBLIC void clicktrain_weight_gradient(const int64_t* numbers, const int32_t* entries, const int32_t* counts,
                                                  const int32_t* entries_by_channels, const int32_t* counts_by_channels,
                                                  const void* x, const void* dy, float* dw, int64_t threads) {
  const Given given = clicktrain::read(numbers, entries, counts, entries_by_channels, counts_by_channels);
  OwnThreads pool(threads);
  clicktrain::weight_gradient(given.type, given.geometry, given.mask, x, dy, dw, pool);
}

// `numbers`: batch, a core's cache for weights and maps, how many inputs, how many steps, each input's height, width and channels, each step's numbers
// (chain.h). `packed` (of clicktrain_pack) and `biases` have one pointer a step, null where there is none.
CLICKTRAIN_PUBLIC void clicktrain_chain_plain(const int64_t* numbers, const float* factors, const float* const* inputs,
                                              const void* const* packed, const float* const* biases, float* y,
                                              int64_t threads) {
  clicktrain::Chain chain;
  chain.cache = numbers[1];
  const int64_t* n = numbers + 4;
  for (int64_t index = 0; index < numbers[2]; ++index, n += 3) chain.inputs.push_back({n[0], n[1], n[2]});
  for (int64_t k = 0; k < numbers[3]; ++k, n += clicktrain::kStepNumbers) {
    chain.steps.push_back(clicktrain::read_step(n, factors[k]));
    clicktrain::ChainStep& step = chain.steps.back();
    step.bias = biases[k];
    if (packed[k] == nullptr) continue;
    step.packed = static_cast<const char*>(packed[k]) + sizeof(PackedHead);
    step.bytes = static_cast<const PackedHead*>(packed[k])->content_bytes;
  }
  OwnThreads pool(threads);
  clicktrain::run_chain(chain, numbers[0], inputs, y, pool);
}

namespace {

// `numbers`: type, batch, height, width, channels, relu, pool.
clicktrain::Norm read_norm(const int64_t* n, float epsilon) {
  return {n[1], n[2], n[3], n[4], epsilon, n[5] != 0, n[6] != 0};
}

}  // namespace

// `added` may be null.
CLICKTRAIN_PUBLIC void clicktrain_batch_norm_plain(const int64_t* numbers, float epsilon, const void* x,
                                                   const float* scale, const float* bias, const void* added, void* y,
                                                   float* mean, float* var, int64_t threads) {
  OwnThreads pool(threads);
  clicktrain::batch_norm(static_cast<clicktrain::Type>(numbers[0]), read_norm(numbers, epsilon), x, scale, bias, added, y,
                         mean, var, pool);
}

// `y` and `dadded` are null where nothing was added.
CLICKTRAIN_PUBLIC void clicktrain_batch_norm_gradient_plain(const int64_t* numbers, float epsilon, const void* dy,
                                                            const float* dmean, const float* dvar, const void* x,
                                                            const void* y, const float* scale, const float* bias,
                                                            const float* mean, const float* var, void* dx, float* dscale,
                                                            float* dbias, void* dadded, int64_t threads) {
  OwnThreads pool(threads);
  clicktrain::batch_norm_gradient(static_cast<clicktrain::Type>(numbers[0]), read_norm(numbers, epsilon), dy, dmean, dvar,
                                  x, y, scale, bias, mean, var, dx, dscale, dbias, dadded, pool);
}
