// Uniform noise.
#pragma once

#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore::cpu {

// Fills `out` (shape.draws x shape.samples x shape.elements values of `dtype`) with uniforms: multiples of 2^-24 in
// [0, 1), rounded to `dtype`. A half type rounds the largest of them to 1.
// `threads` is at least 1; small tensors take fewer.
Status uniform(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

// The same values in device memory, `out`, on `stream`.
Error uniform(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, Stream stream);

}  // namespace gencore::cuda
