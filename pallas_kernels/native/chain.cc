#include "chain.h"

#include <algorithm>
#include <limits>

#include "support.h"
#include "vector.h"

namespace clicktrain {
namespace {

// Images that one task carries through layers: enough that small ones fill blocks and vectors.
constexpr int64_t kMostImages = 16;
// A thread that has fewer pixels than this waits for a layer's weights, if these are more than its cache holds: then
// all threads share them.
constexpr int64_t kFewPixels = 32;
// Of a step that does little for each number: less is not worth a second thread.
constexpr int64_t kRun = 1 << 16;

class Alone : public Pool {
 public:
  int64_t threads() const override { return 1; }
  void run(int64_t count, void (*task)(void*, int64_t), void* context) override {
    for (int64_t index = 0; index < count; ++index) task(context, index);
  }
};

void rectify(float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = y[i] < 0.0f ? 0.0f : y[i];
}

void add(const float* a, const float* b, bool relu, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = a[i] + b[i];
  if (relu) rectify(y, count);
}

// One row of a pool's pixels; a NaN comes through.
void pool_row(const ChainStep& step, const ImageShape& in, const float* x, int64_t row, float* y) {
  const int64_t channels = in.channels, top = row * step.stride_h - step.pad_top;
  const bool is_max = step.kind == ChainStep::max_pool;
  for (int64_t column = 0; column < step.shape.width; ++column, y += channels) {
    const int64_t left = column * step.stride_w - step.pad_left;
    std::fill(y, y + channels, is_max ? -std::numeric_limits<float>::infinity() : 0.0f);
    for (int64_t h = std::max<int64_t>(top, 0); h < std::min(in.height, top + step.kh); ++h)
      for (int64_t w = std::max<int64_t>(left, 0); w < std::min(in.width, left + step.kw); ++w) {
        const float* from = x + (h * in.width + w) * channels;
        if (is_max) {
          CLICKTRAIN_INDEPENDENT
          for (int64_t c = 0; c < channels; ++c) y[c] = ((from[c] > y[c]) | (from[c] != from[c])) ? from[c] : y[c];
        } else {
          CLICKTRAIN_INDEPENDENT
          for (int64_t c = 0; c < channels; ++c) y[c] += from[c];
        }
      }
    if (!is_max)
      for (int64_t c = 0; c < channels; ++c) y[c] *= step.factor;
    if (step.relu) rectify(y, channels);
  }
}

// Steps [begin, end) that each thread takes with its own images, or that all threads share.
struct Phase {
  int64_t begin, end;
  bool shares;
};

// Pieces of memory for values, in numbers of one image: what is needed no more makes room.
class Room {
 public:
  // For a value that is made by a step and read until another.
  int64_t take(int64_t size, int64_t step, int64_t until) {
    taken_.erase(std::remove_if(taken_.begin(), taken_.end(), [&](const Taken& each) { return each.until < step; }), taken_.end());
    std::sort(taken_.begin(), taken_.end(), [](const Taken& a, const Taken& b) { return a.begin < b.begin; });
    size = round_up(size, 16);
    int64_t begin = 0;
    for (const Taken& each : taken_)
      if (each.begin < begin + size) begin = std::max(begin, each.end);
    taken_.push_back({begin, begin + size, until});
    size_ = std::max(size_, begin + size);
    return begin;
  }
  int64_t size() const { return size_; }

 private:
  struct Taken {
    int64_t begin, end, until;
  };
  std::vector<Taken> taken_;
  int64_t size_ = 0;
};

class Runner {
 public:
  Runner(const Chain& chain, int64_t batch, const float* const* inputs, float* y)
      : chain_(chain), inputs_(inputs), y_(y), batch_(batch), count_(static_cast<int64_t>(chain.steps.size())) {
    bool has_lanes = false;
    for (const ChainStep& step : chain.steps)
      has_lanes = has_lanes || (step.kind == ChainStep::conv && !is_tiled(mask_of(chain, step), geometry_of(chain, step, 1)));
    // The order of the sums in lanes depends on how many images there are: always on so many, then.
    unit_ = has_lanes ? std::clamp<int64_t>(div_up(batch, 2), 1, kMostImages) : 1;
  }

