// Standard normal noise.
#pragma once

#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore::cpu {

// Fills `out` (shape.draws x shape.samples x shape.elements values of `dtype`) with standard normals, the binary32
// values of gencore/math.h rounded to `dtype`. The values depend on `key` and the element index alone.
// `threads` is at least 1; small tensors take fewer.
Status normal(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

// The same values in device memory, `out`, on `stream`.
Error normal(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, Stream stream);

}  // namespace gencore::cuda
