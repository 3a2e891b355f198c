// BatchNorm of a training step and what follows it, in few passes over the images: the interface of norm.cc.
#pragma once

#include "core.h"

namespace clicktrain {

// z = (x - mean) / sqrt(var + epsilon) * scale + bias over images (batch, height, width, channels), with the mean and
// the variance of each channel over all pixels; then y = pool(relu(z + added)), each part where it is asked for.
struct Norm {
  int64_t batch, height, width, channels;
  float epsilon;
  bool relu;
  bool pool;  // the largest of each 2x2 pixels side by side; height and width are even, and nothing is added
};

// x and y of `type`, and so is `added`, of x's shape or null; y is (batch, height / 2, width / 2, channels) where it is
// pooled. mean and var, scale and bias are (channels,).
void batch_norm(Type type, const Norm& norm, const void* x, const float* scale, const float* bias, const void* added,
                void* y, float* mean, float* var, Pool& pool);

// The gradients of all arguments from those of y, mean and var. Where something was added, `dadded` is its gradient and
// `y` the result, which is read where there is a ReLU; else both are null.
void batch_norm_gradient(Type type, const Norm& norm, const void* dy, const float* dmean, const float* dvar,
                         const void* x, const void* y, const float* scale, const float* bias, const float* mean,
                         const float* var, void* dx, float* dscale, float* dbias, void* dadded, Pool& pool);

}  // namespace clicktrain
