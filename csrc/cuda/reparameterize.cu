#include "gencore/reparameterize.h"
#include "noise.cuh"
#include "sums.cuh"

namespace gencore::cuda {

// kl is summed over pieces of as many items, then over the pieces of a row: the order depends on the row alone.
constexpr int kl_items_per_piece = 4 * warp_threads;

template <class A>
struct ReparameterizeTensors {
  const void *mu, *logvar;
  void *z, *slope;
  // One sum for each piece, or for each row if a row is one piece.
  A* kl;
  std::int64_t draws;
};

template <class T, bool channels_last, bool key_on_device, bool with_kl>
__global__ void __launch_bounds__(block_threads, at_least<T>(key_on_device ? 2 : 3))
    reparameterize_kernel(const ReparameterizeTensors<typename Arithmetic<T>::F> tensors,
                          const __grid_constant__ Work work, const __grid_constant__ NoiseWords words) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  const T* const mu = static_cast<const T*>(tensors.mu);
  const T* const logvar = static_cast<const T*>(tensors.logvar);
  T* const z = static_cast<T*>(tensors.z);
  const std::int64_t draw_size = work.rows * work.elements, draw_blocks = (work.elements + 3) / 4;
  RowNoise<key_on_device> noise;
  F sum = 0;
  for_each_item<T, channels_last>(
      work,
      [&](std::int64_t row) {
        noise.begin(words, row);
        sum = 0;
      },
      [&](const Item<T, channels_last>& item) {
        F mean[item.size], deviation[item.size];
        item.load(mu, mean);
        item.load(logvar, deviation);
#pragma unroll
        for (int i = 0; i < item.size; ++i) {
          const F log_variance = deviation[i];
          deviation[i] = standard_deviation<T>(log_variance);
          if constexpr (with_kl) {
            // 1/2 (mu^2 + sigma^2 - 1 - logvar)
            const F square = P::fma(mean[i], mean[i], P::fma(deviation[i], deviation[i], P::set(-1.0f)));
            if (i < item.count) sum = P::add(sum, P::mul(P::set(0.5f), P::sub(square, log_variance)));
          }
        }
        for (std::int64_t draw = 0; draw < tensors.draws; ++draw) {
          float value[item.size];
          make_noise<Normals>(noise, item, static_cast<std::uint32_t>(draw * draw_blocks), value);
          F sample[item.size];
#pragma unroll
          for (int i = 0; i < item.size; ++i) sample[i] = P::fma(deviation[i], F(value[i]), mean[i]);
          item.store(z + draw * draw_size, sample);
          if (tensors.slope == nullptr) continue;
#pragma unroll
          for (int i = 0; i < item.size; ++i) {
            sample[i] = P::mul(P::mul(P::set(0.5f), deviation[i]), F(value[i]));
          }
          item.store(static_cast<T*>(tensors.slope) + draw * draw_size, sample);
        }
      },
      [&](std::int64_t task) {
        if constexpr (with_kl) {
          sum = sum_of_team<P>(work, sum);
          if (task >= 0 && is_first_of_team(work)) tensors.kl[task] = sum;
        }
      });
}

template <class A>
struct ReparameterizeGradients {
  const void* grad_z;
  const A* grad_kl;
  const void *mu, *logvar;
  void *grad_mu, *grad_logvar;
  std::int64_t draws;
};

