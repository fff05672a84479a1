#include "gencore/add_noise.h"

#include "noise.h"
#include "rows.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class T>
Status forward(const AddNoise& args, int threads) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  using A = Accumulator<T>;
  const NoiseShape& shape = args.shape;
  const Tiles tiles(shape.samples, shape);
  const T* const x0 = static_cast<const T*>(args.x0);
  T* const x_t = static_cast<T*>(args.x_t);
  T* const eps = static_cast<T*>(args.noise);

  const Workspace<float> noise_space(tiles.team(threads), tiles.capacity());
  if (!noise_space.ok()) return Status::out_of_memory;

  tiles.for_each(threads, [&](std::int64_t start, std::int64_t n, int thread) {
    float* const noise = noise_space.of_thread(thread);
    NoiseSource<Normals>(shape, args.key).fill(start, n, noise);
    for_each_row(start, n, shape.elements, [&](std::int64_t row, std::int64_t offset, std::int64_t length) {
      const double* const c = row_of(args.table, row, AddNoise::columns);
      const F alpha = P::set(static_cast<A>(c[0])), sigma = P::set(static_cast<A>(c[1]));
      const float* const value = noise + offset;
      const std::int64_t at = start + offset;
      for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
        const F drawn = load_part<P>(value + i, count);
        const F signal = P::mul(alpha, load_part<P>(x0 + at + i, count));
        store_part<P>(x_t + at + i, P::fma(sigma, drawn, signal), count);
        if (eps != nullptr) store_part<P>(eps + at + i, drawn, count);
      });
    });
  });
  return Status::ok;
}

}  // namespace

Status add_noise(const AddNoise& args, int threads) {
  return with_type(args.dtype,
                   [&](auto* type) { return forward<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status add_noise(const AddNoise&, int))

Status add_noise(const AddNoise& args, int threads) {
  if (!is_valid(args.shape, args.key, threads) || args.shape.draws != 1) return Status::invalid_argument;
  if (!has_rows(args.table, args.shape.samples)) return Status::invalid_argument;
  if (args.shape.samples == 0 || args.shape.elements == 0) return Status::ok;
  if (args.x0 == nullptr || args.x_t == nullptr) return Status::invalid_argument;
  GENCORE_DISPATCH(add_noise, args, threads);
}

}  // namespace gencore::cpu
#endif
