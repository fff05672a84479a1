#include "gencore/reparameterize.h"

#include "noise.h"
#include "sums.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class T>
Status forward(const Reparameterize& args, int threads) {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  using F = typename P::F;
  const NoiseShape& shape = args.shape;
  const Tiles tiles(shape.samples, shape, shape.draws);
  const std::int64_t capacity = tiles.capacity(), draw_size = shape.samples * shape.elements;
  const T* const mu = static_cast<const T*>(args.mu);
  const T* const logvar = static_cast<const T*>(args.logvar);
  T* const z = static_cast<T*>(args.z);
  T* const slope = static_cast<T*>(args.slope);
  A* const kl = static_cast<A*>(args.kl);

  const Workspace<float> noise_space(tiles.team(threads), capacity);
  const Workspace<A> sigma_space(tiles.team(threads), 2 * capacity);
  const RowSums sums(tiles, kl != nullptr);
  if (!noise_space.ok() || !sigma_space.ok() || !sums.ok()) return Status::out_of_memory;

  if (kl != nullptr && shape.elements == 0) std::memset(kl, 0, static_cast<std::size_t>(shape.samples) * sizeof(A));

  tiles.for_each(threads, [&](std::int64_t start, std::int64_t n, int thread) {
    float* const noise = noise_space.of_thread(thread);
    NoiseSource<Normals> source(shape, args.key);
    if (kl == nullptr && shape.draws == 1) {
      source.fill(start, n, noise);
      for_vectors<P>(n, [&](std::int64_t i, std::int64_t count) {
        const F sigma = exponential<P>(P::mul(load_part<P>(logvar + start + i, count), P::set(0.5f)));
        const F mean = load_part<P>(mu + start + i, count), eps = load_part<P>(noise + i, count);
        store_part<P>(z + start + i, P::fma(sigma, eps, mean), count);
        if (slope != nullptr) store_part<P>(slope + start + i, P::mul(P::mul(P::set(0.5f), sigma), eps), count);
      });
      return;
    }
    A* const sigma = sigma_space.of_thread(thread);
    A* const term = sigma + capacity;
    for_vectors<P>(n, [&](std::int64_t i, std::int64_t count) {
      const F mean = load_part<P>(mu + start + i, count), log_variance = load_part<P>(logvar + start + i, count);
      const F deviation = exponential<P>(P::mul(log_variance, P::set(0.5f)));
      store_part<P>(sigma + i, deviation, count);
      if (kl == nullptr) return;
      // 1/2 (mu^2 + sigma^2 - 1 - logvar)
      const F square = P::fma(mean, mean, P::fma(deviation, deviation, P::set(-1.0f)));
      store_part<P>(term + i, P::mul(P::set(0.5f), P::sub(square, log_variance)), count);
    });
    for (std::int64_t draw = 0; draw < shape.draws; ++draw) {
      const std::int64_t at = draw * draw_size + start;
      source.fill(at, n, noise);
      for_vectors<P>(n, [&](std::int64_t i, std::int64_t count) {
        const F mean = load_part<P>(mu + start + i, count), deviation = load_part<P>(sigma + i, count);
        const F eps = load_part<P>(noise + i, count);
        store_part<P>(z + at + i, P::fma(deviation, eps, mean), count);
        if (slope != nullptr) store_part<P>(slope + at + i, P::mul(P::mul(P::set(0.5f), deviation), eps), count);
      });
    }
    if (kl != nullptr) sums.add(start, n, term, kl);
  });
  if (kl != nullptr) sums.finish(kl);
  return Status::ok;
}

