// The kernels as handlers of XLA's FFI. Shapes are checked here: what is wrong is an error of the call, never a crash.
//
// Empty arrays stand for what is not given: entries and counts of a dense convolution, scale, bias.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "handler.h"
#include "plain.h"

namespace clicktrain {
namespace {

// What every handler reads from its arguments, and what was wrong with them.
struct Call {
  Type type = Type::f32;
  Geometry geometry{};
  Mask mask{};
  std::string wrong;

  void refuse(const std::string& reason) {
    if (wrong.empty()) wrong = reason;
  }
};

// x and y are the images on the input's and on the output's side, whichever of them is an argument.
Call read_images(Array x, Array y, Ints window, Ints strides, Ints padding, Ints tile) {
  Call call;
  const auto in = x.dimensions(), out = y.dimensions();
  if (in.size() != 4 || out.size() != 4 || in[0] != out[0]) {
    call.refuse("images are (batch, height, width, channels) of one batch, got " + text(x) + " and " + text(y));
    return call;
  }
  if (window.size() != 2 || strides.size() != 2 || padding.size() != 2 || tile.size() != 2) {
    call.refuse("window, strides, padding and tile have two entries each");
    return call;
  }
  if (x.element_type() == ffi::DataType::BF16) {
    call.type = Type::bf16;
  } else if (x.element_type() != ffi::DataType::F32) {
    call.refuse("images are float32 or bfloat16");
  }
  if (y.element_type() != x.element_type()) call.refuse("images of the input and the output are of one dtype");
  call.geometry = Geometry{in[0],     in[1],      in[2],      out[1],     out[2],    window[0],
                           window[1], strides[0], strides[1], padding[0], padding[1]};
  call.mask.cin = in[3];
  call.mask.cout = out[3];
  call.mask.filters = tile[0];
  call.mask.channels = tile[1];
  if (window[0] < 1 || window[1] < 1 || strides[0] < 1 || strides[1] < 1 || padding[0] < 0 || padding[1] < 0) {
    call.refuse("windows and strides are positive, padding is not negative");
  }
  if (in[1] < 1 || in[2] < 1) call.refuse("images have pixels, got " + text(x));
  if (tile[0] < 1 || tile[1] < 1 || in[3] < 1 || out[3] < 1) call.refuse("tiles and channels are positive");
  return call;
}

void read_lists(Call& call, Array entries, Array counts, int64_t rows, Lists& lists) {
  if (entries.element_count() == 0 && counts.element_count() == 0) return;
  if (entries.element_type() != ffi::DataType::S32 || counts.element_type() != ffi::DataType::S32) {
    return call.refuse("lists are int32");
  }
  const auto shape = entries.dimensions();
  if (shape.size() != 2 || shape[0] != rows || !has_shape(counts, {rows})) {
    return call.refuse("lists are (" + std::to_string(rows) + ", room) and (" + std::to_string(rows) + ",), got " +
                       text(entries) + " and " + text(counts));
  }
  lists = Lists{entries.typed_data<int32_t>(), counts.typed_data<int32_t>(), shape[1]};
  // Entries are make_structure's and not looked at again: there may be as many as weights.
  for (int64_t row = 0; row < rows; ++row) {
    if (lists.counts[row] < 0 || lists.counts[row] > lists.room) {
      return call.refuse("a row's count is " + std::to_string(lists.counts[row]) + ", its list has room for " +
                         std::to_string(lists.room));
    }
  }
}

void read_mask(Call& call, Array entries, Array counts, Array entries_by_channels, Array counts_by_channels) {
  if (!call.wrong.empty()) return;
  const Mask& mask = call.mask;
  const int64_t tiles = (mask.cout + mask.filters - 1) / mask.filters;
  const int64_t blocks = (mask.cin + mask.channels - 1) / mask.channels;
  read_lists(call, entries, counts, tiles, call.mask.by_filters);
  read_lists(call, entries_by_channels, counts_by_channels, blocks, call.mask.by_channels);
  if ((mask.by_filters.entries == nullptr) != (mask.by_channels.entries == nullptr)) {
    call.refuse("lists by filters and by channels are given both or neither");
  }
  if (mask.by_filters.entries == nullptr) {  // All filters share one list, that of everything.
    call.mask.filters = mask.cout;
    call.mask.channels = mask.cin;
  }
}

void check_weights(Call& call, Array w, ffi::DataType dtype) {
  if (!call.wrong.empty()) return;
  const Geometry& g = call.geometry;
  if (!has_shape(w, {g.kh, g.kw, call.mask.cin, call.mask.cout})) {
    call.refuse("a kernel of window (" + std::to_string(g.kh) + ", " + std::to_string(g.kw) + ") between " +
                std::to_string(call.mask.cin) + " and " + std::to_string(call.mask.cout) + " channels, got " + text(w));
  }
  if (w.element_type() != dtype) call.refuse("a kernel of another dtype than the images");
}

const float* read_vector(Call& call, const char* name, Array vector) {
  if (vector.element_count() == 0 || !call.wrong.empty()) return nullptr;
  if (vector.element_type() != ffi::DataType::F32 || !has_shape(vector, {call.mask.cout})) {
    call.refuse(std::string(name) + " is float32 (" + std::to_string(call.mask.cout) + ",), got " + text(vector));
  }
  return vector.typed_data<float>();
}

template <typename Kernel>
ffi::Error run(const char* name, const Call& call, Array result, Kernel kernel) {
  return guarded(name, call.wrong, [&] {
    if (call.geometry.batch == 0 || call.geometry.out_h < 1 || call.geometry.out_w < 1) {
      std::memset(result.untyped_data(), 0, result.size_bytes());
    } else {
      advise(result);
      kernel();
    }
  });
}

ffi::Error conv(ffi::ThreadPool threads, Array x, Array w, Array entries, Array counts, Array entries_by_channels,
                Array counts_by_channels, Array scale, Array bias, ffi::Result<Array> y, Ints window, Ints strides,
                Ints padding, Ints tile, bool relu) {
  const char* name = "clicktrain_conv";
  Call call = read_images(x, *y, window, strides, padding, tile);
  read_mask(call, entries, counts, entries_by_channels, counts_by_channels);
  check_weights(call, w, x.element_type());
  const Epilogue epilogue{read_vector(call, "scale", scale), read_vector(call, "bias", bias), relu};
  return run(name, call, *y, [&] {
    XlaPool pool(threads);
    forward(call.type, call.geometry, call.mask, x.untyped_data(), w.untyped_data(), nullptr, epilogue,
            y->untyped_data(), pool);
  });
}

ffi::Error conv_packed(ffi::ThreadPool threads, Array x, Array packed, Array scale, Array bias, ffi::Result<Array> y,
                       Ints window, Ints strides, Ints padding, Ints tile, bool relu) {
  const char* name = "clicktrain_conv_packed";
  Call call = read_images(x, *y, window, strides, padding, tile);
  const Epilogue epilogue{read_vector(call, "scale", scale), read_vector(call, "bias", bias), relu};
  const void* data = packed.untyped_data();
  std::unique_ptr<void, decltype(&std::free)> aligned(nullptr, &std::free);
  if (call.wrong.empty()) {
    if (packed.element_type() != ffi::DataType::U8) call.refuse("packed weights are uint8");
    // XLA promises 16 bytes for its arguments and gives 64 to all that it allocates itself.
    if (reinterpret_cast<uintptr_t>(data) % 64 != 0) {
      aligned.reset(std::aligned_alloc(64, (packed.size_bytes() + 63) / 64 * 64));
      if (aligned == nullptr) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "clicktrain_conv_packed: memory");
      data = std::memcpy(aligned.get(), data, packed.size_bytes());
    }
    data = packed_content(call.type, call.mask, call.geometry, data, packed.size_bytes());
    if (data == nullptr) {
      call.refuse("the packed weights are of another convolution, dtype or instruction set: pack them again, here");
    }
  }
  return run(name, call, *y, [&] {
    XlaPool pool(threads);
    forward(call.type, call.geometry, call.mask, x.untyped_data(), nullptr, data, epilogue, y->untyped_data(), pool);
  });
}

ffi::Error conv_input_gradient(ffi::ThreadPool threads, Array dy, Array w, Array entries, Array counts,
                               Array entries_by_channels, Array counts_by_channels, ffi::Result<Array> dx, Ints window,
                               Ints strides, Ints padding, Ints tile) {
  const char* name = "clicktrain_conv_input_gradient";
  Call call = read_images(*dx, dy, window, strides, padding, tile);
  read_mask(call, entries, counts, entries_by_channels, counts_by_channels);
  check_weights(call, w, dy.element_type());
  return run(name, call, *dx, [&] {
    XlaPool pool(threads);
    input_gradient(call.type, call.geometry, call.mask, dy.untyped_data(), w.untyped_data(), dx->untyped_data(), pool);
  });
}

ffi::Error conv_weight_gradient(ffi::ThreadPool threads, Array x, Array dy, Array entries, Array counts,
                                Array entries_by_channels, Array counts_by_channels, ffi::Result<Array> dw, Ints window,
                                Ints strides, Ints padding, Ints tile) {
  const char* name = "clicktrain_conv_weight_gradient";
  Call call = read_images(x, dy, window, strides, padding, tile);
  read_mask(call, entries, counts, entries_by_channels, counts_by_channels);
  check_weights(call, *dw, ffi::DataType::F32);
  return run(name, call, *dw, [&] {
    XlaPool pool(threads);
    weight_gradient(call.type, call.geometry, call.mask, x.untyped_data(), dy.untyped_data(), dw->typed_data<float>(),
                    pool);
  });
}

template <typename Binding>
auto with_settings(Binding binding) {
  return std::move(binding).template Attr<Ints>("window").template Attr<Ints>("strides").template Attr<Ints>("padding")
      .template Attr<Ints>("tile");
}

auto with_lists(ffi::Binding<ffi::ExecutionStage::kExecute> binding) {
  return std::move(binding).Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
      .Arg<Array>();
}

}  // namespace
}  // namespace clicktrain

