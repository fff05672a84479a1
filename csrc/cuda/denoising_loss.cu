#include "coefficients.cuh"
#include "gencore/denoising_loss.h"
#include "noise.cuh"
#include "sums.cuh"

namespace gencore::cuda {

// The loss is summed over pieces of items, then over the pieces of a row: the order depends on the row alone. Long rows
// have enough pieces for every multiprocessor even if they are longer.
inline int loss_items_per_piece(const NoiseShape& shape) { return (shape.elements < 1 << 16 ? 4 : 8) * warp_threads; }

template <class F>
constexpr F minus_infinity = -std::numeric_limits<F>::infinity();

// The columns of a row, each rounded once to the type of the arithmetic.
template <class F>
struct LossRow {
  F of_x0, of_noise, weight, bound_weight, moved, middle, half_range, posterior, precision;

  // No variables: they would take registers.
  __device__ __forceinline__ bool noisy() const { return of_noise != 0; }
  __device__ __forceinline__ bool bounded() const { return bound_weight != 0; }
  __device__ __forceinline__ bool first() const { return posterior == minus_infinity<F>; }
  __device__ __forceinline__ bool uses_data() const { return of_x0 != 0 || (bounded() && first()); }

  __device__ __forceinline__ void begin(const Table<DenoisingLoss::columns>& table, std::int64_t row) {
    double c[DenoisingLoss::columns];
    table.read(row, c);
    of_x0 = static_cast<F>(c[0]);
    of_noise = static_cast<F>(c[1]);
    weight = static_cast<F>(c[2]);
    bound_weight = static_cast<F>(c[3]);
    moved = static_cast<F>(c[4]);
    middle = static_cast<F>(c[5]);
    half_range = static_cast<F>(c[6]);
    posterior = static_cast<F>(c[7]);
    using P = std::conditional_t<std::is_same_v<F, double>, Double, Lane>;
    precision = bounded() ? exponential<P>(-posterior) : F(0);
  }
};

// The tensors that a loss and its gradient read.
struct LossTensors {
  const void *output, *x0, *noise;
  bool learned;
};

// What a loss and its gradient need of an item.
template <class T, bool channels_last>
struct LossItem {
  using P = Arithmetic<T>;
  using F = typename P::F;
  static constexpr int size = item_size<T, channels_last>;
  Held<T, channels_last> x0 = {}, place;
  // prediction - target
  F error[size];
  bool placed;

  template <bool key_on_device>
  __device__ __forceinline__ void load(const LossTensors& tensors, const Item<T, channels_last>& item,
                                       const LossRow<F>& c, const RowNoise<key_on_device>& noise) {
    const T* const output = static_cast<const T*>(tensors.output);
    if (c.uses_data()) x0 = item.hold(static_cast<const T*>(tensors.x0));
    const auto prediction = tensors.learned ? item.hold_half(output, 0) : item.hold(output);
    placed = tensors.learned && c.bounded();
    if (placed) place = item.hold_half(output, 1);
    F eps[size] = {};
    if (c.noisy()) {
      if (tensors.noise != nullptr) {
        item.hold(static_cast<const T*>(tensors.noise)).get(eps);
      } else {
        float made[size];
        make_noise<Normals>(noise, item, 0, made);
#pragma unroll
        for (int i = 0; i < size; ++i) eps[i] = F(made[i]);
      }
    }
    F data[size];
    x0.get(data);
    prediction.get(error);
#pragma unroll
    for (int i = 0; i < size; ++i) {
      error[i] = P::sub(error[i], P::fma(c.of_noise, eps[i], P::mul(c.of_x0, data[i])));
    }
  }

  __device__ __forceinline__ void log_variance(const LossRow<F>& c, F (&value)[size]) const {
    if (placed) {
      place.get(value);
#pragma unroll
      for (int i = 0; i < size; ++i) value[i] = P::fma(c.half_range, value[i], c.middle);
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) value[i] = c.middle;
    }
  }
};

// For samples of the first step: value += factor times the decoder's term, or its derivative. It is no part of the
// kernels, whose registers it would take, and all that it needs and gives is in memory of the thread.
template <class P, int size>
struct DecoderItem {
  typename P::F x0[size], moved[size], log_variance[size], value[size];
};