  void run(Pool& pool) const {
    const int64_t most = std::max<int64_t>(1, pool.threads() * kMostImages / unit_) * unit_;
    for (int64_t first = 0; first < batch_; first += most) run_images({first, std::min(batch_, first + most)}, pool);
  }

 private:
  struct Images {
    int64_t first, end;  // of the batch
    int64_t count() const { return end - first; }
  };
  // Where the values that are made lie: those that another phase reads for all images, others for a task's own.
  struct Places {
    std::vector<bool> crosses;
    std::vector<int64_t> at;
    int64_t whole = 0, own = 0;  // room in numbers of one image
  };

  void run_images(Images images, Pool& pool) const {
    const int64_t units = div_up(images.count(), unit_), threads = pool.threads();
    const int64_t tasks = std::min(units, threads * div_up(div_up(images.count(), threads), kMostImages));
    // Where some threads would have too little to do, all share.
    const bool is_uneven = threads > 1 && 4 * threads * div_up(units, threads) > 5 * units;
    std::vector<Phase> phases;
    for (int64_t k = 0; k < count_; ++k) {
      const bool shares = is_uneven || waits(chain_.steps[k], images.count() / tasks);
      if (phases.empty() || phases.back().shares != shares) phases.push_back({k, k, shares});
      phases.back().end = k + 1;
    }
    const Places places = placed(phases);
    const Scratch whole(4 * places.whole * images.count()), own(4 * places.own * images.count());
    for (const Phase& phase : phases) {
      const auto carry = [&](Images some, Pool& pool) {
        const auto made = [&](int64_t k) {
          const int64_t size = chain_.steps[k].shape.size(), before = some.first - images.first;
          if (k + 1 == count_) return y_ + some.first * size;
          if (places.crosses[k]) return whole.as<float>() + places.at[k] * images.count() + before * size;
          return own.as<float>() + before * places.own + places.at[k] * some.count();
        };
        const int64_t inputs = static_cast<int64_t>(chain_.inputs.size());
        const auto value = [&](int64_t k) -> const float* {
          return k < inputs ? inputs_[k] + some.first * chain_.inputs[k].size() : made(k - inputs);
        };
        for (int64_t k = phase.begin; k < phase.end; ++k) {
          const ChainStep& step = chain_.steps[k];
          run_step(step, some.count(), value(step.source), step.second < 0 ? nullptr : value(step.second), made(k), pool);
        }
      };
      if (phase.shares) {
        carry(images, pool);
        continue;
      }
      parallel(pool, tasks, [&](int64_t task) {
        Alone alone;
        const int64_t begin = unit_ * (units * task / tasks), end = unit_ * (units * (task + 1) / tasks);
        carry({images.first + begin, std::min(images.end, images.first + end)}, alone);
      });
    }
  }

  Places placed(const std::vector<Phase>& phases) const {
    const int64_t inputs = static_cast<int64_t>(chain_.inputs.size());
    std::vector<int64_t> last(inputs + count_, -1);
    for (int64_t k = 0; k < count_; ++k) {
      last[chain_.steps[k].source] = k;
      if (chain_.steps[k].second >= 0) last[chain_.steps[k].second] = k;
    }
    // Other threads may still read what is read last in a phase.
    std::vector<int64_t> phase_end(count_);
    for (const Phase& phase : phases)
      for (int64_t k = phase.begin; k < phase.end; ++k) phase_end[k] = phase.end - 1;
    Places places;
    Room whole;
    for (const Phase& phase : phases) {
      Room own;
      for (int64_t k = phase.begin; k < phase.end; ++k) {
        const int64_t until = last[inputs + k], size = chain_.steps[k].shape.size();
        const bool crosses = until >= phase.end;
        places.crosses.push_back(crosses);
        places.at.push_back(crosses ? whole.take(size, k, phase_end[until]) : own.take(size, k, until));
      }
      places.own = std::max(places.own, own.size());
    }
    places.whole = whole.size();
    return places;
  }

  // Whether a thread with so many images would wait for the weights of a step.
  bool waits(const ChainStep& step, int64_t images) const {
    return step.kind == ChainStep::conv && images * step.shape.height * step.shape.width < kFewPixels &&
           step.bytes > chain_.cache;
  }

