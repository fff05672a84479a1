// How the kernels of group normalization are chosen and launched.
#pragma once

#include <initializer_list>

#include "group_norm_backward.cuh"

namespace gencore::cuda {

// Calls body(type, width, channels_last) with what a kernel for this tensor is made for. Without spatial dimensions the
// two formats are one.
template <class Body>
cudaError_t with_layout(DType dtype, const GroupNormShape& shape, bool aligned, Body&& body) {
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_constants(
        [&](auto channels_last) {
          if constexpr (!std::is_same_v<T, double>) {
            if (aligned && has_vectors<T>(shape, channels_last)) {
              return body(type, std::integral_constant<int, Vector<T>::size>{}, channels_last);
            }
          }
          return body(type, std::integral_constant<int, 1>{}, channels_last);
        },
        shape.channels_last && shape.pixels > 1 && shape.channels > 1);
  });
}

inline bool are_aligned(std::initializer_list<const void*> addresses) {
  return std::all_of(addresses.begin(), addresses.end(),
                     [](const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; });
}

inline bool is_empty(const GroupNormShape& shape) {
  return shape.samples == 0 || shape.channels == 0 || shape.pixels == 0;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_blocks(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::uintptr_t bytes,
                          cudaStream_t stream, Arguments&&... arguments) {
  return launch(kernel, blocks_for(blocks * block_threads), threads, bytes, stream,
                std::forward<Arguments>(arguments)...);
}

// The gradients of weight and bias, from the parts of each sample and channel.
template <class T, class Args>
cudaError_t launch_samples(const Args& args, const double* of_samples, cudaStream_t stream) {
  return launch_blocks(group_norm_samples_kernel<T, Args>,
                       (args.shape.channels + columns_at_once - 1) / columns_at_once, block_threads, 0, stream, args,
                       of_samples);
}

// The most that body(T, width, channels_last) says for any alignment.
template <class Body>
std::int64_t most_bytes(DType dtype, const GroupNormShape& shape, Body&& body) {
  std::int64_t most = 0;
  if (!is_valid(shape) || is_empty(shape)) return most;
  for (const bool aligned : {false, true}) {
    with_layout(dtype, shape, aligned, [&](auto* type, auto width, auto channels_last) {
      most = std::max(most, static_cast<std::int64_t>(body(type, width, channels_last)));
      return cudaSuccess;
    });
  }
  return most;
}

inline cudaError_t set_zero(void* tensor, DType dtype, std::int64_t n, cudaStream_t stream) {
  if (tensor == nullptr || n == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* type) {
    const cudaError_t error = cudaMemsetAsync(tensor, 0, static_cast<std::size_t>(n) * sizeof *type, stream);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
  });
}

// The gradients of the values, where they are sums over nothing.
template <class Args>
cudaError_t set_values_zero(const Args& args, cudaStream_t stream) {
  const std::int64_t channels = args.shape.channels, all = args.shape.samples * channels;
  cudaError_t error = set_zero(args.grad_weight, args.weight.dtype, channels, stream);
  if (error == cudaSuccess) error = set_zero(args.grad_bias, args.bias.dtype, channels, stream);
  if (error == cudaSuccess) error = set_zero(args.grad_scale, args.scale.dtype, all, stream);
  if (error == cudaSuccess) error = set_zero(args.grad_shift, args.shift.dtype, all, stream);
  if (error == cudaSuccess) error = set_zero(args.grad_bias_in, args.bias_in.dtype, all, stream);
  return error;
}

}  // namespace gencore::cuda