template <class T>
Status backward(const ReparameterizeBackward& args, int threads) {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  using F = typename P::F;
  const NoiseShape& shape = args.shape;
  const Tiles tiles(shape.samples, shape, shape.draws);
  const std::int64_t capacity = tiles.capacity(), draw_size = shape.samples * shape.elements;
  const T* const grad_z = static_cast<const T*>(args.grad_z);
  const A* const grad_kl = static_cast<const A*>(args.grad_kl);
  const T* const mu = static_cast<const T*>(args.mu);
  const T* const logvar = static_cast<const T*>(args.logvar);
  T* const grad_mu = static_cast<T*>(args.grad_mu);
  T* const grad_logvar = static_cast<T*>(args.grad_logvar);

  const Workspace<float> noise_space(tiles.team(threads), capacity);
  const Workspace<A> sum_space(tiles.team(threads), 2 * capacity);
  if (!noise_space.ok() || !sum_space.ok()) return Status::out_of_memory;

  tiles.for_each(threads, [&](std::int64_t start, std::int64_t n, int thread) {
    float* const noise = noise_space.of_thread(thread);
    NoiseSource<Normals> source(shape, args.key);
    if (grad_kl == nullptr && grad_mu == nullptr && shape.draws == 1 && grad_z != nullptr) {
      source.fill(start, n, noise);
      for_vectors<P>(n, [&](std::int64_t i, std::int64_t count) {
        const F deviation = exponential<P>(P::mul(load_part<P>(logvar + start + i, count), P::set(0.5f)));
        const F product = P::mul(load_part<P>(grad_z + start + i, count), load_part<P>(noise + i, count));
        store_part<P>(grad_logvar + start + i, P::mul(product, P::mul(P::set(0.5f), deviation)), count);
      });
      return;
    }
    // sum_d grad_z and sum_d grad_z eps
    A* const plain = sum_space.of_thread(thread);
    A* const weighted = plain + capacity;
    std::memset(plain, 0, static_cast<std::size_t>(n) * sizeof(A));
    std::memset(weighted, 0, static_cast<std::size_t>(n) * sizeof(A));
    for (std::int64_t draw = 0; draw < shape.draws && grad_z != nullptr; ++draw) {
      const std::int64_t at = draw * draw_size + start;
      source.fill(at, n, noise);
      for_vectors<P>(n, [&](std::int64_t i, std::int64_t count) {
        const F g = load_part<P>(grad_z + at + i, count);
        store_part<P>(plain + i, P::add(load_part<P>(plain + i, count), g), count);
        store_part<P>(weighted + i, P::fma(g, load_part<P>(noise + i, count), load_part<P>(weighted + i, count)),
                      count);
      });
    }
    // Row by row, because each sample has a grad_kl of its own; a tile is whole rows or a piece of one.
    for (std::int64_t row_start = 0; row_start < n;) {
      const std::int64_t row = (start + row_start) / shape.elements;
      const std::int64_t rest = (row + 1) * shape.elements - (start + row_start);
      const std::int64_t length = rest < n - row_start ? rest : n - row_start;
      const F g_kl = P::set(grad_kl == nullptr ? A(0) : grad_kl[row]);
      for_vectors<P>(length, [&](std::int64_t j, std::int64_t count) {
        const std::int64_t i = row_start + j;
        const F deviation = exponential<P>(P::mul(load_part<P>(logvar + start + i, count), P::set(0.5f)));
        F to_mu = load_part<P>(plain + i, count);
        // Without grad_z there is no such term, not even 0 * infinity.
        F to_logvar = grad_z == nullptr ? P::set(0) : P::mul(load_part<P>(weighted + i, count), deviation);
        if (grad_kl != nullptr) {
          to_mu = P::fma(g_kl, load_part<P>(mu + start + i, count), to_mu);
          to_logvar = P::fma(g_kl, P::fma(deviation, deviation, P::set(-1.0f)), to_logvar);
        }
        if (grad_mu != nullptr) store_part<P>(grad_mu + start + i, to_mu, count);
        store_part<P>(grad_logvar + start + i, P::mul(P::set(0.5f), to_logvar), count);
      });
      row_start += length;
    }
  });
  return Status::ok;
}

}  // namespace

Status reparameterize(const Reparameterize& args, int threads) {
  return with_type(args.dtype,
                   [&](auto* type) { return forward<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

Status reparameterize_backward(const ReparameterizeBackward& args, int threads) {
  return with_type(args.dtype,
                   [&](auto* type) { return backward<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status reparameterize(const Reparameterize&, int))
GENCORE_DECLARE_LEVELS(Status reparameterize_backward(const ReparameterizeBackward&, int))

Status reparameterize(const Reparameterize& args, int threads) {
  if (!is_valid(args.shape, args.key, threads)) return Status::invalid_argument;
  if (args.shape.samples == 0) return Status::ok;
  if (args.shape.elements > 0 && (args.mu == nullptr || args.logvar == nullptr || args.z == nullptr)) {
    return Status::invalid_argument;
  }
  GENCORE_DISPATCH(reparameterize, args, threads);
}

Status reparameterize_backward(const ReparameterizeBackward& args, int threads) {
  if (!is_valid(args.shape, args.key, threads)) return Status::invalid_argument;
  if (args.shape.samples == 0 || args.shape.elements == 0) return Status::ok;
  if (args.logvar == nullptr || args.grad_logvar == nullptr || (args.grad_kl != nullptr && args.mu == nullptr)) {
    return Status::invalid_argument;
  }
  GENCORE_DISPATCH(reparameterize_backward, args, threads);
}

}  // namespace gencore::cpu
#endif
