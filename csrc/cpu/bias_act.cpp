#include "gencore/bias_act.h"

#include "channelwise.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// An activation with its gain and its bounds.
template <class P, class A, class Function>
struct Scaled {
  using F = typename P::F;

  Function function;
  F factor, lower, upper, below, above;
  // Whether the value is needed to tell whether it has reached a bound.
  bool bounded;

  Scaled(const Function& function_, const ActivationNumbers<A>& numbers)
      : function(function_),
        factor(P::set(numbers.factor)),
        lower(P::set(numbers.lower)),
        upper(P::set(numbers.upper)),
        below(P::set(numbers.below)),
        above(P::set(numbers.above)),
        bounded(std::isfinite(numbers.lower) || std::isfinite(numbers.upper)) {}

  // min and max give their second operand if one is NaN.
  F value(F t) const { return P::max(lower, P::min(upper, unbounded(t))); }
  F unbounded(F t) const { return P::mul(factor, function.value(t)); }
  F first(F t) const { return P::mul(factor, function.first(t)); }
  F second(F t) const { return P::mul(factor, function.second(t)); }

  // A derivative, which is 0 where y, or what it was before it was bounded, is beyond a bound.
  F within(F y, F derivative) const {
    const F zero = P::set(0);
    return P::select(P::greater(y, above), zero, P::select(P::greater(below, y), zero, derivative));
  }
};

// Calls body(an activation of that form).
template <class P, class A, class Body>
void with_form(const ActivationForm& form, Body&& body) {
  const ActivationNumbers<A> numbers = numbers_of<A>(form);
  const auto call = [&](auto function) { body(Scaled<P, A, decltype(function)>(function, numbers)); };
  switch (form.function) {
    case ActivationForm::piecewise_linear: return call(PiecewiseLinear<P>{P::set(numbers.slope)});
    case ActivationForm::silu: return call(Silu<P>());
    case ActivationForm::sigmoid: return call(Sigmoid<P>());
    case ActivationForm::tanh: return call(Tanh<P>());
    case ActivationForm::elu: return call(Elu<P>{P::set(numbers.slope)});
    case ActivationForm::softplus: return call(Softplus<P>());
    case ActivationForm::gelu: return call(Gelu<P>());
  }
}

template <class T>
Status forward(const BiasAct& args, int threads) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  Channelwise<T> channelwise(args.shape, args.bias, {}, nullptr, threads);
  if (!channelwise.ok()) return Status::out_of_memory;
  const T* const x = static_cast<const T*>(args.x);
  T* const y = static_cast<T*>(args.y);
  with_form<P, Accumulator<T>>(form_of(args.settings), [&](const auto& activation) {
    channelwise.run([=](std::int64_t i, std::int64_t count, F bias, F) {
      store_part<P>(y + i, activation.value(P::add(load_part<P>(x + i, count), bias)), count);
    });
  });
  return Status::ok;
}

template <class T>
Status backward(const BiasActBackward& args, int threads) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  Channelwise<T> channelwise(args.shape, args.bias, args.shift, args.sums, threads);
  if (!channelwise.ok()) return Status::out_of_memory;
  const T* const grad = static_cast<const T*>(args.grad);
  const T* const at = static_cast<const T*>(args.at);
  T* const product = static_cast<T*>(args.product);
  const bool at_output = args.at_output;
  with_form<P, Accumulator<T>>(form_of(args.settings), [&](const auto& activation) {
    channelwise.run([=](std::int64_t i, std::int64_t count, F bias, F shift) {
      const F w = grad == nullptr ? shift : P::add(load_part<P>(grad + i, count), shift);
      F t = load_part<P>(at + i, count), y = t;
      if (!at_output) {
        t = P::add(t, bias);
        if (activation.bounded) y = activation.unbounded(t);
      }
      const F result = activation.within(y, P::mul(activation.first(t), w));
      if (product != nullptr) store_part<P>(product + i, result, count);
      return result;
    });
  });
  return Status::ok;
}