template <class P, int size>
__device__ __noinline__ void decode(DecoderItem<P, size>& item, typename P::F factor, bool derivative) {
#pragma unroll 1
  for (int i = 0; i < size; ++i) {
    const double x = item.x0[i];
    const DecoderTerm term = decoder_term(x, x + static_cast<double>(item.moved[i]), item.log_variance[i]);
    const auto found = static_cast<typename P::F>(derivative ? term.derivative : term.value);
    item.value[i] = P::fma(factor, found, item.value[i]);
  }
}

// value += factor times the term of the bound, or its derivative by the log variance, for every element of an item.
template <bool derivative, class T, bool channels_last>
__device__ __forceinline__ void add_bound(const LossItem<T, channels_last>& item,
                                          const LossRow<typename Arithmetic<T>::F>& c, typename Arithmetic<T>::F factor,
                                          typename Arithmetic<T>::F (&value)[LossItem<T, channels_last>::size]) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int size = LossItem<T, channels_last>::size;
  if (c.first()) {
    DecoderItem<P, size> decoded;
    item.x0.get(decoded.x0);
    item.log_variance(c, decoded.log_variance);
#pragma unroll
    for (int i = 0; i < size; ++i) {
      decoded.moved[i] = P::mul(c.moved, item.error[i]);
      decoded.value[i] = value[i];
    }
    decode(decoded, factor, derivative);
#pragma unroll
    for (int i = 0; i < size; ++i) value[i] = decoded.value[i];
    return;
  }
  F log_variance[size];
  item.log_variance(c, log_variance);
  const F one = P::set(1.0f), half = P::set(0.5f);
#pragma unroll
  for (int i = 0; i < size; ++i) {
    const F gap = P::sub(log_variance[i], c.posterior), shift = P::mul(c.moved, item.error[i]);
    // e^-lv = e^-gap e^-posterior
    const F narrow = exponential<FunctionsOf<T>>(-gap),
            apart = P::mul(P::mul(shift, shift), P::mul(narrow, c.precision));
    const F widths = derivative ? P::sub(one, narrow) : P::add(P::sub(gap, one), narrow);
    value[i] = P::fma(factor, P::mul(half, derivative ? P::sub(widths, apart) : P::add(widths, apart)), value[i]);
  }
}

template <class T, bool channels_last, bool key_on_device>
__global__ void __launch_bounds__(block_threads, at_least<T>(key_on_device || channels_last ? 2 : 3))
    denoising_loss_kernel(const LossTensors tensors, typename Arithmetic<T>::F* loss,
                          const __grid_constant__ Table<DenoisingLoss::columns> table,
                          const __grid_constant__ Work work, const __grid_constant__ NoiseWords words) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  RowNoise<key_on_device> noise;
  LossRow<F> c;
  F sum = 0;
  for_each_item<T, channels_last>(
      work,
      [&](std::int64_t row) {
        noise.begin_either(words, row);
        c.begin(table, row);
        sum = 0;
      },
      [&](const Item<T, channels_last>& item) {
        LossItem<T, channels_last> loaded;
        loaded.load(tensors, item, c, noise);
        F term[item.size];
#pragma unroll
        for (int i = 0; i < item.size; ++i) term[i] = P::mul(c.weight, P::mul(loaded.error[i], loaded.error[i]));
        if (c.bounded()) add_bound<false>(loaded, c, c.bound_weight, term);
#pragma unroll
        for (int i = 0; i < item.size; ++i) {
          if (i < item.count) sum = P::add(sum, term[i]);
        }
      },
      [&](std::int64_t task) {
        sum = sum_of_team<P>(work, sum);
        if (task < 0 || !is_first_of_team(work)) return;
        loss[task] = work.pieces_per_row == 1 ? P::div(sum, static_cast<F>(work.elements)) : sum;
      });
}