template <class T, bool channels_last, bool key_on_device>
__global__ void __launch_bounds__(block_threads, at_least<T>(2))
    reparameterize_backward_kernel(const ReparameterizeGradients<typename Arithmetic<T>::F> tensors,
                                   const __grid_constant__ Work work, const __grid_constant__ NoiseWords words) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  const T* const grad_z = static_cast<const T*>(tensors.grad_z);
  const T* const logvar = static_cast<const T*>(tensors.logvar);
  const std::int64_t draw_size = work.rows * work.elements, draw_blocks = (work.elements + 3) / 4;
  RowNoise<key_on_device> noise;
  F g_kl = 0;
  for_each_item<T, channels_last>(
      work,
      [&](std::int64_t row) {
        noise.begin(words, row);
        if (tensors.grad_kl != nullptr) g_kl = tensors.grad_kl[row];
      },
      [&](const Item<T, channels_last>& item) {
        F deviation[item.size];
        item.load(logvar, deviation);
        // sum_d grad_z and sum_d grad_z eps
        F plain[item.size] = {}, weighted[item.size] = {};
        for (std::int64_t draw = 0; draw < tensors.draws && grad_z != nullptr; ++draw) {
          F g[item.size];
          item.load(grad_z + draw * draw_size, g);
          float value[item.size];
          make_noise<Normals>(noise, item, static_cast<std::uint32_t>(draw * draw_blocks), value);
#pragma unroll
          for (int i = 0; i < item.size; ++i) {
            plain[i] = P::add(plain[i], g[i]);
            weighted[i] = P::fma(g[i], F(value[i]), weighted[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < item.size; ++i) {
          deviation[i] = standard_deviation<T>(deviation[i]);
          // Without grad_z there is no such term, not even 0 * infinity.
          weighted[i] = grad_z == nullptr ? F(0) : P::mul(weighted[i], deviation[i]);
        }
        if (tensors.grad_kl != nullptr) {
          F mean[item.size];
          item.load(static_cast<const T*>(tensors.mu), mean);
#pragma unroll
          for (int i = 0; i < item.size; ++i) {
            plain[i] = P::fma(g_kl, mean[i], plain[i]);
            weighted[i] = P::fma(g_kl, P::fma(deviation[i], deviation[i], P::set(-1.0f)), weighted[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < item.size; ++i) weighted[i] = P::mul(P::set(0.5f), weighted[i]);
        if (tensors.grad_mu != nullptr) item.store(static_cast<T*>(tensors.grad_mu), plain);
        item.store(static_cast<T*>(tensors.grad_logvar), weighted);
      },
      [](std::int64_t) {});
}

std::int64_t reparameterize_workspace(DType dtype, const NoiseShape& shape) {
  std::int64_t bytes = 0;
  with_variant(dtype, shape, {}, [&](auto* type, auto channels_last, auto) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Work work = make_work<T, channels_last>(shape, {}, kl_items_per_piece);
    if (work.pieces_per_row > 1) bytes = work.tasks() * static_cast<std::int64_t>(sizeof(typename Arithmetic<T>::F));
    return cudaSuccess;
  });
  return bytes;
}

Error reparameterize(const Reparameterize& args, void* workspace, Stream stream) {
  const NoiseShape& shape = args.shape;
  if (!is_acceptable(shape, args.key)) return cudaErrorInvalidValue;
  if (shape.samples == 0 || (shape.elements == 0 && args.kl == nullptr)) return cudaSuccess;
  if (shape.elements > 0 && (args.mu == nullptr || args.logvar == nullptr || args.z == nullptr)) {
    return cudaErrorInvalidValue;
  }
  return with_variant(args.dtype, shape, args.key, [&](auto* type, auto channels_last, auto on_device) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Arithmetic<T>::F;
    const bool with_kl = args.kl != nullptr;
    const Work work = make_work<T, channels_last>(shape, {args.mu, args.logvar, args.z, args.slope},
                                                  with_kl ? kl_items_per_piece : 0);
    const bool pieces = with_kl && work.pieces_per_row > 1;
    if (pieces && workspace == nullptr) return cudaErrorInvalidValue;
    A* const kl = static_cast<A*>(args.kl);
    const ReparameterizeTensors<A> tensors{
        args.mu, args.logvar, args.z, args.slope, pieces ? static_cast<A*>(workspace) : kl, shape.draws};
    const cudaError_t error = with_constants(
        [&](auto kl_wanted) {
          return launch(reparameterize_kernel<T, channels_last, on_device, kl_wanted>, work.grid(), block_threads, 0,
                        stream, tensors, work, noise_words(args.key));
        },
        with_kl);
    if (error != cudaSuccess || !pieces) return error;
    return sum_pieces(work, workspace, kl, 1, stream);
  });
}

Error reparameterize_backward(const ReparameterizeBackward& args, Stream stream) {
  const NoiseShape& shape = args.shape;
  if (!is_acceptable(shape, args.key)) return cudaErrorInvalidValue;
  if (shape.samples == 0 || shape.elements == 0) return cudaSuccess;
  if (args.logvar == nullptr || args.grad_logvar == nullptr || (args.grad_kl != nullptr && args.mu == nullptr)) {
    return cudaErrorInvalidValue;
  }
  return with_variant(args.dtype, shape, args.key, [&](auto* type, auto channels_last, auto on_device) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Arithmetic<T>::F;
    const Work work =
        make_work<T, channels_last>(shape, {args.grad_z, args.mu, args.logvar, args.grad_mu, args.grad_logvar});
    const ReparameterizeGradients<A> tensors{
        args.grad_z, static_cast<const A*>(args.grad_kl), args.mu, args.logvar, args.grad_mu, args.grad_logvar,
        shape.draws};
    return launch(reparameterize_backward_kernel<T, channels_last, on_device>, work.grid(), block_threads, 0, stream,
                  tensors, work, noise_words(args.key));
  });
}

}  // namespace gencore::cuda
