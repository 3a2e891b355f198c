// Pools of threads for the kernels: whatever can schedule a function, the calling thread working along.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
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

// Looks for something for so long, and lets others run in between: to be put to sleep and woken takes longer than most
// layers of a net do for one image. Returns whether it came.
template <typename Found>
bool look_for(std::chrono::microseconds time, const Found& found) {
  const auto end = std::chrono::steady_clock::now() + time;
  do {
    for (int look = 0; look < 64; ++look) {
      if (found()) return true;
    }
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
  return found();
}

// The calling thread takes tasks itself until none is left, and waits for those alone that another thread has begun:
// so it ends even where no helper ever runs, as in a pool whose threads all wait in such a call. A helper that comes
// late finds nothing to do and touches nothing but `Work`, which it shares.
//
// Each thread begins with a run of tasks of its own, the caller with the first one, and then takes what is left of
// others'. Of layers that are divided alike it then reads, with two threads, what it wrote itself and its core's cache
// still has; of more threads, helpers take their runs in the order in which they come.
class Work {
 public:
  Work(int64_t threads, int64_t count, void (*task)(void*, int64_t), void* context)
      : count_(count), task_(task), context_(context), runs_(threads) {
    for (int64_t run = 0; run < threads; ++run) {
      runs_[run].next.store(count * run / threads, std::memory_order_relaxed);
      runs_[run].end = count * (run + 1) / threads;
    }
  }

  void help() { take(helpers_.fetch_add(1, std::memory_order_relaxed) + 1); }

  void take(int64_t own = 0) {
    const int64_t threads = static_cast<int64_t>(runs_.size());
    for (int64_t k = 0; k < threads; ++k) {
      Run& run = runs_[(own + k) % threads];
      for (int64_t index; (index = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;) {
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
  }

  void wait() {
    const auto is_done = [this] { return done_.load(std::memory_order_acquire) == count_; };
    if (!look_for(kPatience, is_done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      all_done_.wait(lock, is_done);
    }
    if (failed_.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }

 private:
  struct Run {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  static constexpr std::chrono::microseconds kPatience{100};
  const int64_t count_;
  void (*const task_)(void*, int64_t);
  void* const context_;
  std::vector<Run> runs_;  // one a thread
  std::atomic<int64_t> helpers_{0}, done_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// Helpers that have done their work and look for more, before they go back to where they came from: the next part of
// a layer, and the next layer, are as a rule not far.
class Helpers {
 public:
  // All of a process. Never destroyed: a thread may look for work while the process ends.
  static Helpers& all() {
    static Helpers* const helpers = new Helpers;
    return *helpers;
  }

  // Gives work to as many as are free, at most so many; returns to how many.
  int64_t give(const std::shared_ptr<Work>& work, int64_t most) {
    if (free_.load(std::memory_order_relaxed) <= 0) return 0;
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t count = std::min(most, free_.load(std::memory_order_relaxed));
    free_.fetch_sub(count, std::memory_order_relaxed);
    for (int64_t helper = 0; helper < count; ++helper) given_.push_back(work);
    waiting_.store(static_cast<int64_t>(given_.size()), std::memory_order_release);
    return count;
  }

  // A helper's life, from its first work until none has come for a while.
  void serve(std::shared_ptr<Work> work) {
    do {
      work->help();
      work.reset();
      free_.fetch_add(1, std::memory_order_relaxed);
      while (!work && look_for(kPatience, [this] { return waiting_.load(std::memory_order_acquire) > 0; })) {
        work = next();
      }
      // What was given to it in this moment has nobody else.
      if (!work) work = next_or_leave();
    } while (work);
  }

 private:
  std::shared_ptr<Work> next() {
    std::lock_guard<std::mutex> lock(mutex_);
    return taken();
  }

  std::shared_ptr<Work> next_or_leave() {
    std::lock_guard<std::mutex> lock(mutex_);
    auto work = taken();
    if (!work) free_.fetch_sub(1, std::memory_order_relaxed);
    return work;
  }

  std::shared_ptr<Work> taken() {
    if (given_.empty()) return nullptr;
    auto work = std::move(given_.back());
    given_.pop_back();
    waiting_.store(static_cast<int64_t>(given_.size()), std::memory_order_relaxed);
    return work;
  }

  static constexpr std::chrono::microseconds kPatience{200};
  std::mutex mutex_;
  std::vector<std::shared_ptr<Work>> given_;
  std::atomic<int64_t> free_{0}, waiting_{0};
};

// `schedule(function)` runs function() some time on some thread, or at once on this one. Helpers that stay look for
// more work afterwards.
template <typename Schedule>
void run_shared(int64_t threads, int64_t count, void (*task)(void*, int64_t), void* context, Schedule schedule,
                bool stay = true) {
  if (count <= 0) return;
  if (threads <= 1 || count == 1) {
    for (int64_t index = 0; index < count; ++index) task(context, index);
    return;
  }
  const int64_t wanted = std::min(threads, count) - 1;
  auto work = std::make_shared<Work>(wanted + 1, count, task, context);
  try {
    for (int64_t helper = stay ? Helpers::all().give(work, wanted) : 0; helper < wanted; ++helper) {
      schedule([work, stay] { stay ? Helpers::all().serve(work) : work->help(); });
    }
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
               [&helpers](std::function<void()> function) { helpers.emplace_back(std::move(function)); }, false);
    for (std::thread& helper : helpers) helper.join();
  }

 private:
  const int64_t threads_;
};

}  // namespace clicktrain
