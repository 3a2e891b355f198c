// Pools of threads for the kernels: whatever can schedule a function, the calling thread working along.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "core.h"

namespace clicktrain {

// The calling thread takes tasks itself until none is left, and waits for those alone that another thread has begun:
// so it ends even where no helper ever runs, as in a pool whose threads all wait in such a call. A helper that comes
// late finds nothing to do and touches nothing but `Work`, which it shares.
class Work {
 public:
  Work(int64_t count, void (*task)(void*, int64_t), void* context) : count_(count), task_(task), context_(context) {}

  void take() {
    for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      try {
        task_(context_, index);
      } catch (...) {  // Kernels throw nothing but for want of memory; an exception must not leave a pool's thread.
        failed_.store(true, std::memory_order_relaxed);
      }
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_all();
      }
    }
  }

  void wait() {
    // What is left is short as a rule: looking is cheaper than being put to sleep and woken.
    for (int look = 0; look < kLooks; ++look) {
      if (done_.load(std::memory_order_acquire) == count_) break;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_.load(std::memory_order_acquire) == count_; });
    if (failed_.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }

 private:
  static constexpr int kLooks = 4000;
  const int64_t count_;
  void (*const task_)(void*, int64_t);
  void* const context_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// `schedule(function)` runs function() some time on some thread, or at once on this one.
template <typename Schedule>
void run_shared(int64_t threads, int64_t count, void (*task)(void*, int64_t), void* context, Schedule schedule) {
  if (count <= 0) return;
  if (threads <= 1 || count == 1) {
    for (int64_t index = 0; index < count; ++index) task(context, index);
    return;
  }
  auto work = std::make_shared<Work>(count, task, context);
  try {
    for (int64_t helper = 1; helper < std::min(threads, count); ++helper) schedule([work] { work->take(); });
  } catch (...) {  // No more helpers are to be had; those that there are still read `context`, so none is left alone.
  }
  work->take();
  work->wait();
}

// Threads of its own, for each run anew: for tests and programs without XLA. One thread is the caller alone.
class OwnThreads : public Pool {
 public:
  explicit OwnThreads(int64_t threads) : threads_(std::max<int64_t>(threads, 1)) {}
  int64_t threads() const override { return threads_; }
  void run(int64_t count, void (*task)(void*, int64_t), void* context) override {
    std::vector<std::thread> helpers;
    run_shared(threads_, count, task, context,
               [&helpers](std::function<void()> function) { helpers.emplace_back(std::move(function)); });
    for (std::thread& helper : helpers) helper.join();
  }

 private:
  const int64_t threads_;
};

}  // namespace clicktrain