  void run_step(const ChainStep& step, int64_t count, const float* x, const float* z, float* y, Pool& pool) const {
    const ImageShape in = shape_of(chain_, step.source);
    if (step.kind == ChainStep::conv) {
      const Mask mask = mask_of(chain_, step);
      const int64_t most = is_tiled(mask, geometry_of(chain_, step, 1)) ? count : unit_;
      for (int64_t n = 0; n < count; n += most) {
        const int64_t at = n * step.shape.size();
        const Epilogue epilogue{nullptr, step.bias, step.relu, z == nullptr ? nullptr : z + at};
        forward(Type::f32, geometry_of(chain_, step, std::min(most, count - n)), mask, x + n * in.size(), nullptr,
                step.packed, epilogue, y + at, pool);
      }
      return;
    }
    const int64_t size = count * step.shape.size();
    if (step.kind == ChainStep::sum) {
      parallel(pool, div_up(size, kRun), [&](int64_t run) {
        const int64_t begin = run * kRun;
        add(x + begin, z + begin, step.relu, y + begin, std::min(kRun, size - begin));
      });
      return;
    }
    const int64_t rows = count * step.shape.height, row_size = step.shape.width * step.shape.channels;
    const int64_t tasks = std::clamp<int64_t>(size / kRun, 1, rows);
    parallel(pool, tasks, [&](int64_t task) {
      for (int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row)
        pool_row(step, in, x + row / step.shape.height * in.size(), row % step.shape.height, y + row * row_size);
    });
  }

  const Chain& chain_;
  const float* const* inputs_;
  float* const y_;
  const int64_t batch_, count_;
  int64_t unit_;  // images that stay together
};

}  // namespace

ChainStep read_step(const int64_t* n, float factor) {
  return {static_cast<ChainStep::Kind>(n[0]), n[1], n[2], {n[3], n[4], n[5]}, n[6], n[7], n[8], n[9], n[10], n[11],
          n[12] != 0, n[13], n[14], nullptr, 0, nullptr, factor};
}

ImageShape shape_of(const Chain& chain, int64_t value) {
  const int64_t inputs = static_cast<int64_t>(chain.inputs.size());
  return value < inputs ? chain.inputs[value] : chain.steps[value - inputs].shape;
}

Geometry geometry_of(const Chain& chain, const ChainStep& step, int64_t batch) {
  const ImageShape in = shape_of(chain, step.source);
  return {batch, in.height, in.width, step.shape.height, step.shape.width, step.kh, step.kw, step.stride_h, step.stride_w,
          step.pad_top, step.pad_left};
}

Mask mask_of(const Chain& chain, const ChainStep& step) {
  return {shape_of(chain, step.source).channels, step.shape.channels, step.filters, step.channels, {}, {}};
}

const char* wrong_with_last(const Chain& chain) {
  const ChainStep& step = chain.steps.back();
  const int64_t values = static_cast<int64_t>(chain.inputs.size() + chain.steps.size()) - 1;
  if (step.source < 0 || step.source >= values || step.second >= values) return "a value before it is made";
  const ImageShape in = shape_of(chain, step.source), out = step.shape;
  if (out.height < 1 || out.width < 1 || out.channels < 1) return "a result without numbers";
  const auto differs = [&](const ImageShape& each) {
    return each.height != out.height || each.width != out.width || each.channels != out.channels;
  };
  if (step.second >= 0 && differs(shape_of(chain, step.second))) return "a sum of values of different shapes";
  if (step.kind == ChainStep::sum) {
    if (step.second < 0) return "a sum of one value";
    return differs(in) ? "a sum of values of different shapes" : nullptr;
  }
  if (step.second >= 0 && step.kind != ChainStep::conv) return "a second value, which only sums and convolutions take";
  if (step.kind < ChainStep::conv || step.kind > ChainStep::sum) return "a step of an unknown kind";
  if (step.kh < 1 || step.kw < 1 || step.stride_h < 1 || step.stride_w < 1 || step.pad_top < 0 || step.pad_left < 0)
    return "windows and strides are positive, padding is not negative";
  if (step.kind != ChainStep::conv) return in.channels != out.channels ? "a pool that changes the channels" : nullptr;
  return step.filters < 1 || step.channels < 1 ? "tiles are positive" : nullptr;
}

void run_chain(const Chain& chain, int64_t batch, const float* const* inputs, float* y, Pool& pool) {
  Runner(chain, batch, inputs, y).run(pool);
}

}  // namespace clicktrain
