// A tensor is a matrix of vectors of 16 bytes, or of single elements where rows are no multiple of that: its rows are
// planes of a channel, or, where those are single pixels as in channels_last, its columns are channels. A team of
// threads, a warp or a part of one, takes a piece of a row, or some columns of some rows.
#include <limits>

#include "gencore/bias_act.h"
#include "lane.cuh"
#include "launch.cuh"

namespace gencore::cuda {
namespace {

struct BiasActWork {
  // width: in vectors. A task is `of_task` vectors of a row, or so many rows of some columns.
  std::int64_t rows, width, channels, of_task, pieces, tasks;
  bool columns;
  int team_log2;

  // Sums of pieces lie as groups x channels x pieces.
  std::int64_t sum_groups() const { return columns ? pieces : rows / channels; }
  std::int64_t sum_pieces() const { return columns ? 1 : pieces; }
};

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The cut depends on the shape alone. n: elements of a vector.
BiasActWork make_work(const BiasActShape& shape, int n) {
  BiasActWork work{};
  work.columns = shape.inner == 1 && shape.channels > 1;
  work.channels = shape.channels;
  work.rows = work.columns ? shape.outer : shape.outer * shape.channels;
  work.width = (work.columns ? shape.channels : shape.inner) / n;
  while (1 << work.team_log2 < warp_threads && 1 << work.team_log2 < work.width) ++work.team_log2;
  const std::int64_t vectors = work.rows * work.width, team = 1 << work.team_log2;
  if (work.columns) {
    work.of_task = std::clamp<std::int64_t>(vectors >> 17, 8, 64);
    work.pieces = divide_up(work.rows, work.of_task);
    work.tasks = work.pieces * divide_up(work.width, team);
  } else {
    work.of_task = team * std::clamp<std::int64_t>(vectors >> 17, 1, 8);
    work.pieces = divide_up(work.width, work.of_task);
    work.tasks = work.rows * work.pieces;
  }
  return work;
}

template <class T>
bool is_wide(const BiasActShape& shape) {
  // Two results of binary64's functions at once would not fit in registers.
  if (std::is_same_v<T, double>) return false;
  return (shape.inner == 1 && shape.channels > 1 ? shape.channels : shape.inner) % Vector<T>::size == 0;
}

template <class T, bool wide>
constexpr int vector_size = wide && !std::is_same_v<T, double> ? Vector<T>::size : 1;

template <class T, int n, class F>
__device__ __forceinline__ void load_vector(const T* p, F (&x)[n]) {
  if constexpr (n == 1) {
    x[0] = to_arithmetic(*p);
  } else {
    Vector<T>::unpack(*reinterpret_cast<const typename Vector<T>::Memory*>(p), x);
  }
}

template <class T, int n, class F>
__device__ __forceinline__ void store_vector(T* p, const F (&x)[n]) {
  if constexpr (n == 1) {
    from_arithmetic(x[0], *p);
  } else {
    ptx::store(reinterpret_cast<typename Vector<T>::Memory*>(p), Vector<T>::pack(x));
  }
}

template <class T>
__device__ __forceinline__ auto value_of_channel(const ChannelValues& values, std::int64_t channel) {
  using F = typename Arithmetic<T>::F;
  if (values.data == nullptr) return F(0);
  if (values.dtype == DType::float32) return F(static_cast<const float*>(values.data)[channel]);
  return F(to_arithmetic(static_cast<const T*>(values.data)[channel]));
}

// Calls body(at, bias, shift, terms) for every vector, the elements from `at` on, and adds up the terms of each channel
// and piece in `sums` if that is not null.
template <class T, bool wide, class Body>
__device__ __forceinline__ void for_each_vector(const BiasActWork& work, const ChannelValues& bias,
                                                const ChannelValues& shift, typename Arithmetic<T>::F* sums,
                                                Body&& body) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int n = vector_size<T, wide>;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  const std::int64_t teams = static_cast<std::int64_t>(gridDim.x) * block_threads >> work.team_log2;
  const int team = 1 << work.team_log2, lane = static_cast<int>(threadIdx.x) & (team - 1);
  // The first team of a warp decides when the warp ends.
  const std::int64_t first = (thread & -warp_threads) >> work.team_log2, own = thread >> work.team_log2;
  for (std::int64_t warp_task = first; warp_task < work.tasks; warp_task += teams) {
    const std::int64_t task = warp_task + (own - first);
    const bool exists = task < work.tasks;
    F b[n], s[n], sum[n], terms[n];
#pragma unroll
    for (int i = 0; i < n; ++i) b[i] = s[i] = sum[i] = terms[i] = F(0);
    if (work.columns) {
      const std::int64_t piece = task % work.pieces, column = task / work.pieces * team + lane;
      if (!exists || column >= work.width) continue;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        b[i] = value_of_channel<T>(bias, column * n + i);
        s[i] = value_of_channel<T>(shift, column * n + i);
      }
      const std::int64_t start = piece * work.of_task;
      const std::int64_t end = start + work.of_task < work.rows ? start + work.of_task : work.rows;
      for (std::int64_t row = start; row < end; ++row) {
        body((row * work.width + column) * n, b, s, terms);
#pragma unroll
        for (int i = 0; i < n; ++i) sum[i] = P::add(sum[i], terms[i]);
      }
      if (sums == nullptr) continue;
#pragma unroll
      for (int i = 0; i < n; ++i) sums[piece * work.channels + column * n + i] = sum[i];
      continue;
    }
    if (exists) {
      const std::int64_t row = task / work.pieces, start = (task - row * work.pieces) * work.of_task;
      const std::int64_t end = start + work.of_task < work.width ? start + work.of_task : work.width;
      const F of_bias = value_of_channel<T>(bias, row % work.channels);
      const F of_shift = value_of_channel<T>(shift, row % work.channels);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        b[i] = of_bias;
        s[i] = of_shift;
      }
      for (std::int64_t v = start + lane; v < end; v += team) {
        body((row * work.width + v) * n, b, s, terms);
#pragma unroll
        for (int i = 0; i < n; ++i) sum[i] = P::add(sum[i], terms[i]);
      }
    }
    if (sums == nullptr) continue;
    F total = sum[0];
#pragma unroll
    for (int i = 1; i < n; ++i) total = P::add(total, sum[i]);
    for (int distance = team >> 1; distance > 0; distance /= 2) {
      total = P::add(total, __shfl_xor_sync(0xFFFFFFFFu, total, distance));
    }
    if (exists && lane == 0) sums[task] = total;
  }
}

