// How kernels are launched, and how the element type of a tensor is chosen.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "gencore/types.h"

namespace gencore::cuda {

// What the current device gives; `otherwise` if it does not tell.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device, value;
  if (cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess) {
    return value;
  }
  cudaGetLastError();
  return otherwise;
}

// Shared memory that a block has without asking, and what it may ask of any device of compute capability 8.0 or later.
constexpr int usual_shared_bytes = 48 << 10, common_shared_bytes = 99 << 10;

// What a block may ask of the current device.
inline std::size_t most_shared_bytes() {
  return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, common_shared_bytes));
}

// Asks the current device to give blocks of a kernel all the shared memory it has: a lower limit, between what another
// thread asks for and its launch, would make that launch fail. It is asked once for each kernel and device.
template <class... Parameters>
cudaError_t allow_shared_bytes(void (*kernel)(Parameters...), std::size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<void (*)(Parameters...), int>, std::size_t> allowed;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  std::size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const std::size_t there_is = most_shared_bytes() - attributes.sharedSizeBytes;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(there_is));
  if (error == cudaSuccess) most = there_is;
  return error;
}

// Launches a kernel. An error is returned, and not left behind for the next call to find.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (shared_bytes > usual_shared_bytes) {
    const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return error;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

constexpr int block_threads = 256, warp_threads = 32;

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
