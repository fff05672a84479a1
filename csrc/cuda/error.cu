#include <cuda_runtime.h>

#include "gencore/cuda.h"

namespace gencore::cuda {

const char* name(Error error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* message(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace gencore::cuda
