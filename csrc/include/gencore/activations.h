// The activations, a row each: a function with its first and second derivative, and what a name makes of one.
//
// `P` names the arithmetic, as for math.h: a SIMD level of the CPU kernels, a lane of a GPU, or binary64.
#pragma once

#include <math.h>

#include <limits>

#include "gencore/math.h"

namespace gencore {

enum class Activation : int {
  linear = 0,
  silu = 1,
  relu = 2,
  leaky_relu = 3,
  tanh = 4,
  sigmoid = 5,
  elu = 6,
  selu = 7,
  softplus = 8,
  gelu = 9,
};
constexpr int activations = 10;

// t where t > 0, else slope t.
template <class P>
struct PiecewiseLinear {
  using F = typename P::F;
  F slope;

  GENCORE_MEMBER F value(F t) const { return P::mul(t, first(t)); }
  GENCORE_MEMBER F first(F t) const { return P::select(P::greater(t, P::set(0)), P::set(1), slope); }
  GENCORE_MEMBER F second(F) const { return P::set(0); }
};

// t sigmoid(t).
template <class P>
struct Silu {
  using F = typename P::F;

  GENCORE_MEMBER static F sigmoid(F t) { return P::div(P::set(1), P::add(P::set(1), exponential_minus<P>(t))); }
  // From t and s = sigmoid(t).
  GENCORE_MEMBER static F first(F t, F s) { return P::mul(s, P::fma(t, P::sub(P::set(1), s), P::set(1))); }
  GENCORE_MEMBER static F second(F t, F s) {
    const F slope = P::mul(s, P::sub(P::set(1), s));
    return P::mul(slope, P::fma(t, P::fma(P::set(-2), s, P::set(1)), P::set(2)));
  }

  GENCORE_MEMBER F value(F t) const { return P::div(t, P::add(P::set(1), exponential_minus<P>(t))); }
  GENCORE_MEMBER F first(F t) const { return first(t, sigmoid(t)); }
  GENCORE_MEMBER F second(F t) const { return second(t, sigmoid(t)); }
};

// 1 / (1 + e^-t), with more digits than SiLU's at large -t. The derivatives are made of e^-|t|, which never overflows,
// and lose no digits at either end.
template <class P>
struct Sigmoid {
  using F = typename P::F;

  GENCORE_MEMBER F value(F t) const {
    return P::div(P::set(1), P::add(P::set(1), exponential<P>(P::sub(P::set(0), t))));
  }
  GENCORE_MEMBER F first(F t) const { return slope(decay(t)); }
  GENCORE_MEMBER F second(F t) const {
    const F e = decay(t), falls = P::mul(slope(e), P::div(P::sub(e, P::set(1)), P::add(e, P::set(1))));
    return P::select(P::greater(t, P::set(0)), falls, P::sub(P::set(0), falls));
  }

  // e^-|t|.
  GENCORE_MEMBER static F decay(F t) { return exponential<P>(P::min(t, P::sub(P::set(0), t))); }
  // e / (1 + e)^2.
  GENCORE_MEMBER static F slope(F e) {
    const F whole = P::add(P::set(1), e);
    return P::div(P::div(e, whole), whole);
  }
};

template <class P>
struct Tanh {
  using F = typename P::F;

  GENCORE_MEMBER F value(F t) const {
    // tanh(-|t|) = m / (m + 2) with m = e^(-2 |t|) - 1.
    const F m = exponential_less_one<P>(minus_twice(t)), negative = P::div(m, P::add(m, P::set(2)));
    return P::select(P::greater(t, P::set(0)), P::sub(P::set(0), negative), negative);
  }
  GENCORE_MEMBER F first(F t) const { return P::mul(P::set(4), Sigmoid<P>::slope(exponential<P>(minus_twice(t)))); }
  GENCORE_MEMBER F second(F t) const { return P::mul(P::mul(P::set(-2), value(t)), first(t)); }

  GENCORE_MEMBER static F minus_twice(F t) { return P::mul(P::set(2), P::min(t, P::sub(P::set(0), t))); }
};

// t where t > 0, else slope (e^t - 1).
template <class P>
struct Elu {
  using F = typename P::F;
  F slope;

  GENCORE_MEMBER F value(F t) const {
    return P::select(P::greater(t, P::set(0)), t, P::mul(slope, exponential_less_one<P>(at_most_zero(t))));
  }
  GENCORE_MEMBER F first(F t) const { return P::select(P::greater(t, P::set(0)), P::set(1), falling(t)); }
  GENCORE_MEMBER F second(F t) const { return P::select(P::greater(t, P::set(0)), P::set(0), falling(t)); }

