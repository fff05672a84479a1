// What the ops that fill a tensor with noise share.
#pragma once

#include "noise.cuh"

namespace gencore::cuda {

template <class Transform, class T, bool channels_last, bool key_on_device>
__global__ void __launch_bounds__(block_threads, at_least<T>(key_on_device ? 3 : 4))
    fill_kernel(T* out, const __grid_constant__ Work work, const __grid_constant__ NoiseWords words) {
  RowNoise<key_on_device> noise;
  for_each_item<T, channels_last>(
      work, [&](std::int64_t row) { noise.begin(words, row); },
      [&](const Item<T, channels_last>& item) {
        float value[item.size];
        make_noise<Transform>(noise, item, 0, value);
        item.store(out, value);
      },
      [](std::int64_t) {});
}

template <class Transform>
cudaError_t fill(void* out, DType dtype, const NoiseShape& shape, const NoiseKey& key, cudaStream_t stream) {
  if (!is_acceptable(shape, key)) return cudaErrorInvalidValue;
  if (shape.samples == 0 || shape.elements == 0) return cudaSuccess;
  if (out == nullptr) return cudaErrorInvalidValue;
  return with_variant(dtype, shape, key, [&](auto* type, auto channels_last, auto on_device) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Work work = make_work<T, channels_last>(shape, {out});
    return launch(fill_kernel<Transform, T, channels_last, on_device>, work.grid(), block_threads, 0, stream,
                  static_cast<T*>(out), work, noise_words(key));
  });
}

}  // namespace gencore::cuda
