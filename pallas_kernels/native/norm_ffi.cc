// BatchNorm and what follows it as handlers of XLA's FFI; what is wrong is an error of the call. Empty arrays stand for
// what is not given.
#include "handler.h"
#include "norm.h"

namespace clicktrain {
namespace {

struct NormCall {
  Type type = Type::f32;
  Norm norm{};
  std::string wrong;

  // x of (batch, height, width, channels), and y of what comes of it.
  NormCall(Array x, Array y, float epsilon, bool relu, bool pool) {
    const auto in = x.dimensions();
    if (in.size() != 4 || x.element_count() == 0) {
      refuse("images are (batch, height, width, channels) and have pixels, got " + text(x));
      return;
    }
    norm = Norm{in[0], in[1], in[2], in[3], epsilon, relu, pool};
    if (x.element_type() == ffi::DataType::BF16) {
      type = Type::bf16;
    } else if (x.element_type() != ffi::DataType::F32) {
      refuse("images are float32 or bfloat16");
    }
    if (pool && (in[1] % 2 != 0 || in[2] % 2 != 0)) refuse("images that are pooled are of even size, got " + text(x));
    const int64_t step = pool ? 2 : 1;
    if (!has_shape(y, {in[0], in[1] / step, in[2] / step, in[3]}) || y.element_type() != x.element_type())
      refuse("a result of another shape or dtype, " + text(y) + " of " + text(x));
  }
  void refuse(const std::string& reason) {
    if (wrong.empty()) wrong = reason;
  }
  float* vector(const char* name, Array array) {
    if (!has_shape(array, {norm.channels}) || array.element_type() != ffi::DataType::F32)
      refuse(std::string(name) + " is float32 (" + std::to_string(norm.channels) + ",), got " + text(array));
    return wrong.empty() ? array.typed_data<float>() : nullptr;
  }
  static bool is_like(Array array, Array x) {
    const auto shape = x.dimensions(), other = array.dimensions();
    return std::equal(shape.begin(), shape.end(), other.begin(), other.end()) && array.element_type() == x.element_type();
  }
  // Of x's shape and dtype, or null where it is empty.
  void* like(const char* name, Array array, Array x) {
    if (array.element_count() == 0) return nullptr;
    if (!is_like(array, x))
      refuse(std::string(name) + " is of the images' shape and dtype, got " + text(array) + " for " + text(x));
    if (norm.pool) refuse("nothing is added where images are pooled");
    return array.untyped_data();
  }
};

ffi::Error batch_norm_call(ffi::ThreadPool threads, Array x, Array scale, Array bias, Array added, ffi::Result<Array> y,
                           ffi::Result<Array> mean, ffi::Result<Array> var, float epsilon, bool relu, bool pool) {
  NormCall call(x, *y, epsilon, relu, pool);
  const float *scales = call.vector("scale", scale), *biases = call.vector("bias", bias);
  float *means = call.vector("mean", *mean), *vars = call.vector("var", *var);
  const void* more = call.like("what is added", added, x);
  return guarded("clicktrain_batch_norm", call.wrong, [&] {
    XlaPool pool(threads);
    advise(*y);
    batch_norm(call.type, call.norm, x.untyped_data(), scales, biases, more, y->untyped_data(), means, vars, pool);
  });
}

ffi::Error batch_norm_gradient_call(ffi::ThreadPool threads, Array dy, Array dmean, Array dvar, Array x, Array y,
                                    Array scale, Array bias, Array mean, Array var, ffi::Result<Array> dx,
                                    ffi::Result<Array> dscale, ffi::Result<Array> dbias, ffi::Result<Array> dadded,
                                    float epsilon, bool relu, bool pool) {
  NormCall call(x, dy, epsilon, relu, pool);
  const float *dmeans = call.vector("dmean", dmean), *dvars = call.vector("dvar", dvar);
  const float *scales = call.vector("scale", scale), *biases = call.vector("bias", bias);
  const float *means = call.vector("mean", mean), *vars = call.vector("var", var);
  float *dscales = call.vector("dscale", *dscale), *dbiases = call.vector("dbias", *dbias);
  const void* result = call.like("the result", y, x);
  void* dmore = call.like("the gradient of what is added", *dadded, x);
  if (!NormCall::is_like(*dx, x))
    call.refuse("the gradient of images is of their shape and dtype, got " + text(*dx) + " for " + text(x));
  if (dmore != nullptr && relu && result == nullptr) call.refuse("the result is needed where something was added");
  return guarded("clicktrain_batch_norm_gradient", call.wrong, [&] {
    XlaPool pool(threads);
    advise(*dx);
    if (dmore != nullptr) advise(*dadded);
    batch_norm_gradient(call.type, call.norm, dy.untyped_data(), dmeans, dvars, x.untyped_data(), result, scales, biases,
                        means, vars, dx->untyped_data(), dscales, dbiases, dmore, pool);
  });
}

template <typename Binding>
auto with_norm_settings(Binding binding) {
  return std::move(binding).template Attr<float>("epsilon").template Attr<bool>("relu").template Attr<bool>("pool");
}

}  // namespace
}  // namespace clicktrain

extern "C" {
CLICKTRAIN_HANDLER XLA_FFI_Error* clicktrain_batch_norm(XLA_FFI_CallFrame*);
CLICKTRAIN_HANDLER XLA_FFI_Error* clicktrain_batch_norm_gradient(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(clicktrain_batch_norm, clicktrain::batch_norm_call,
                              clicktrain::with_norm_settings(xla::ffi::Ffi::Bind()
                                                                 .Ctx<xla::ffi::ThreadPool>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Ret<clicktrain::Array>()
                                                                 .Ret<clicktrain::Array>()
                                                                 .Ret<clicktrain::Array>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(clicktrain_batch_norm_gradient, clicktrain::batch_norm_gradient_call,
                              clicktrain::with_norm_settings(xla::ffi::Ffi::Bind()
                                                                 .Ctx<xla::ffi::ThreadPool>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Arg<clicktrain::Array>()
                                                                 .Ret<clicktrain::Array>()
                                                                 .Ret<clicktrain::Array>()
                                                                 .Ret<clicktrain::Array>()
                                                                 .Ret<clicktrain::Array>()));
