#include "gencore/uniform.h"

#include "fill.h"

namespace gencore::cpu::GENCORE_SIMD {

Status uniform(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, int threads) {
  return fill<Uniforms>(out, dtype, shape, key, threads);
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status uniform(void*, DType, const NoiseShape&, const NoiseKey&, int))

Status uniform(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, int threads) {
  if (!is_valid(shape, key, threads)) return Status::invalid_argument;
  if (shape.samples == 0 || shape.draws == 0 || shape.elements == 0) return Status::ok;
  if (out == nullptr) return Status::invalid_argument;
  GENCORE_DISPATCH(uniform, out, dtype, shape, key, threads);
}

}  // namespace gencore::cpu
#endif
