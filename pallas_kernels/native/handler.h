// What the handlers of XLA's FFI share: XLA's threads, results in huge pages, errors in place of exceptions.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cerrno>
#include <exception>
#include <string>

#include "pool.h"
#include "xla/ffi/api/ffi.h"

#define CLICKTRAIN_HANDLER __attribute__((visibility("default")))

namespace clicktrain {

namespace ffi = xla::ffi;
using Ints = ffi::Span<const int64_t>;
using Array = ffi::AnyBuffer;

class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool), threads_(std::max<int64_t>(pool.num_threads(), 1)) {}
  int64_t threads() const override { return threads_; }
  void run(int64_t count, void (*task)(void*, int64_t), void* context) override {
    run_shared(threads_, count, task, context, [this](auto function) { pool_.Schedule(std::move(function)); });
  }

 private:
  ffi::ThreadPool& pool_;
  const int64_t threads_;
};

inline std::string text(Array array) {
  std::string shape;
  for (int64_t length : array.dimensions()) shape += (shape.empty() ? "" : ", ") + std::to_string(length);
  return "(" + shape + ")";
}

inline bool has_shape(Array array, std::initializer_list<int64_t> shape) {
  return std::equal(shape.begin(), shape.end(), array.dimensions().begin(), array.dimensions().end());
}

// Large results in huge pages, where Linux gives them when asked: XLA takes its memory anew for every call of a
// program, and 4 KiB at a time the first writing of it costs a tenth and more of a training update.
inline void advise(Array result) {
#if defined(__linux__)
  const size_t bytes = result.size_bytes();
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < kHuge / 2) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.untyped_data()) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(result.untyped_data()) + bytes + kHuge - 1) / kHuge * kHuge;
  const int before = errno;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // Advice: whether it is taken does not matter.
  errno = before;
#endif
}

// Runs the kernel, unless something is wrong; nothing is thrown across the handler's border.
template <typename Kernel>
ffi::Error guarded(const char* name, const std::string& wrong, Kernel kernel) {
  if (!wrong.empty()) return ffi::Error::InvalidArgument(std::string(name) + ": " + wrong);
  try {
    kernel();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(name) + ": out of memory");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string(name) + ": " + error.what());
  }
  return ffi::Error::Success();
}

}  // namespace clicktrain
