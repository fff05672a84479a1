#include "gencore/normal.h"

#include "fill.h"

namespace gencore::cpu::GENCORE_SIMD {

Status normal(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, int threads) {
  return fill<Normals>(out, dtype, shape, key, threads);
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status normal(void*, DType, const NoiseShape&, const NoiseKey&, int))

Status normal(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, int threads) {
  if (!is_valid(shape, key, threads)) return Status::invalid_argument;
  if (shape.samples == 0 || shape.draws == 0 || shape.elements == 0) return Status::ok;
  if (out == nullptr) return Status::invalid_argument;
  GENCORE_DISPATCH(normal, out, dtype, shape, key, threads);
}

}  // namespace gencore::cpu
#endif
