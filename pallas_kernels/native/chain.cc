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

// Steps [begin, end) that a group of so many images takes one after the other, before the next group begins: what one
// step writes is in the cache when the next one reads it.
struct Segment {
  int64_t begin, end, images;
};

// Steps [begin, end) that each thread takes with its own images, or that all threads share.
struct Phase {
  int64_t begin, end;
  bool shares;
  std::vector<Segment> segments;
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
    for (const ChainStep& step : chain.steps)
      has_lanes_ = has_lanes_ || (step.kind == ChainStep::conv && !is_tiled(mask_of(chain, step), geometry_of(chain, step, 1)));
    unit_ = has_lanes_ ? std::clamp<int64_t>(div_up(batch, 2), 1, kMostImages) : 1;
    last_.assign(inputs_count() + count_, -1);
    for (int64_t k = 0; k < count_; ++k) {
      last_[chain.steps[k].source] = k;
      if (chain.steps[k].second >= 0) last_[chain.steps[k].second] = k;
    }
    // Maps get smaller as a rule: what a step makes of some images, the next ones take whole.
    together_.resize(count_);
    for (int64_t k = count_ - 1, most = kMostImages; k >= 0; --k) {
      const int64_t bytes = 4 * (shape_of(chain, chain.steps[k].source).size() + chain.steps[k].shape.size());
      while (most > 1 && most * bytes > chain.cache) most /= 2;
      together_[k] = most;
    }
  }

  void run(Pool& pool) const {
    const int64_t most = std::max<int64_t>(1, pool.threads() * kMostImages / unit_) * unit_;
    for (int64_t first = 0; first < batch_; first += most) run_images({first, std::min(batch_, first + most)}, pool);
  }

 private:
  int64_t inputs_count() const { return static_cast<int64_t>(chain_.inputs.size()); }

  struct Images {
    int64_t first, end;  // of the batch
    int64_t count() const { return end - first; }
  };
  // Where the values that are made lie: those that another phase reads for all images, those that another segment reads
  // for all of a task's, others for a group.
  enum class For { all, task, group };
  struct Places {
    std::vector<For> kind;
    std::vector<int64_t> at;  // in numbers of one image
    int64_t all = 0, task = 0;            // room in numbers of one image
    int64_t group = 0, shared_group = 0;  // room in numbers: for each task's group, and for one of all images
  };

  void run_images(Images images, Pool& pool) const {
    const int64_t units = div_up(images.count(), unit_), threads = pool.threads();
    const int64_t tasks = std::min(units, threads * div_up(div_up(images.count(), threads), kMostImages));
    // Where some threads would have too little to do, all share.
    const bool is_uneven = threads > 1 && 4 * threads * div_up(units, threads) > 5 * units;
    std::vector<Phase> phases;
    for (int64_t k = 0; k < count_; ++k) {
      const bool shares = is_uneven || waits(chain_.steps[k], images.count() / tasks);
      if (phases.empty() || phases.back().shares != shares) phases.push_back({k, k, shares, {}});
      Phase& phase = phases.back();
      const int64_t together = shares ? images.count() : together_[k];
      if (phase.segments.empty() || phase.segments.back().images != together) phase.segments.push_back({k, k, together});
      phase.segments.back().end = phase.end = k + 1;
    }
    const Places places = placed(phases);
    const Scratch all(4 * places.all * images.count()), own(4 * places.task * images.count());
    const Scratch groups(4 * std::max(places.group * tasks, places.shared_group));
    for (const Phase& phase : phases) {
      const auto carry = [&](Images some, int64_t task, Pool& pool) {
        // Step k's value of a group that begins at n of these images.
        const auto made = [&](int64_t k, const Segment& segment, int64_t n) {
          const int64_t size = chain_.steps[k].shape.size(), before = some.first - images.first;
          if (k + 1 == count_) return y_ + (some.first + n) * size;
          if (places.kind[k] == For::all) return all.as<float>() + places.at[k] * images.count() + (before + n) * size;
          if (places.kind[k] == For::task)
            return own.as<float>() + before * places.task + places.at[k] * some.count() + n * size;
          return groups.as<float>() + task * places.group + places.at[k] * segment.images;
        };
        const auto value = [&](int64_t index, const Segment& segment, int64_t n) -> const float* {
          const int64_t k = index - inputs_count();
          return k < 0 ? inputs_[index] + (some.first + n) * chain_.inputs[index].size() : made(k, segment, n);
        };
        for (const Segment& segment : phase.segments)
          for (int64_t n = 0, next; n < some.count(); n = next) {
            next = phase.shares ? some.count() : group_end(n, segment.images, some.count());
            for (int64_t k = segment.begin; k < segment.end; ++k) {
              const ChainStep& step = chain_.steps[k];
              const float* z = step.second < 0 ? nullptr : value(step.second, segment, n);
              run_step(k, next - n, value(step.source, segment, n), z, made(k, segment, n), pool);
            }
          }
      };
      if (phase.shares) {
        carry(images, 0, pool);
        continue;
      }
      parallel(pool, tasks, [&](int64_t task) {
        Alone alone;
        const int64_t begin = unit_ * (units * task / tasks), end = unit_ * (units * (task + 1) / tasks);
        carry({images.first + begin, std::min(images.end, images.first + end)}, task, alone);
      });
    }
  }

  Places placed(const std::vector<Phase>& phases) const {
    // While a phase lasts, other threads may still read what is read last in it; while a segment lasts, other groups.
    std::vector<int64_t> phase_end(count_), segment_end(count_);
    for (const Phase& phase : phases)
      for (const Segment& segment : phase.segments)
        for (int64_t k = segment.begin; k < segment.end; ++k) phase_end[k] = phase.end - 1, segment_end[k] = segment.end - 1;
    Places places;
    Room all;
    for (const Phase& phase : phases) {
      Room task;
      for (const Segment& segment : phase.segments) {
        Room group;
        for (int64_t k = segment.begin; k < segment.end; ++k) {
          const int64_t until = last_[inputs_count() + k], size = chain_.steps[k].shape.size();
          places.kind.push_back(until >= phase.end ? For::all : until >= segment.end ? For::task : For::group);
          places.at.push_back(until >= phase.end     ? all.take(size, k, phase_end[until])
                              : until >= segment.end ? task.take(size, segment.begin, segment_end[until])
                                                     : group.take(size, k, until));
        }
        int64_t& room = phase.shares ? places.shared_group : places.group;
        room = std::max(room, group.size() * segment.images);
      }
      places.task = std::max(places.task, task.size());
    }
    places.all = all.size();
    return places;
  }

  // Whether a thread with so many images would wait for the weights of a step.
  bool waits(const ChainStep& step, int64_t images) const {
    return step.kind == ChainStep::conv && images * step.shape.height * step.shape.width < kFewPixels &&
           step.bytes > chain_.cache;
  }

  // Where a group of images ends that begins at n: each unit is divided alike, whoever has it.
  int64_t group_end(int64_t n, int64_t most, int64_t count) const {
    return std::min({count, n + most, has_lanes_ ? (n / unit_ + 1) * unit_ : count});
  }

  void run_step(int64_t index, int64_t count, const float* x, const float* z, float* y, Pool& pool) const {
    const ChainStep& step = chain_.steps[index];
    const ImageShape in = shape_of(chain_, step.source);
    if (step.kind == ChainStep::conv) {
      const Mask mask = mask_of(chain_, step);
      const bool is_whole = is_tiled(mask, geometry_of(chain_, step, 1));
      for (int64_t n = 0, next; n < count; n = next) {
        next = is_whole ? count : group_end(n, together_[index], count);
        const int64_t at = n * step.shape.size();
        const Epilogue epilogue{nullptr, step.bias, step.relu, z == nullptr ? nullptr : z + at};
        forward(Type::f32, geometry_of(chain_, step, next - n), mask, x + n * in.size(), nullptr,
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
  // The order of the sums in lanes depends on how many images there are: groups are of as many, whoever takes them.
  bool has_lanes_ = false;
  int64_t unit_;                   // images that are never divided between tasks
  std::vector<int64_t> together_;  // of each step: so many images at once, whose maps stay in the cache
  std::vector<int64_t> last_;      // of each value: the step that reads it last
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
