#include <cuda_runtime.h>

#include "gencore/cuda.h"

namespace gencore::cuda {

__global__ void probe_kernel() {}

Error probe() {
  int blocks;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(&probe_kernel), 32, 0);
}

const char* name(Error error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* message(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace gencore::cuda