// An activation in the arithmetic of T: which function, and the numbers of its form.
template <class T>
struct DeviceForm {
  using F = typename Arithmetic<T>::F;

  ActivationForm::Function function;
  ActivationNumbers<F> numbers;
  // Whether it has bounds, and then only the value tells whether it has reached one.
  bool bounded;

  explicit DeviceForm(const BiasActSettings& settings) {
    const ActivationForm form = form_of(settings);
    constexpr double infinity = std::numeric_limits<double>::infinity();
    function = form.function;
    numbers = numbers_of<F>(form);
    bounded = form.lower > -infinity || form.upper < infinity;
  }

  // Calls body(function) with the row of the table.
  template <class Body>
  __device__ __forceinline__ void with_function(Body&& body) const {
    using P = FunctionsOf<T>;
    switch (function) {
      case ActivationForm::piecewise_linear: return body(PiecewiseLinear<P>{numbers.slope});
      case ActivationForm::silu: return body(Silu<P>());
      case ActivationForm::sigmoid: return body(Sigmoid<P>());
      case ActivationForm::tanh: return body(Tanh<P>());
      case ActivationForm::elu: return body(Elu<P>{numbers.slope});
      case ActivationForm::softplus: return body(Softplus<P>());
      case ActivationForm::gelu: return body(Gelu<P>());
    }
  }

  // Whether y has reached a bound: no change of its argument changes it.
  __device__ __forceinline__ bool reaches(F y) const { return y > numbers.above || y < numbers.below; }
};

template <class T, bool wide>
__global__ void __launch_bounds__(block_threads)
    bias_act_kernel(const T* x, T* y, const ChannelValues bias, const __grid_constant__ DeviceForm<T> form,
                    const __grid_constant__ BiasActWork work) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int n = vector_size<T, wide>;
  for_each_vector<T, wide>(work, bias, {}, nullptr, [&](std::int64_t at, const F(&b)[n], const F(&)[n], F(&)[n]) {
    F t[n];
    load_vector(x + at, t);
    form.with_function([&](const auto& function) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const F value = P::mul(form.numbers.factor, function.value(P::add(t[i], b[i])));
        t[i] = P::max(form.numbers.lower, P::min(form.numbers.upper, value));
      }
    });
    store_vector(y + at, t);
  });
}

template <class T>
struct DerivativeTensors {
  const T *grad, *at, *direction;
  T *first, *second;
};

