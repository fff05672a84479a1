// A bias for each channel, an activation, a gain and a clamp in one pass (Karras et al., "Analyzing and Improving the
// Image Quality of StyleGAN", 2020, appendix B, fuses the first three), with its derivatives of first and second order.
#pragma once

#include "gencore/activations.h"
#include "gencore/channel_values.h"
#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore {

// A dense tensor of outer x channels x inner elements: samples, channels and pixels, or, in channels_last,
// samples x pixels, channels and 1.
struct BiasActShape {
  std::int64_t outer, channels, inner;
};

struct BiasActSettings {
  Activation activation;
  // That of leaky_relu.
  double slope;
  double gain;
  // At least 0; infinity: none.
  double clamp;
};

// y = min(max(gain act(x + bias), -clamp), clamp). y may be x.
//
// A bias has no stride between samples; a tensor of one channel with as many inner elements as there are may have none.
struct BiasAct {
  const void* x;
  void* y;
  DType dtype;
  BiasActShape shape;
  BiasActSettings settings;
  ChannelValues bias;
};

// With f' the derivative of y by its argument at x + bias, 0 where y has reached the clamp, and w = grad + shift:
//   product = f' w          sums = sum_outer,inner(product)
// which is the gradient for grad = grad_y, and the change of y for that of x and of the bias.
//
// `at` is x; or y, where the activation is piecewise linear, its slope is not negative and the gain is positive: `bias`
// is then not read. grad or shift may be null: 0. product or sums may be null: not wanted. sums: `channels` values of
// float32, or of float64 if that is `dtype`, which are added up in float32 by tens and then in float64, in an order of
// the shape's alone.
struct BiasActBackward {
  const void* grad;
  const void* at;
  void* product;
  void* sums;
  DType dtype;
  BiasActShape shape;
  BiasActSettings settings;
  bool at_output;
  ChannelValues bias, shift;
};

// The gradients of sum((f' grad) (direction + shift)): with w = direction + shift,
//   grad_grad = f' w          grad_x = f'' grad w          sums = sum_outer,inner(grad_x)
// direction or shift may be null: 0. Each result may be null: not wanted. sums as above.
struct BiasActDoubleBackward {
  const void* grad;
  const void* x;
  const void* direction;
  void* grad_grad;
  void* grad_x;
  void* sums;
  DType dtype;
  BiasActShape shape;
  BiasActSettings settings;
  ChannelValues bias, shift;
};

static inline bool is_valid(const BiasActShape& shape) {
  std::int64_t planes, total;
  return shape.outer >= 0 && shape.channels >= 0 && shape.inner >= 0 &&
         !__builtin_mul_overflow(shape.outer, shape.channels, &planes) &&
         !__builtin_mul_overflow(planes, shape.inner, &total);
}

static inline bool is_valid(const BiasActSettings& settings) {
  const int activation = static_cast<int>(settings.activation);
  return activation >= 0 && activation < activations && settings.clamp >= 0;
}

// Whether the type of a channel's values goes with that of a tensor.
static inline bool has_valid_type(const ChannelValues& values, DType dtype) {
  return values.data == nullptr || values.dtype == DType::float32 || values.dtype == dtype;
}

// Whether y tells the derivative.
static inline bool output_tells(const BiasActSettings& settings) {
  return form_of(settings.activation, settings.slope, settings.gain, settings.clamp).function ==
             ActivationForm::piecewise_linear &&
         settings.gain > 0 && !(settings.slope < 0);
}

static inline ActivationForm form_of(const BiasActSettings& settings) {
  return form_of(settings.activation, settings.slope, settings.gain, settings.clamp);
}

}  // namespace gencore

namespace gencore::cpu {

// `threads` is at least 1; small tensors take fewer. The bits of the results do not depend on it.
Status bias_act(const BiasAct& args, int threads);
Status bias_act_backward(const BiasActBackward& args, int threads);
Status bias_act_double_backward(const BiasActDoubleBackward& args, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

// `workspace` is device memory of as many bytes as bias_act_workspace says, where sums are wanted; tensors then begin
// at multiples of 16 bytes.
std::int64_t bias_act_workspace(DType dtype, const BiasActShape& shape);
Error bias_act(const BiasAct& args, Stream stream);
Error bias_act_backward(const BiasActBackward& args, void* workspace, Stream stream);
Error bias_act_double_backward(const BiasActDoubleBackward& args, void* workspace, Stream stream);

}  // namespace gencore::cuda
