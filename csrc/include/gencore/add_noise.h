// The forward process of diffusion models (Ho et al., "Denoising Diffusion Probabilistic Models", 2020, equation 4).
#pragma once

#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore {

// x_t = alpha x0 + sigma eps, with eps the noise of `shape` (whose draws are 1) and `key`; where `noise` is not null,
// eps is written there too.
//
// x0, x_t and noise: samples x elements, all of `dtype` and of one memory order; x_t may be x0.
// table: the columns alpha and sigma.
struct AddNoise {
  const void* x0;
  void* x_t;
  void* noise;
  DType dtype;
  NoiseShape shape;
  Coefficients table;
  NoiseKey key;

  static constexpr int columns = 2;
};

}  // namespace gencore

namespace gencore::cpu {

// `threads` is at least 1; small tensors take fewer. An index that is not in the table is an invalid argument.
Status add_noise(const AddNoise& args, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

Error add_noise(const AddNoise& args, Stream stream);

}  // namespace gencore::cuda
