// Layers of a net one after the other in one call: convolutions, pools and sums on float32 images.
//
// Where there are as many images as threads, each thread carries some images through all layers: what a layer writes
// is in the core's cache when the next one reads it, and nobody waits for anybody; of large maps it takes a few images
// at a time. Of fewer images, each layer has all threads. Results have the same bits in both ways, and for any number of
// threads.
#pragma once

#include <vector>

#include "core.h"

namespace clicktrain {

struct ImageShape {
  int64_t height, width, channels;
  int64_t size() const { return height * width * channels; }
};

struct ChainStep {
  enum Kind : int64_t { conv = 0, max_pool = 1, sum_pool = 2, sum = 3 };
  Kind kind;
  // Values: first those that are given, then what each step makes, the last of which is the result.
  int64_t source, second;  // `second`: of a sum, or what a convolution adds before its ReLU; -1 where there is none
  ImageShape shape;        // of what the step makes
  int64_t kh, kw, stride_h, stride_w, pad_top, pad_left;
  bool relu;
  // Of a convolution, with weights that are packed; bias may be null.
  int64_t filters, channels;  // of a tile
  const void* packed;
  int64_t bytes;  // of them
  const float* bias;
  float factor;  // of a pool's sums
};

struct Chain {
  std::vector<ImageShape> inputs;
  std::vector<ChainStep> steps;
  int64_t cache = 512 * 1024;  // of a core, for a step's weights, and for the maps that it reads and writes
};

// Numbers of one step where it comes as an array: kind, source, second, height, width, channels, kh, kw, stride_h,
// stride_w, pad_top, pad_left, relu, filters, channels of a tile, and for the caller where packed weights and bias are.
constexpr int64_t kStepNumbers = 17;
ChainStep read_step(const int64_t* numbers, float factor);

// What is wrong with the last step, of a chain whose other steps are right; null if nothing is.
const char* wrong_with_last(const Chain& chain);
ImageShape shape_of(const Chain& chain, int64_t value);
// Of the convolution that a step is.
Geometry geometry_of(const Chain& chain, const ChainStep& step, int64_t batch);
Mask mask_of(const Chain& chain, const ChainStep& step);

// inputs: (batch, ...) each, of their shapes; y (batch, ...) of the last step's.
void run_chain(const Chain& chain, int64_t batch, const float* const* inputs, float* y, Pool& pool);

}  // namespace clicktrain