// first = f' w, with w = direction + shift; second = f'' grad w. The last of those that are made is summed.
template <class T, bool wide, bool once, bool twice>
__global__ void __launch_bounds__(block_threads, 1)
    bias_act_derivative_kernel(const DerivativeTensors<T> tensors, typename Arithmetic<T>::F* sums,
                               const ChannelValues bias, const ChannelValues shift,
                               const __grid_constant__ DeviceForm<T> form, bool at_output,
                               const __grid_constant__ BiasActWork work) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int n = vector_size<T, wide>;
  for_each_vector<T, wide>(work, bias, shift, sums, [&](std::int64_t at, const F(&b)[n], const F(&s)[n], F(&terms)[n]) {
    F t[n], w[n], g[n], first[n], second[n];
    bool reached[n];
    load_vector(tensors.at + at, t);
    const auto load_others = [&] {
      if (tensors.direction != nullptr) load_vector(tensors.direction + at, w);
      if constexpr (twice) load_vector(tensors.grad + at, g);
    };
    // The library's functions of binary64 are called, and leave registers for little else.
    if constexpr (!std::is_same_v<T, double>) load_others();
    form.with_function([&](const auto& function) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const F factor = form.numbers.factor, argument = at_output ? t[i] : P::add(t[i], b[i]);
        const auto reaches = [&] {
          return form.reaches(at_output || !form.bounded ? argument : P::mul(factor, function.value(argument)));
        };
        // In this order because binary64's functions leave registers for little else.
        if constexpr (twice) reached[i] = reaches();
        if constexpr (once) first[i] = P::mul(factor, function.first(argument));
        if constexpr (twice) second[i] = P::mul(factor, function.second(argument));
        if constexpr (!twice) reached[i] = reaches();
      }
    });
    if constexpr (std::is_same_v<T, double>) load_others();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const F of = tensors.direction != nullptr ? P::add(w[i], s[i]) : s[i];
      if constexpr (once) first[i] = terms[i] = reached[i] ? F(0) : P::mul(first[i], of);
      if constexpr (twice) terms[i] = reached[i] ? F(0) : P::mul(P::mul(second[i], g[i]), of);
    }
    if (once && tensors.first != nullptr) store_vector(tensors.first + at, first);
    if (twice && tensors.second != nullptr) store_vector(tensors.second + at, terms);
  });
}

// The sums of channels over groups and pieces; a block takes a channel at a time.
template <class A>
__global__ void __launch_bounds__(block_threads)
    sum_channels_kernel(const A* partial, A* sums, std::int64_t groups, std::int64_t channels, std::int64_t pieces) {
  constexpr int warps = block_threads / warp_threads;
  __shared__ double of_warp[warps];
  const int warp = static_cast<int>(threadIdx.x) / warp_threads, lane = static_cast<int>(threadIdx.x) % warp_threads;
  for (std::int64_t channel = blockIdx.x; channel < channels; channel += gridDim.x) {
    double sum = 0;
    for (std::int64_t i = threadIdx.x; i < groups * pieces; i += block_threads) {
      const std::int64_t group = i / pieces;
      sum += static_cast<double>(partial[(group * channels + channel) * pieces + i - group * pieces]);
    }
    for (int distance = warp_threads / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
    }
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < warps; ++i) sum += of_warp[i];
      sums[channel] = static_cast<A>(sum);
    }
    __syncthreads();
  }
}

bool are_aligned(std::initializer_list<const void*> addresses) {
  for (const void* address : addresses) {
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) return false;
  }
  return true;
}

template <class Args>
bool is_acceptable(const Args& args) {
  return is_valid(args.shape) && is_valid(args.settings) && has_valid_type(args.bias, args.dtype);
}

bool is_empty(const BiasActShape& shape) { return shape.outer * shape.channels * shape.inner == 0; }

// Without values and sums all is one row.
BiasActShape merged(const BiasActShape& shape, bool with_channels) {
  return with_channels ? shape : BiasActShape{1, 1, shape.outer * shape.channels * shape.inner};
}

