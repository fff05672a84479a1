// Fills a tensor with noise: what the ops `normal` and `uniform` share.
#pragma once

#include "noise.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class Transform>
Status fill(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, int threads) {
  const Tiles tiles(shape.draws * shape.samples, shape);
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* const values = static_cast<T*>(out);
    if constexpr (std::is_same_v<T, float>) {
      tiles.for_each(threads, [&](std::int64_t start, std::int64_t n, int) {
        NoiseSource<Transform>(shape, key).fill(start, n, values + start);
      });
    } else {
      const Workspace<float> workspace(tiles.team(threads), tiles.capacity());
      if (!workspace.ok()) return Status::out_of_memory;
      tiles.for_each(threads, [&](std::int64_t start, std::int64_t n, int thread) {
        float* const noise = workspace.of_thread(thread);
        NoiseSource<Transform>(shape, key).fill(start, n, noise);
        using P = Arithmetic<T>;
        for_vectors<P>(n, [&](std::int64_t i, std::int64_t count) {
          store_part<P>(values + start + i, load_part<P>(noise + i, count), count);
        });
      });
    }
    return Status::ok;
  });
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
