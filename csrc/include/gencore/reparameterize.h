// Fused reparameterized sampling (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4).
#pragma once

#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore {

// z = mu + exp(logvar / 2) * eps, with eps the noise of `shape` and `key`, and, where `kl` is not null,
// kl[b] = 1/2 sum_i (mu_i^2 + exp(logvar_i) - 1 - logvar_i), the divergence of sample b from the standard normal.
//
// mu, logvar: samples x elements; z: draws x samples x elements; all of `dtype` and of one memory order. slope, like z,
// may be null: else it becomes the derivative of z with respect to logvar, 1/2 exp(logvar / 2) * eps.
// kl: samples values of float32, or of float64 if that is `dtype`.
struct Reparameterize {
  const void* mu;
  const void* logvar;
  void* z;
  void* slope;
  void* kl;
  DType dtype;
  NoiseShape shape;
  NoiseKey key;
};

// The gradients; eps is made again, never stored:
//   grad_mu     = sum_d grad_z                                   + grad_kl mu
//   grad_logvar = sum_d grad_z eps * 1/2 exp(logvar / 2)          + grad_kl 1/2 (exp(logvar) - 1)
// grad_z, grad_kl and grad_mu may be null: the terms are then left out, or the result is not wanted. mu may be null
// if grad_kl is.
struct ReparameterizeBackward {
  const void* grad_z;
  const void* grad_kl;
  const void* mu;
  const void* logvar;
  void* grad_mu;
  void* grad_logvar;
  DType dtype;
  NoiseShape shape;
  NoiseKey key;
};

}  // namespace gencore

namespace gencore::cpu {

// `threads` is at least 1; small tensors take fewer.
Status reparameterize(const Reparameterize& args, int threads);
Status reparameterize_backward(const ReparameterizeBackward& args, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

// Where kl is wanted, `workspace` is device memory of as many bytes as reparameterize_workspace says, which may be 0.
std::int64_t reparameterize_workspace(DType dtype, const NoiseShape& shape);
Error reparameterize(const Reparameterize& args, void* workspace, Stream stream);
Error reparameterize_backward(const ReparameterizeBackward& args, Stream stream);

}  // namespace gencore::cuda
