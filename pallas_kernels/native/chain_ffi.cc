// Layers one after the other as a handler of XLA's FFI; shapes are checked here.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "chain.h"
#include "handler.h"
#include "plain.h"

namespace clicktrain {
namespace {

using Floats = ffi::Span<const float>;
using Aligned = std::unique_ptr<void, decltype(&std::free)>;

// Arguments: the inputs, then packed weights and biases, which steps name by where they stand among all.
ffi::Error chain_call(ffi::ThreadPool threads, ffi::RemainingArgs arguments, ffi::Result<Array> y, Ints steps,
                      Floats factors, int64_t inputs) {
  Chain chain;
  std::vector<Aligned> copies;
  std::vector<const float*> given;
  std::string wrong;
  int64_t batch = -1;
  const auto argument = [&](int64_t index) {
    auto found = arguments.get<Array>(static_cast<size_t>(index));
    if (found.has_error()) throw std::runtime_error("an argument that is no array");
    return *found;
  };
  const auto check = [&] {
    if (inputs < 1 || static_cast<size_t>(inputs) > arguments.size()) return std::string("no inputs");
    if (steps.size() == 0 || steps.size() != factors.size() * kStepNumbers) return std::string("steps of other numbers");
    for (int64_t index = 0; index < inputs; ++index) {
      const Array x = argument(index);
      const auto shape = x.dimensions();
      if (x.element_type() != ffi::DataType::F32 || shape.size() != 4 || (batch >= 0 && shape[0] != batch))
        return "inputs are float32 (batch, height, width, channels) of one batch, got " + text(x);
      batch = shape[0];
      chain.inputs.push_back({shape[1], shape[2], shape[3]});
      if (batch > 0 && chain.inputs.back().size() < 1) return "inputs have pixels, got " + text(x);
      given.push_back(x.typed_data<float>());
    }
    for (size_t k = 0; k < factors.size(); ++k) {
      const int64_t* numbers = steps.begin() + k * kStepNumbers;
      const std::string at = "step " + std::to_string(k) + ": ";
      chain.steps.push_back(read_step(numbers, factors[k]));
      if (const char* reason = wrong_with_last(chain)) return at + reason;
      ChainStep& step = chain.steps.back();
      if (step.kind != ChainStep::conv) continue;
      const int64_t packed = numbers[15], bias = numbers[16], count = static_cast<int64_t>(arguments.size());
      if (packed < inputs || packed >= count || bias >= count || (bias >= 0 && bias < inputs))
        return at + "its weights are no argument";
      const Array weights = argument(packed);
      const void* data = weights.untyped_data();
      // XLA promises 16 bytes for its arguments and gives 64 to all that it allocates itself.
      if (reinterpret_cast<uintptr_t>(data) % 64 != 0) {
        copies.emplace_back(std::aligned_alloc(64, (weights.size_bytes() + 63) / 64 * 64), &std::free);
        if (copies.back() == nullptr) throw std::bad_alloc();
        data = std::memcpy(copies.back().get(), data, weights.size_bytes());
      }
      const bool is_bytes = weights.element_type() == ffi::DataType::U8;
      const int64_t bytes = is_bytes ? static_cast<int64_t>(weights.size_bytes()) : 0;
      step.packed = packed_content(Type::f32, mask_of(chain, step), geometry_of(chain, step, 1), data, bytes);
      if (step.packed == nullptr)
        return at + "the packed weights are of another convolution, dtype or instruction set: pack them again, here";
      step.bytes = bytes;
      if (bias < 0) continue;
      const Array vector = argument(bias);
      if (vector.element_type() != ffi::DataType::F32 || !has_shape(vector, {step.shape.channels}))
        return at + "bias is float32 (" + std::to_string(step.shape.channels) + ",), got " + text(vector);
      step.bias = vector.typed_data<float>();
    }
    const ImageShape out = chain.steps.back().shape;
    if (y->element_type() != ffi::DataType::F32 || !has_shape(*y, {batch, out.height, out.width, out.channels}))
      return "the result is the last step's, float32, got " + text(*y);
    return std::string();
  };
  try {
    wrong = check();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "clicktrain_chain: memory");
  } catch (const std::exception& error) {
    wrong = error.what();
  }
  return guarded("clicktrain_chain", wrong, [&] {
    if (batch == 0) return;
    advise(*y);
    XlaPool pool(threads);
    run_chain(chain, batch, given.data(), y->typed_data<float>(), pool);
  });
}

}  // namespace
}  // namespace clicktrain

extern "C" {
CLICKTRAIN_HANDLER XLA_FFI_Error* clicktrain_chain(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(clicktrain_chain, clicktrain::chain_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<clicktrain::Array>()
                                  .Attr<clicktrain::Ints>("steps")
                                  .Attr<clicktrain::Floats>("factors")
                                  .Attr<int64_t>("inputs"));
