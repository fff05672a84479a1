// A step of any sampler of diffusion models: DDPM (Ho et al. 2020, Algorithm 2), DDIM, DPM-Solver++, Euler, Heun differ
// in their coefficients only.
#pragma once

#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore {

// With eps the noise of `shape` (whose draws are 1) and `key`, and lower-case names the columns of `table`:
//   g    = output * Output + second * Second
//   x0   = x0_scale * clamp(predict_x * X + predict_output * g, -limit, limit)
//   y    = x * X + direct * g + x0 * x0 + history0 * History0 + history1 * History1
//          + noise * exp(log_scale + log_scale_slope * v) * eps
//   Y    = mask * (known * Known + known_noise * eps) + (1 - mask) * y
// What is null is left out: without `output` g and x0 are (and `second` and `prediction` must be null), without
// `learned` the exponential is 1, without `known` (and `mask`) Y is y. Where noise and known_noise of a sample are 0
// its noise is not made. NaN propagates.
//
// Every tensor: samples x elements, all of `dtype` and of one memory order; `y` may be `x`. The channels of `output`
// and `second` are twice as many if `learned` and `second_learned`: the prediction, then v (of `second` not read); in
// logical order one after the other, in channels_last side by side in every pixel. `prediction`, if not null, gets x0.
// table: the columns output, second, predict_x, predict_output, limit, x0_scale, x, direct, x0, history0, history1,
// noise, log_scale, log_scale_slope, known, known_noise; no index.
struct DiffusionStep {
  const void* x;
  const void* output;
  const void* second;
  const void* history0;
  const void* history1;
  const void* known;
  const void* mask;
  void* y;
  void* prediction;
  DType dtype;
  NoiseShape shape;
  bool learned;
  bool second_learned;
  Coefficients table;
  NoiseKey key;

  static constexpr int columns = 16;
};

}  // namespace gencore

namespace gencore::cpu {

// `threads` is at least 1; small tensors take fewer.
Status diffusion_step(const DiffusionStep& args, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

Error diffusion_step(const DiffusionStep& args, Stream stream);

}  // namespace gencore::cuda
