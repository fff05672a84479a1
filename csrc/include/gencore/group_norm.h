// Group normalization (Wu and He, 2018), with what stands around it in U-Nets in the same pass: the embedding added
// before, scale and shift (adaptive group normalization), the activation.
#pragma once

#include "gencore/activations.h"
#include "gencore/channel_values.h"
#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore {

// A tensor of samples x channels x pixels, or, with channels_last, samples x pixels x channels. A group is
// channels / groups neighbouring channels of a sample with all their pixels.
struct GroupNormShape {
  std::int64_t samples, channels, pixels, groups;
  bool channels_last;
};

// With u = x + bias_in, mean and variance (biased) of u over each group, and xhat = (u - mean) / sqrt(variance + eps):
//   y = act((xhat * weight + bias) * (1 + scale) + shift)
// where a value that is left out is 0, and weight 1. y may be x.
//
// `statistics`, which may be null, receives mean and 1 / sqrt(variance + eps) of each group, samples x groups x 2.
struct GroupNorm {
  const void* x;
  void* y;
  double* statistics;
  DType dtype;
  GroupNormShape shape;
  double eps;
  // linear or silu, here and below.
  Activation activation;
  ChannelValues weight, bias, scale, shift, bias_in;
};

// The gradients, from `statistics` of the forward pass. With t the argument of act, z = xhat * weight + bias,
// dt = grad_y act'(t), k = weight (1 + scale), and m the number of elements of a group:
//   grad_x = (k dt - 1/m sum_group(k dt) - xhat 1/m sum_group(k dt xhat)) / sqrt(variance + eps)
//   grad_weight = sum_samples,pixels((1 + scale) dt xhat)      grad_bias    = sum_samples,pixels((1 + scale) dt)
//   grad_scale  = sum_pixels(dt z)                             grad_shift   = sum_pixels(dt)
//   grad_bias_in = sum_pixels(grad_x)
// Each may be null: it is then not wanted. grad_x is like x, the others are dense and of the dtype of their value.
struct GroupNormBackward {
  const void* grad_y;
  const void* x;
  const double* statistics;
  DType dtype;
  GroupNormShape shape;
  Activation activation;
  ChannelValues weight, bias, scale, shift, bias_in;
  void *grad_x, *grad_weight, *grad_bias, *grad_scale, *grad_shift, *grad_bias_in;
};

// A change of x and of the values, of the dtypes of what it is of. Null: that does not change. d_x is like x.
struct GroupNormDirection {
  const void* x;
  ChannelValues weight, bias, scale, shift, bias_in;
};

// The change of y along a direction, from `statistics` of the forward pass. With a = weight (1 + scale),
// b = bias (1 + scale) + shift, t = xhat a + b and P(v) = v - mean_group(v) - xhat mean_group(v xhat):
//   d_xhat = P(d_x + d_bias_in) / sqrt(variance + eps)
//   d_y = act'(t) (a d_xhat + xhat d_a + d_b)
struct GroupNormJvp {
  const void* x;
  void* d_y;
  const double* statistics;
  DType dtype;
  GroupNormShape shape;
  Activation activation;
  ChannelValues weight, bias, scale, shift, bias_in;
  GroupNormDirection direction;
};

// The gradients of sum(d_y grad_y), with d_y as above. It is the sum of the direction times the gradients that
// GroupNormBackward makes, so that these are what the gradients' gradients are. With dt = a d_xhat + xhat d_a + d_b,
// h = grad_y act'(t), k = grad_y act''(t) dt, r = 1 / sqrt(variance + eps), m the number of elements of a group, and
// du = d_x + d_bias_in:
//   grad_grad_y = act'(t) dt
//   grad_x = r (P(v) - xhat mean_group(a h d_xhat)),  v = a k + d_a h - r (mean(a h xhat) du + mean(du xhat) a h)
//   grad_a = sum_pixels(k xhat + h d_xhat)       grad_b = sum_pixels(k)
//   grad_weight = sum_samples((1 + scale) grad_a + d_scale sum_pixels(h xhat))
//   grad_bias = sum_samples((1 + scale) grad_b + d_scale sum_pixels(h))
//   grad_scale = weight grad_a + bias grad_b + d_weight sum_pixels(h xhat) + d_bias sum_pixels(h)
//   grad_shift = grad_b                          grad_bias_in = sum_pixels(grad_x)
// Each may be null: it is then not wanted. grad_grad_y and grad_x are like x, the others dense and of the dtype of
// their value.
struct GroupNormDoubleBackward {
  const void* grad_y;
  const void* x;
  const double* statistics;
  DType dtype;
  GroupNormShape shape;
  Activation activation;
  ChannelValues weight, bias, scale, shift, bias_in;
  GroupNormDirection direction;
  void *grad_grad_y, *grad_x, *grad_weight, *grad_bias, *grad_scale, *grad_shift, *grad_bias_in;
};

// Whether the sizes fit together.
static inline bool is_valid(const GroupNormShape& shape) {
  if (shape.samples < 0 || shape.channels < 0 || shape.pixels < 0 || shape.groups < 1) return false;
  std::int64_t planes, total;
  return shape.channels % shape.groups == 0 && !__builtin_mul_overflow(shape.samples, shape.channels, &planes) &&
         !__builtin_mul_overflow(planes, shape.pixels, &total);
}

// Whether every value has a type that it may have with a tensor of type `dtype`.
template <class Values>
bool has_valid_types(const Values& given, DType dtype) {
  for (const ChannelValues* values : {&given.weight, &given.bias, &given.scale, &given.shift, &given.bias_in}) {
    if (values->data != nullptr && values->dtype != DType::float32 && values->dtype != dtype) return false;
  }
  return true;
}

// Whether the activation is known and every value has a type that it may have.
template <class Args>
bool has_valid_values(const Args& args) {
  return has_valid_types(args, args.dtype) &&
         (args.activation == Activation::linear || args.activation == Activation::silu);
}

// The same of the direction too.
template <class Args>
bool has_valid_changes(const Args& args) {
  return has_valid_values(args) && has_valid_types(args.direction, args.dtype);
}

}  // namespace gencore

namespace gencore::cpu {

// `threads` is at least 1; small tensors take fewer. The bits of the results do not depend on it.
Status group_norm(const GroupNorm& args, int threads);
Status group_norm_backward(const GroupNormBackward& args, int threads);
Status group_norm_jvp(const GroupNormJvp& args, int threads);
Status group_norm_double_backward(const GroupNormDoubleBackward& args, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

// `workspace` is device memory of as many bytes as the function of that name says, which may be 0.
std::int64_t group_norm_workspace(DType dtype, const GroupNormShape& shape);
Error group_norm(const GroupNorm& args, void* workspace, Stream stream);
std::int64_t group_norm_backward_workspace(DType dtype, const GroupNormShape& shape);
Error group_norm_backward(const GroupNormBackward& args, void* workspace, Stream stream);
std::int64_t group_norm_jvp_workspace(DType dtype, const GroupNormShape& shape);
Error group_norm_jvp(const GroupNormJvp& args, void* workspace, Stream stream);
std::int64_t group_norm_double_backward_workspace(DType dtype, const GroupNormShape& shape);
Error group_norm_double_backward(const GroupNormDoubleBackward& args, void* workspace, Stream stream);

}  // namespace gencore::cuda