// Of the headers that this was built with: jaxlibs of older ones refuse it.
extern "C" CLICKTRAIN_HANDLER int64_t clicktrain_ffi_version() {
  return XLA_FFI_API_MAJOR * int64_t{1000} + XLA_FFI_API_MINOR;
}

// Declared first: so that the definitions, which XLA's macro makes, are seen outside.
extern "C" {
CLICKTRAIN_HANDLER XLA_FFI_Error* clicktrain_conv(XLA_FFI_CallFrame*);
CLICKTRAIN_HANDLER XLA_FFI_Error* clicktrain_conv_packed(XLA_FFI_CallFrame*);
CLICKTRAIN_HANDLER XLA_FFI_Error* clicktrain_conv_input_gradient(XLA_FFI_CallFrame*);
CLICKTRAIN_HANDLER XLA_FFI_Error* clicktrain_conv_weight_gradient(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(clicktrain_conv, clicktrain::conv,
                              clicktrain::with_settings(clicktrain::with_lists(xla::ffi::Ffi::Bind())
                                                            .Arg<clicktrain::Array>()
                                                            .Arg<clicktrain::Array>()
                                                            .Ret<clicktrain::Array>())
                                  .Attr<bool>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(clicktrain_conv_packed, clicktrain::conv_packed,
                              clicktrain::with_settings(xla::ffi::Ffi::Bind()
                                                            .Ctx<xla::ffi::ThreadPool>()
                                                            .Arg<clicktrain::Array>()
                                                            .Arg<clicktrain::Array>()
                                                            .Arg<clicktrain::Array>()
                                                            .Arg<clicktrain::Array>()
                                                            .Ret<clicktrain::Array>())
                                  .Attr<bool>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    clicktrain_conv_input_gradient, clicktrain::conv_input_gradient,
    clicktrain::with_settings(clicktrain::with_lists(xla::ffi::Ffi::Bind()).Ret<clicktrain::Array>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    clicktrain_conv_weight_gradient, clicktrain::conv_weight_gradient,
    clicktrain::with_settings(clicktrain::with_lists(xla::ffi::Ffi::Bind()).Ret<clicktrain::Array>()));