template <class T>
Status double_backward(const BiasActDoubleBackward& args, int threads) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  Channelwise<T> channelwise(args.shape, args.bias, args.shift, args.sums, threads);
  if (!channelwise.ok()) return Status::out_of_memory;
  const T* const grad = static_cast<const T*>(args.grad);
  const T* const x = static_cast<const T*>(args.x);
  const T* const direction = static_cast<const T*>(args.direction);
  T* const grad_grad = static_cast<T*>(args.grad_grad);
  T* const grad_x = static_cast<T*>(args.grad_x);
  with_form<P, Accumulator<T>>(form_of(args.settings), [&](const auto& activation) {
    channelwise.run([=](std::int64_t i, std::int64_t count, F bias, F shift) {
      const F w = direction == nullptr ? shift : P::add(load_part<P>(direction + i, count), shift);
      const F t = P::add(load_part<P>(x + i, count), bias), g = load_part<P>(grad + i, count);
      const F y = activation.bounded ? activation.unbounded(t) : t;
      const F of_x = activation.within(y, P::mul(P::mul(activation.second(t), g), w));
      if (grad_grad != nullptr) {
        store_part<P>(grad_grad + i, activation.within(y, P::mul(activation.first(t), w)), count);
      }
      if (grad_x != nullptr) store_part<P>(grad_x + i, of_x, count);
      return of_x;
    });
  });
  return Status::ok;
}

}  // namespace

Status bias_act(const BiasAct& args, int threads) {
  return with_type_of_level(args.dtype,
                            [&](auto* type) { return forward<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

Status bias_act_backward(const BiasActBackward& args, int threads) {
  return with_type_of_level(args.dtype,
                            [&](auto* type) { return backward<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

Status bias_act_double_backward(const BiasActDoubleBackward& args, int threads) {
  return with_type_of_level(
      args.dtype, [&](auto* type) { return double_backward<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status bias_act(const BiasAct&, int))
GENCORE_DECLARE_LEVELS(Status bias_act_backward(const BiasActBackward&, int))
GENCORE_DECLARE_LEVELS(Status bias_act_double_backward(const BiasActDoubleBackward&, int))

namespace {

bool is_empty(const BiasActShape& shape) { return shape.outer * shape.channels * shape.inner == 0; }

// Sums over nothing.
void set_zero(void* sums, DType dtype, const BiasActShape& shape) {
  const std::size_t size = dtype == DType::float64 ? sizeof(double) : sizeof(float);
  if (sums != nullptr) std::memset(sums, 0, static_cast<std::size_t>(shape.channels) * size);
}

}  // namespace

Status bias_act(const BiasAct& args, int threads) {
  if (threads < 1 || !is_valid(args.shape) || !is_valid(args.settings)) return Status::invalid_argument;
  if (!has_valid_type(args.bias, args.dtype)) return Status::invalid_argument;
  if (is_empty(args.shape)) return Status::ok;
  if (args.x == nullptr || args.y == nullptr) return Status::invalid_argument;
  if (args.dtype == DType::float64) return scalar::bias_act(args, threads);
  GENCORE_DISPATCH(bias_act, args, threads);
}

Status bias_act_backward(const BiasActBackward& args, int threads) {
  if (threads < 1 || !is_valid(args.shape) || !is_valid(args.settings)) return Status::invalid_argument;
  if (!has_valid_type(args.bias, args.dtype) || !has_valid_type(args.shift, args.dtype)) {
    return Status::invalid_argument;
  }
  if (args.at_output && !output_tells(args.settings)) return Status::invalid_argument;
  if (is_empty(args.shape)) {
    set_zero(args.sums, args.dtype, args.shape);
    return Status::ok;
  }
  if (args.at == nullptr) return Status::invalid_argument;
  if (args.dtype == DType::float64) return scalar::bias_act_backward(args, threads);
  GENCORE_DISPATCH(bias_act_backward, args, threads);
}

Status bias_act_double_backward(const BiasActDoubleBackward& args, int threads) {
  if (threads < 1 || !is_valid(args.shape) || !is_valid(args.settings)) return Status::invalid_argument;
  if (!has_valid_type(args.bias, args.dtype) || !has_valid_type(args.shift, args.dtype)) {
    return Status::invalid_argument;
  }
  if (is_empty(args.shape)) {
    set_zero(args.sums, args.dtype, args.shape);
    return Status::ok;
  }
  if (args.x == nullptr || args.grad == nullptr) return Status::invalid_argument;
  if (args.dtype == DType::float64) return scalar::bias_act_double_backward(args, threads);
  GENCORE_DISPATCH(bias_act_double_backward, args, threads);
}

}  // namespace gencore::cpu
#endif
