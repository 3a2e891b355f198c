// Many callers share a few threads, and helpers that look for more work; built with the thread sanitizer.
#include <cstdio>
#include <deque>

#include "pool.h"

namespace {

// As XLA's: threads that sleep until there is something to do.
class Sleepers {
 public:
  explicit Sleepers(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { live(); });
  }
  ~Sleepers() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_over_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  void schedule(std::function<void()> function) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(function));
    }
    wake_.notify_one();
  }

 private:
  void live() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return is_over_ || !queue_.empty(); });
      if (queue_.empty()) return;
      auto function = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      function();
      lock.lock();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  std::vector<std::thread> threads_;
  bool is_over_ = false;
};

int wrong = 0;

void call(Sleepers& pool, int64_t threads, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    std::vector<int64_t> sums(round % 37, 0);
    clicktrain::run_shared(
        threads, static_cast<int64_t>(sums.size()),
        [](void* context, int64_t index) { (*static_cast<std::vector<int64_t>*>(context))[index] += index + 1; }, &sums,
        [&pool](std::function<void()> function) { pool.schedule(std::move(function)); });
    for (size_t i = 0; i < sums.size(); ++i) {
      if (sums[i] != static_cast<int64_t>(i) + 1) __atomic_fetch_add(&wrong, 1, __ATOMIC_RELAXED);
    }
    // Helpers that have gone to sleep are woken again.
    if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(400));
  }
}

}  // namespace

int main() {
  {
    Sleepers pool(3);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) callers.emplace_back([&pool] { call(pool, 4, 400); });
    for (auto& caller : callers) caller.join();
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
