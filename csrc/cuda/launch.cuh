// How kernels are launched, and how the element type of a tensor is chosen.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "gencore/types.h"

namespace gencore::cuda {

// Launches a kernel. An error is returned, and not left behind for the next call to find.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

constexpr int block_threads = 256;

// Blocks for `threads` threads of work. Kernels stride over what the largest grid leaves.
inline dim3 blocks_for(std::int64_t threads) {
  constexpr std::int64_t most = (std::int64_t{1} << 31) - 1;
  return dim3(static_cast<unsigned>(std::min((threads + block_threads - 1) / block_threads, most)));
}

// Calls body(static_cast<T*>(nullptr)) with T the element type that dtype names.
template <class Body>
cudaError_t with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32: return body(static_cast<float*>(nullptr));
    case DType::float64: return body(static_cast<double*>(nullptr));
    case DType::bfloat16: return body(static_cast<bfloat16*>(nullptr));
    case DType::float16: return body(static_cast<float16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// Calls body(std::bool_constant<...>...) with what is known only now as constants for a template.
template <class Body>
cudaError_t with_constants(Body&& body) {
  return body();
}

template <class Body, class... Rest>
cudaError_t with_constants(Body&& body, bool first, Rest... rest) {
  if (first) return with_constants([&](auto... others) { return body(std::true_type{}, others...); }, rest...);
  return with_constants([&](auto... others) { return body(std::false_type{}, others...); }, rest...);
}

}  // namespace gencore::cuda
