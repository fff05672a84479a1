// The training loss of diffusion models (Ho et al. 2020, equation 14; Nichol and Dhariwal, "Improved Denoising
// Diffusion Probabilistic Models", 2021, equation 16).
#pragma once

#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore {

// loss[b] = the mean over the elements i of sample b of
//   weight d_i^2 + bound_weight L_i,   d = prediction - (of_x0 x0 + of_noise eps),
// with eps the noise of `shape` (whose draws are 1) and `key`, or `noise`. L is the term of the variational bound: with
// lv = middle + half_range v the log variance of p(x_{t-1} | x_t), and `moved` d the distance of its mean from that of
// the posterior, whose log variance is `posterior`,
//   L = 1/2 (-1 + gap + e^-gap + (moved d)^2 e^-lv),   gap = lv - posterior.
// Where `posterior` is minus infinity (the first step), L is instead -log of the probability of the 8-bit value x0 in
// [-1, 1] (bins of 2/255, the outermost reaching to infinity) under N(x0 + moved d, e^lv), at least 1e-12; computed in
// binary64.
//
// Where of_x0 is 0, x0 is not read but for the decoder's term. output: samples x elements or, if `learned`, samples x 2
// elements: the prediction, then v, in twice the channels (so in logical order one after the other, in channels_last
// side by side in every pixel). x0: samples x elements. noise: like x0; null if eps is to be made, else `key` is not
// used. loss: samples values of float32, or of float64 if that is `dtype`. table: the columns of_x0, of_noise, weight,
// bound_weight, moved, middle, half_range, posterior. error, like x0, may be null: else d is written there, rounded to
// `dtype`; `learned` is then false. On the CPU alone.
struct DenoisingLoss {
  const void* output;
  const void* x0;
  const void* noise;
  void* loss;
  DType dtype;
  NoiseShape shape;
  bool learned;
  Coefficients table;
  NoiseKey key;
  void* error = nullptr;

  static constexpr int columns = 8;
};

// grad_output, like output: grad_loss / elements times
//   2 weight d                                        for the prediction,
//   bound_weight half_range dL / dlv                  for v; the bound has no gradient for the prediction.
// grad_loss: as loss.
struct DenoisingLossBackward {
  const void* grad_loss;
  const void* output;
  const void* x0;
  const void* noise;
  void* grad_output;
  DType dtype;
  NoiseShape shape;
  bool learned;
  Coefficients table;
  NoiseKey key;
};

}  // namespace gencore

namespace gencore::cpu {

// `threads` is at least 1; small tensors take fewer. An index that is not in the table is an invalid argument.
Status denoising_loss(const DenoisingLoss& args, int threads);
Status denoising_loss_backward(const DenoisingLossBackward& args, int threads);
// From d to the gradient, in its place: args.grad_output holds the one, then the other. `learned` is false; output, x0,
// noise and key are not used.
Status denoising_loss_scale(const DenoisingLossBackward& args, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

// `workspace` is device memory of as many bytes as denoising_loss_workspace says, which may be 0.
std::int64_t denoising_loss_workspace(DType dtype, const NoiseShape& shape);
Error denoising_loss(const DenoisingLoss& args, void* workspace, Stream stream);
Error denoising_loss_backward(const DenoisingLossBackward& args, Stream stream);

}  // namespace gencore::cuda
