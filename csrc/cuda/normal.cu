#include "fill.cuh"
#include "gencore/normal.h"

namespace gencore::cuda {

Error normal(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, Stream stream) {
  return fill<Normals>(out, dtype, shape, key, stream);
}

}  // namespace gencore::cuda
