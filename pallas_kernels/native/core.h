// Pattern-sparse convolutions on a CPU: the interface between XLA's FFI (ffi.cc) and the computation.
//
// All arrays are row-major and densely packed: images (batch, height, width, channels), kernels (kh, kw, cin, cout).
// Storage is float32 or bfloat16; every sum is taken in float32. Results do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace clicktrain {

enum class Type : int32_t { f32 = 0, bf16 = 1 };

// Of the forward convolution, whichever direction is computed.
struct Geometry {
  int64_t batch, in_h, in_w, out_h, out_w;
  int64_t kh, kw, stride_h, stride_w, pad_top, pad_left;
};

// What is retained, as pallas_kernels.Structure has it. `by_filters` lists, for each tile of `filters` filters, the
// retained (channel block, tap) as block * kh * kw + tap, rising; `by_channels` for each block of `channels` channels
// the retained (filter tile, tap). A tile or block at the end of its axis may be short. With null lists nothing is
// removed: the dense convolution, whose tile must be (cout, cin). Where weights are packed, lists are not read at all.
struct Lists {
  const int32_t* entries;  // (rows, room); what lies behind a row's count must not be read
  const int32_t* counts;   // (rows,)
  int64_t room;
};
struct Mask {
  int64_t cin, cout;
  int64_t filters, channels;  // of a tile
  Lists by_filters, by_channels;
};

// y = relu(sum * scale + bias + added), each part where it is given: scale and bias have one entry a filter, `added` is
// of y's shape and apart from it, for float32 alone; or they are null.
struct Epilogue {
  const float* scale;
  const float* bias;
  bool relu;
  const float* added = nullptr;
};

// Who runs tasks: XLA's thread pool, or one thread.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t threads() const = 0;
  // Calls task(context, index) for every index in [0, count), in any order, and returns when all are done.
  virtual void run(int64_t count, void (*task)(void* context, int64_t index), void* context) = 0;
};

// Retained weights of a forward pass, laid out as they are read; for weights that change no more.
// `packed` starts at a multiple of 64 bytes. Its content may differ between instruction sets. Of the geometry kh and kw
// are read, and, where they are known and not 0, the strides and the size of an output: kernels of one 2x2 corner each
// may then be laid out for Winograd's minimal filtering, for strides of 1 alone. What is not finite in x may reach all of
// a square of 2x2 outputs there.
int64_t packed_bytes(const Mask& mask, const Geometry& window);
void pack(Type type, const Mask& mask, const Geometry& window, const void* w, void* packed);
// Whether what was packed can do a convolution of such strides.
bool can_take(const void* packed, const Geometry& geometry);

// Whether filters lie side by side in vectors: then an image's sums do not depend on which other images there are.
bool is_tiled(const Mask& mask, const Geometry& window);

// y (batch, out_h, out_w, cout) of `type`. Exactly one of w (of `type`) and packed is given. What the mask does not
// retain of w is never read as a value.
void forward(Type type, const Geometry& geometry, const Mask& mask, const void* x, const void* w, const void* packed,
             const Epilogue& epilogue, void* y, Pool& pool);

// dx (batch, in_h, in_w, cin) of `type`.
void input_gradient(Type type, const Geometry& geometry, const Mask& mask, const void* dy, const void* w, void* dx,
                    Pool& pool);

// dw (kh, kw, cin, cout), always float32, exact zeros where nothing is retained. What is not finite in x may reach all
// retained taps of its channel, those among them that do not read it.
void weight_gradient(Type type, const Geometry& geometry, const Mask& mask, const void* x, const void* dy, float* dw,
                     Pool& pool);

// "avx512", "avx2", "neon" or "portable": what was chosen when the library was loaded.
const char* instruction_set();

}  // namespace clicktrain