template <class T, bool channels_last, bool key_on_device>
__global__ void __launch_bounds__(block_threads, at_least<T>(key_on_device || channels_last ? 2 : 3))
    denoising_loss_backward_kernel(const LossTensors tensors, const typename Arithmetic<T>::F* grad_loss,
                                   void* grad_output, const __grid_constant__ Table<DenoisingLoss::columns> table,
                                   const __grid_constant__ Work work, const __grid_constant__ NoiseWords words) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  T* const grad = static_cast<T*>(grad_output);
  RowNoise<key_on_device> noise;
  LossRow<F> c;
  F of_error = 0, of_bound = 0;
  for_each_item<T, channels_last>(
      work,
      [&](std::int64_t row) {
        noise.begin_either(words, row);
        c.begin(table, row);
        const F share = P::div(grad_loss[row], static_cast<F>(work.elements));
        of_error = P::mul(share, P::mul(P::set(2.0f), c.weight));
        of_bound = P::mul(P::mul(share, c.bound_weight), c.half_range);
      },
      [&](const Item<T, channels_last>& item) {
        LossItem<T, channels_last> loaded;
        loaded.load(tensors, item, c, noise);
        F value[item.size];
#pragma unroll
        for (int i = 0; i < item.size; ++i) value[i] = P::mul(of_error, loaded.error[i]);
        if (!tensors.learned) {
          item.store(grad, value);
          return;
        }
        item.store_half(grad, 0, value);
#pragma unroll
        for (int i = 0; i < item.size; ++i) value[i] = 0;
        if (c.bounded()) add_bound<true>(loaded, c, of_bound, value);
        item.store_half(grad, 1, value);
      },
      [](std::int64_t) {});
}

std::int64_t denoising_loss_workspace(DType dtype, const NoiseShape& shape) {
  std::int64_t bytes = 0;
  with_row_variant(dtype, shape, true, [&](auto* type, auto channels_last, auto) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Work work = make_work<T, channels_last>(shape, {}, loss_items_per_piece(shape));
    if (work.pieces_per_row > 1) bytes = work.tasks() * static_cast<std::int64_t>(sizeof(typename Arithmetic<T>::F));
    return cudaSuccess;
  });
  return bytes;
}

Error denoising_loss(const DenoisingLoss& args, void* workspace, Stream stream) {
  const NoiseShape& shape = args.shape;
  if (shape.draws != 1 || !is_acceptable(shape, args.key) || !is_acceptable(args.table, shape.samples) ||
      args.error != nullptr) {
    return cudaErrorInvalidValue;
  }
  if (shape.samples == 0) return cudaSuccess;
  if (args.loss == nullptr || (shape.elements > 0 && (args.output == nullptr || args.x0 == nullptr))) {
    return cudaErrorInvalidValue;
  }
  return with_row_variant(
      args.dtype, shape, args.key.on_device, [&](auto* type, auto channels_last, auto key_on_device) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = typename Arithmetic<T>::F;
        const Work work = with_halves<T>(
            make_work<T, channels_last>(shape, {args.output, args.x0, args.noise}, loss_items_per_piece(shape)),
            args.learned);
        const bool pieces = work.pieces_per_row > 1;
        if (pieces && workspace == nullptr) return cudaErrorInvalidValue;
        A* const loss = static_cast<A*>(args.loss);
        const cudaError_t error = launch(
            denoising_loss_kernel<T, channels_last, key_on_device>, work.grid(), block_threads, 0, stream,
            LossTensors{args.output, args.x0, args.noise, args.learned}, pieces ? static_cast<A*>(workspace) : loss,
            Table<DenoisingLoss::columns>(args.table), work, noise_words(args.key));
        if (error != cudaSuccess || !pieces) return error;
        return sum_pieces(work, workspace, loss, static_cast<double>(shape.elements), stream);
      });
}

Error denoising_loss_backward(const DenoisingLossBackward& args, Stream stream) {
  const NoiseShape& shape = args.shape;
  if (shape.draws != 1 || !is_acceptable(shape, args.key) || !is_acceptable(args.table, shape.samples)) {
    return cudaErrorInvalidValue;
  }
  if (shape.samples == 0 || shape.elements == 0) return cudaSuccess;
  if (args.grad_loss == nullptr || args.output == nullptr || args.x0 == nullptr || args.grad_output == nullptr) {
    return cudaErrorInvalidValue;
  }
  return with_row_variant(
      args.dtype, shape, args.key.on_device, [&](auto* type, auto channels_last, auto key_on_device) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = typename Arithmetic<T>::F;
        const Work work = with_halves<T>(
            make_work<T, channels_last>(shape, {args.output, args.x0, args.noise, args.grad_output}), args.learned);
        return launch(denoising_loss_backward_kernel<T, channels_last, key_on_device>, work.grid(), block_threads, 0,
                      stream, LossTensors{args.output, args.x0, args.noise, args.learned},
                      static_cast<const A*>(args.grad_loss), args.grad_output,
                      Table<DenoisingLoss::columns>(args.table), work, noise_words(args.key));
      });
}

}  // namespace gencore::cuda