template <bool twice>
cudaError_t derivative(const void* grad, const void* at, const void* direction, void* first, void* second, void* sums,
                       DType dtype, const BiasActShape& given, const BiasActSettings& settings, bool at_output,
                       const ChannelValues& bias, const ChannelValues& shift, void* workspace, cudaStream_t stream) {
  if (sums != nullptr && workspace == nullptr) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = typename Arithmetic<T>::F;
    const bool with_channels = sums != nullptr || shift.data != nullptr || (bias.data != nullptr && !at_output);
    const BiasActShape shape = merged(given, with_channels);
    return with_constants(
        [&](auto wide) {
          const BiasActWork work = make_work(shape, vector_size<T, wide>);
          const DerivativeTensors<T> tensors{static_cast<const T*>(grad), static_cast<const T*>(at),
                                             static_cast<const T*>(direction), static_cast<T*>(first),
                                             static_cast<T*>(second)};
          F* const partial = sums == nullptr ? nullptr : static_cast<F*>(workspace);
          const auto run = [&](auto kernel) {
            return launch(kernel, blocks_for(work.tasks << work.team_log2), block_threads, 0, stream, tensors, partial,
                          bias, shift, DeviceForm<T>(settings), at_output, work);
          };
          cudaError_t error;
          if constexpr (twice && std::is_same_v<T, double>) {
            // One after the other: both at once do not fit in registers. The second writes its sums over the first's.
            error = run(bias_act_derivative_kernel<T, wide, true, false>);
            if (error == cudaSuccess) error = run(bias_act_derivative_kernel<T, wide, false, true>);
          } else {
            error = run(bias_act_derivative_kernel<T, wide, true, twice>);
          }
          if (error != cudaSuccess || sums == nullptr) return error;
          return launch(sum_channels_kernel<F>, blocks_for(work.channels * block_threads), block_threads, 0, stream,
                        static_cast<const F*>(partial), static_cast<F*>(sums), work.sum_groups(), work.channels,
                        work.sum_pieces());
        },
        is_wide<T>(shape) && are_aligned({grad, at, direction, first, second}));
  });
}

cudaError_t set_zero(void* sums, DType dtype, const BiasActShape& shape, cudaStream_t stream) {
  if (sums == nullptr || shape.channels == 0) return cudaSuccess;
  const std::size_t size = dtype == DType::float64 ? sizeof(double) : sizeof(float);
  return cudaMemsetAsync(sums, 0, static_cast<std::size_t>(shape.channels) * size, stream);
}

}  // namespace

Error bias_act(const BiasAct& args, Stream stream) {
  if (!is_acceptable(args)) return cudaErrorInvalidValue;
  if (is_empty(args.shape)) return cudaSuccess;
  if (args.x == nullptr || args.y == nullptr) return cudaErrorInvalidValue;
  return with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const BiasActShape shape = merged(args.shape, args.bias.data != nullptr);
    return with_constants(
        [&](auto wide) {
          const BiasActWork work = make_work(shape, vector_size<T, wide>);
          return launch(bias_act_kernel<T, wide>, blocks_for(work.tasks << work.team_log2), block_threads, 0, stream,
                        static_cast<const T*>(args.x), static_cast<T*>(args.y), args.bias, DeviceForm<T>(args.settings),
                        work);
        },
        is_wide<T>(shape) && are_aligned({args.x, args.y}));
  });
}

std::int64_t bias_act_workspace(DType dtype, const BiasActShape& shape) {
  if (!is_valid(shape) || is_empty(shape)) return 0;
  std::int64_t bytes = 0;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const BiasActWork work = make_work(shape, is_wide<T>(shape) ? Vector<T>::size : 1);
    bytes = work.sum_groups() * work.channels * work.sum_pieces() *
            static_cast<std::int64_t>(sizeof(typename Arithmetic<T>::F));
    return cudaSuccess;
  });
  return bytes;
}

Error bias_act_backward(const BiasActBackward& args, void* workspace, Stream stream) {
  if (!is_acceptable(args) || !has_valid_type(args.shift, args.dtype)) return cudaErrorInvalidValue;
  if (args.at_output && !output_tells(args.settings)) return cudaErrorInvalidValue;
  if (is_empty(args.shape)) return set_zero(args.sums, args.dtype, args.shape, stream);
  if (args.at == nullptr || (args.sums != nullptr && !are_aligned({args.grad, args.at, args.product}))) {
    return cudaErrorInvalidValue;
  }
  return derivative<false>(nullptr, args.at, args.grad, args.product, nullptr, args.sums, args.dtype, args.shape,
                           args.settings, args.at_output, args.bias, args.shift, workspace, stream);
}

Error bias_act_double_backward(const BiasActDoubleBackward& args, void* workspace, Stream stream) {
  if (!is_acceptable(args) || !has_valid_type(args.shift, args.dtype)) return cudaErrorInvalidValue;
  if (is_empty(args.shape)) return set_zero(args.sums, args.dtype, args.shape, stream);
  if (args.x == nullptr || args.grad == nullptr) return cudaErrorInvalidValue;
  if (args.sums != nullptr && !are_aligned({args.grad, args.x, args.direction, args.grad_grad, args.grad_x})) {
    return cudaErrorInvalidValue;
  }
  return derivative<true>(args.grad, args.x, args.direction, args.grad_grad, args.grad_x, args.sums, args.dtype,
                          args.shape, args.settings, false, args.bias, args.shift, workspace, stream);
}

}  // namespace gencore::cuda
