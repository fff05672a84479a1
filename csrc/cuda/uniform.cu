#include "fill.cuh"
#include "gencore/uniform.h"

namespace gencore::cuda {

Error uniform(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, Stream stream) {
  return fill<Uniforms>(out, dtype, shape, key, stream);
}

}  // namespace gencore::cuda