 private:
  // min gives its second operand if one is NaN.
  GENCORE_MEMBER static F at_most_zero(F t) { return P::min(P::set(0), t); }
  GENCORE_MEMBER F falling(F t) const { return P::mul(slope, exponential<P>(at_most_zero(t))); }
};

// ln(1 + e^t).
template <class P>
struct Softplus {
  using F = typename P::F;

  GENCORE_MEMBER F value(F t) const { return P::add(P::max(P::set(0), t), log_of_one_and<P>(Sigmoid<P>::decay(t))); }
  GENCORE_MEMBER F first(F t) const { return Silu<P>::sigmoid(t); }
  GENCORE_MEMBER F second(F t) const { return Sigmoid<P>::slope(Sigmoid<P>::decay(t)); }
};

// t times the standard normal distribution function, exactly: no approximation by tanh.
template <class P>
struct Gelu {
  using F = typename P::F;

  GENCORE_MEMBER F value(F t) const { return P::mul(t, below(t, normal_at<P>(t).beyond)); }
  GENCORE_MEMBER F first(F t) const {
    const auto normal = normal_at<P>(t);
    return P::fma(t, normal.density, below(t, normal.beyond));
  }
  GENCORE_MEMBER F second(F t) const {
    return P::mul(normal_at<P>(t).density, P::fma(P::sub(P::set(0), t), t, P::set(2)));
  }

 private:
  GENCORE_MEMBER static F below(F t, F beyond) {
    return P::select(P::greater(t, P::set(0)), P::sub(P::set(1), beyond), beyond);
  }
};

// What makes an activation of one of the functions above: y = min(max(factor f(t), lower), upper).
struct ActivationForm {
  enum Function : int { piecewise_linear, silu, sigmoid, tanh, elu, softplus, gelu };

  Function function;
  double slope, factor, lower, upper;
};

// The table. `slope` is that of leaky_relu; `clamp` bounds the size of y, infinity does not.
static inline ActivationForm form_of(Activation activation, double slope, double gain, double clamp) {
  // Klambauer et al., "Self-Normalizing Neural Networks" (2017), equation 14.
  constexpr double selu_scale = 1.0507009873554804934, selu_slope = 1.6732632423543772848;
  using Form = ActivationForm;
  switch (activation) {
    case Activation::relu: {
      // The half of the identity that is positive before the gain.
      return {Form::piecewise_linear, 1, gain, gain > 0 ? 0 : -clamp, gain > 0 ? clamp : 0};
    }
    case Activation::leaky_relu: return {Form::piecewise_linear, slope, gain, -clamp, clamp};
    case Activation::tanh: return {Form::tanh, 0, gain, -clamp, clamp};
    case Activation::sigmoid: return {Form::sigmoid, 0, gain, -clamp, clamp};
    case Activation::elu: return {Form::elu, 1, gain, -clamp, clamp};
    case Activation::selu: return {Form::elu, selu_slope, gain * selu_scale, -clamp, clamp};
    case Activation::softplus: return {Form::softplus, 0, gain, -clamp, clamp};
    case Activation::silu: return {Form::silu, 0, gain, -clamp, clamp};
    case Activation::gelu: return {Form::gelu, 0, gain, -clamp, clamp};
    default: return {Form::piecewise_linear, 1, gain, -clamp, clamp};
  }
}

// The form in the arithmetic of A, float or double. Beyond `below` and `above` y has reached a bound, and no change of
// t changes it.
template <class A>
struct ActivationNumbers {
  A slope, factor, lower, upper, below, above;
};

static inline float next_after(float x, float towards) { return ::nextafterf(x, towards); }
static inline double next_after(double x, double towards) { return ::nextafter(x, towards); }

template <class A>
static inline ActivationNumbers<A> numbers_of(const ActivationForm& form) {
  // A subnormal number may count as 0.
  constexpr A infinity = std::numeric_limits<A>::infinity(), least = std::numeric_limits<A>::min();
  const A lower = static_cast<A>(form.lower), upper = static_cast<A>(form.upper);
  return {static_cast<A>(form.slope),
          static_cast<A>(form.factor),
          lower,
          upper,
          lower == 0           ? least
          : lower == -infinity ? lower
                               : next_after(lower, infinity),
          upper == 0          ? -least
          : upper == infinity ? upper
                              : next_after(upper, -infinity)};
}

}  // namespace gencore
