#include "coefficients.cuh"
#include "gencore/add_noise.h"
#include "noise.cuh"

namespace gencore::cuda {

struct AddNoiseTensors {
  const void* x0;
  void *x_t, *noise;
};

template <class T, bool channels_last, bool key_on_device>
__global__ void __launch_bounds__(block_threads, at_least<T>(key_on_device || channels_last ? 3 : 4))
    add_noise_kernel(const AddNoiseTensors tensors, const __grid_constant__ Table<AddNoise::columns> table,
                     const __grid_constant__ Work work, const __grid_constant__ NoiseWords words) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  const T* const x0 = static_cast<const T*>(tensors.x0);
  T* const x_t = static_cast<T*>(tensors.x_t);
  T* const noise_out = static_cast<T*>(tensors.noise);
  RowNoise<key_on_device> noise;
  F alpha = 0, sigma = 0;
  for_each_item<T, channels_last>(
      work,
      [&](std::int64_t row) {
        noise.begin_either(words, row);
        double c[AddNoise::columns];
        table.read(row, c);
        alpha = static_cast<F>(c[0]);
        sigma = static_cast<F>(c[1]);
      },
      [&](const Item<T, channels_last>& item) {
        const auto held = item.hold(x0);
        float eps[item.size];
        make_noise<Normals>(noise, item, 0, eps);
        if (noise_out != nullptr) item.store(noise_out, eps);
        F x[item.size];
        held.get(x);
#pragma unroll
        for (int i = 0; i < item.size; ++i) x[i] = P::fma(sigma, F(eps[i]), P::mul(alpha, x[i]));
        item.store(x_t, x);
      },
      [](std::int64_t) {});
}

Error add_noise(const AddNoise& args, Stream stream) {
  const NoiseShape& shape = args.shape;
  if (shape.draws != 1 || !is_acceptable(shape, args.key) || !is_acceptable(args.table, shape.samples)) {
    return cudaErrorInvalidValue;
  }
  if (shape.samples == 0 || shape.elements == 0) return cudaSuccess;
  if (args.x0 == nullptr || args.x_t == nullptr) return cudaErrorInvalidValue;
  return with_row_variant(args.dtype, shape, args.key.on_device,
                          [&](auto* type, auto channels_last, auto key_on_device) {
                            using T = std::remove_pointer_t<decltype(type)>;
                            const Work work = make_work<T, channels_last>(shape, {args.x0, args.x_t, args.noise});
                            return launch(add_noise_kernel<T, channels_last, key_on_device>, work.grid(), block_threads,
                                          0, stream, AddNoiseTensors{args.x0, args.x_t, args.noise},
                                          Table<AddNoise::columns>(args.table), work, noise_words(args.key));
                          });
}

}  // namespace gencore::cuda
