// Stands in for CUDA's header of this name, so that g++ compiles kernels for the emulator.
#pragma once

// Before __noinline__ becomes a macro: the standard library writes it between attribute brackets.
#include <math.h>

#include <functional>
#include <memory>
#include <tuple>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulation/atomics.h"
#include "emulation/interface.h"
#include "emulation/intrinsics.h"
#include "emulation/warp.h"

#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ const
// One block runs at a time, so the variables of its shared memory are statics; "used" keeps the compiler from
// assuming that it sees every access.
#define __shared__ static __attribute__((used))

constexpr int warpSize = 32;

namespace gencore_emulation {

// Runs `thread(arguments)` once for every thread of the grid. The threads may read the `argument_bytes` there.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(const void* arguments),
                   const void* arguments, std::size_t argument_bytes);

}  // namespace gencore_emulation

template <class... Expected, class... Actual>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... args) {
  struct Call {
    void (*kernel)(Expected...);
    std::tuple<Expected...> arguments;
  };
  const Call call{kernel, {std::forward<Actual>(args)...}};
  const auto thread = [](const void* address) {
    const Call& call = *static_cast<const Call*>(address);
    std::apply(call.kernel, call.arguments);
  };
  return gencore_emulation::launch(*config, reinterpret_cast<const void*>(kernel), thread, &call, sizeof call);
}

template <class... Parameters>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

template <class... Parameters>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...),
                                                                 int block_size, std::size_t dynamic_shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), block_size,
                                                       dynamic_shared_bytes);
}
