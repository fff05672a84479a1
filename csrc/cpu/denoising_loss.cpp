#include "gencore/denoising_loss.h"

#include "noise.h"
#include "rows.h"
#include "sums.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// The columns of a row, each rounded once to the type of the arithmetic.
template <class P, class A>
struct LossRow {
  using F = typename P::F;
  F of_x0, of_noise, weight, bound_weight, moved, middle, half_range, posterior;
  bool uses_data, bounds, is_first;

  explicit LossRow(const double* c)
      : of_x0(round(c[0])),
        of_noise(round(c[1])),
        weight(round(c[2])),
        bound_weight(round(c[3])),
        moved(round(c[4])),
        middle(round(c[5])),
        half_range(round(c[6])),
        posterior(round(c[7])),
        uses_data(c[0] != 0),
        bounds(c[3] != 0),
        is_first(std::isinf(c[7])) {}

 private:
  static F round(double coefficient) { return P::set(static_cast<A>(coefficient)); }
};

// prediction - target, for one vector.
template <class P, class A, class T, class N>
inline typename P::F error_of(const LossRow<P, A>& c, const T* prediction, const T* x0, const N* noise,
                              std::int64_t count) {
  // A target that is noise alone needs no data, and reading it would take a third of the time.
  const typename P::F signal = c.uses_data ? P::mul(c.of_x0, load_part<P>(x0, count)) : P::set(0);
  const typename P::F target = P::fma(c.of_noise, load_part<P>(noise, count), signal);
  return P::sub(load_part<P>(prediction, count), target);
}

// By what d is multiplied in the gradient; `share` is that of the loss by the elements.
template <class P, class A>
inline typename P::F factor_of(const LossRow<P, A>& c, A share) {
  return P::mul(P::set(share), P::mul(P::set(2.0f), c.weight));
}

// For the first step: body(i, the decoder's term) for each element of a run, whose vectors of errors and log variances
// come from `at(i, count, error, log_variance)`.
template <class P, class A, class T, class At, class Body>
inline void for_decoder_terms(std::int64_t length, const T* x0, const LossRow<P, A>& c, At&& at, Body&& body) {
  for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
    typename P::F error, log_variance;
    at(i, count, error, log_variance);
    A moved[P::width], of_variance[P::width], data[P::width];
    P::store(moved, P::mul(c.moved, error));
    P::store(of_variance, log_variance);
    P::store(data, load_part<P>(x0 + i, count));
    for (std::int64_t j = 0; j < count && j < P::width; ++j) {
      const double x = static_cast<double>(data[j]);
      body(i + j, decoder_term(x, x + static_cast<double>(moved[j]), static_cast<double>(of_variance[j])));
    }
  });
}

// Calls body(noise) with the noise of the n elements from `start` on: what is given, or what is made in `space`.
template <class T, class Body>
inline void with_noise(const void* given, const NoiseShape& shape, const NoiseKey& key, std::int64_t start,
                       std::int64_t n, float* space, Body&& body) {
  if (given != nullptr) {
    body(static_cast<const T*>(given) + start);
    return;
  }
  NoiseSource<Normals>(shape, key).fill(start, n, space);
  body(static_cast<const float*>(space));
}

template <class T>
Status forward(const DenoisingLoss& args, int threads) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  using A = Accumulator<T>;
  const NoiseShape& shape = args.shape;
  const Tiles tiles(shape.samples, shape);
  const std::int64_t capacity = tiles.capacity();
  const T* const output = static_cast<const T*>(args.output);
  const T* const x0 = static_cast<const T*>(args.x0);
  T* const kept = static_cast<T*>(args.error);
  A* const loss = static_cast<A*>(args.loss);

  const int team = tiles.team(threads);
  const Workspace<float> noise_space(team, args.noise == nullptr ? capacity : 0);
  const Workspace<A> term_space(team, capacity);
  const Workspace<T> half_space(team, args.learned && shape.channels > 1 ? 2 * capacity : 0);
  const RowSums sums(tiles, true, static_cast<double>(shape.elements));
  if (!noise_space.ok() || !term_space.ok() || !half_space.ok() || !sums.ok()) return Status::out_of_memory;

  tiles.for_each(threads, [&](std::int64_t start, std::int64_t n, int thread) {
    A* const terms = term_space.of_thread(thread);
    with_noise<T>(args.noise, shape, args.key, start, n, noise_space.of_thread(thread), [&](const auto* noise_of_tile) {
      for_each_row(start, n, shape.elements, [&](std::int64_t row, std::int64_t offset, std::int64_t length) {
        const LossRow<P, A> c(row_of(args.table, row, DenoisingLoss::columns));
        const auto* const noise = noise_of_tile + offset;
        const T* const data = x0 + start + offset;
        A* const term = terms + offset;
        const auto [prediction, place] =
            halves_of(output, args.learned, shape, row, start + offset, length, half_space.of_thread(thread));
        for_vectors<P>(length, [&, prediction = prediction](std::int64_t i, std::int64_t count) {
          const F error = error_of<P>(c, prediction + i, data + i, noise + i, count);
          store_part<P>(term + i, P::mul(c.weight, P::mul(error, error)), count);
          if (kept != nullptr) store_part<P>(kept + start + offset + i, error, count);
        });
        if (!c.bounds) return;
        const auto at = [&, prediction = prediction, place = place](std::int64_t i, std::int64_t count, F& error,
                                                                    F& log_variance) {
          error = error_of<P>(c, prediction + i, data + i, noise + i, count);
          log_variance = args.learned ? P::fma(c.half_range, load_part<P>(place + i, count), c.middle) : c.middle;
        };
        if (c.is_first) {
          const double weight = row_of(args.table, row, DenoisingLoss::columns)[3];
          for_decoder_terms<P>(length, data, c, at, [&](std::int64_t i, const DecoderTerm& found) {
            term[i] += static_cast<A>(weight * found.value);
          });
          return;
        }
        for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
          F error, log_variance;
          at(i, count, error, log_variance);
          const F gap = P::sub(log_variance, c.posterior), moved = P::mul(c.moved, error);
          const F apart = P::mul(P::mul(moved, moved), exponential<P>(P::sub(P::set(0), log_variance)));
          const F widths = P::add(P::sub(gap, P::set(1.0f)), exponential<P>(P::sub(P::set(0), gap)));
          const F bound = P::mul(P::set(0.5f), P::add(widths, apart));
          store_part<P>(term + i, P::fma(c.bound_weight, bound, load_part<P>(term + i, count)), count);
        });
      });
    });
    sums.add(start, n, terms, loss);
  });
  sums.finish(loss);
  return Status::ok;
}

template <class T>
Status backward(const DenoisingLossBackward& args, int threads) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  using A = Accumulator<T>;
  const NoiseShape& shape = args.shape;
  const Tiles tiles(shape.samples, shape);
  const std::int64_t capacity = tiles.capacity(), channels = shape.channels;
  const A* const grad_loss = static_cast<const A*>(args.grad_loss);
  const T* const output = static_cast<const T*>(args.output);
  const T* const x0 = static_cast<const T*>(args.x0);
  T* const grad_output = static_cast<T*>(args.grad_output);
  const bool scatters = args.learned && channels > 1;

  const int team = tiles.team(threads);
  const Workspace<float> noise_space(team, args.noise == nullptr ? capacity : 0);
  const Workspace<T> half_space(team, scatters ? 4 * capacity : 0);
  if (!noise_space.ok() || !half_space.ok()) return Status::out_of_memory;

  tiles.for_each(threads, [&](std::int64_t start, std::int64_t n, int thread) {
    with_noise<T>(args.noise, shape, args.key, start, n, noise_space.of_thread(thread), [&](const auto* noise_of_tile) {
      for_each_row(start, n, shape.elements, [&](std::int64_t row, std::int64_t offset, std::int64_t length) {
        const double* const coefficients = row_of(args.table, row, DenoisingLoss::columns);
        const LossRow<P, A> c(coefficients);
        const auto* const noise = noise_of_tile + offset;
        const std::int64_t first = start + offset;
        const T* const data = x0 + first;
        T* const space = half_space.of_thread(thread);
        const Halves<T> half = halves_of(output, args.learned, shape, row, first, length, space);
        // Where the halves are side by side in pixels, the gradient is made apart and then put there.
        T* to_prediction = grad_output + first + (args.learned ? row * shape.elements : 0);
        T* to_place = to_prediction + shape.elements;
        if (scatters) {
          to_prediction = space + 2 * capacity;
          to_place = to_prediction + length;
        }
        const A share = grad_loss[row] / static_cast<A>(shape.elements);
        const F factor = factor_of<P>(c, share);
        for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
          const F error = error_of<P>(c, half.prediction + i, data + i, noise + i, count);
          store_part<P>(to_prediction + i, P::mul(factor, error), count);
        });
        if (!args.learned) return;
        const F of_bound = P::mul(P::mul(P::set(share), c.bound_weight), c.half_range);
        const auto at = [&](std::int64_t i, std::int64_t count, F& error, F& log_variance) {
          error = error_of<P>(c, half.prediction + i, data + i, noise + i, count);
          log_variance = P::fma(c.half_range, load_part<P>(half.place + i, count), c.middle);
        };
        if (!c.bounds) {
          std::memset(to_place, 0, static_cast<std::size_t>(length) * sizeof(T));
        } else if (c.is_first) {
          const double of_bound_exactly = static_cast<double>(share) * coefficients[3] * coefficients[6];
          for_decoder_terms<P>(length, data, c, at, [&](std::int64_t i, const DecoderTerm& found) {
            store_part<P>(to_place + i, P::set(static_cast<A>(of_bound_exactly * found.derivative)), 1);
          });
        } else {
          for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
            F error, log_variance;
            at(i, count, error, log_variance);
            const F gap = P::sub(log_variance, c.posterior), moved = P::mul(c.moved, error);
            const F apart = P::mul(P::mul(moved, moved), exponential<P>(P::sub(P::set(0), log_variance)));
            const F widths = P::sub(P::set(1.0f), exponential<P>(P::sub(P::set(0), gap)));
            const F slope = P::mul(P::set(0.5f), P::sub(widths, apart));
            store_part<P>(to_place + i, P::mul(of_bound, slope), count);
          });
        }
        for (std::int64_t i = 0; scatters && i < length; i += channels) {
          T* const pixel = grad_output + 2 * (first + i);
          for (std::int64_t k = 0; k < channels; ++k) {
            pixel[k] = to_prediction[i + k];
            pixel[channels + k] = to_place[i + k];
          }
        }
      });
    });
  });
  return Status::ok;
}

template <class T>
Status scale(const DenoisingLossBackward& args, int threads) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  using A = Accumulator<T>;
  const NoiseShape& shape = args.shape;
  T* const grad_output = static_cast<T*>(args.grad_output);
  const Tiles tiles(shape.samples, shape);
  tiles.for_each(threads, [&](std::int64_t start, std::int64_t n, int) {
    for_each_row(start, n, shape.elements, [&](std::int64_t row, std::int64_t offset, std::int64_t length) {
      const LossRow<P, A> c(row_of(args.table, row, DenoisingLoss::columns));
      const F factor = factor_of<P>(c, static_cast<const A*>(args.grad_loss)[row] / static_cast<A>(shape.elements));
      T* const at = grad_output + start + offset;
      for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
        store_part<P>(at + i, P::mul(factor, load_part<P>(at + i, count)), count);
      });
    });
  });
  return Status::ok;
}

}  // namespace

Status denoising_loss(const DenoisingLoss& args, int threads) {
  return with_type(args.dtype,
                   [&](auto* type) { return forward<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

Status denoising_loss_backward(const DenoisingLossBackward& args, int threads) {
  return with_type(args.dtype,
                   [&](auto* type) { return backward<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

Status denoising_loss_scale(const DenoisingLossBackward& args, int threads) {
  return with_type(args.dtype, [&](auto* type) { return scale<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status denoising_loss(const DenoisingLoss&, int))
GENCORE_DECLARE_LEVELS(Status denoising_loss_backward(const DenoisingLossBackward&, int))
GENCORE_DECLARE_LEVELS(Status denoising_loss_scale(const DenoisingLossBackward&, int))

Status denoising_loss(const DenoisingLoss& args, int threads) {
  if (!is_valid(args.shape, args.key, threads) || args.shape.draws != 1) return Status::invalid_argument;
  if (!has_rows(args.table, args.shape.samples)) return Status::invalid_argument;
  if (args.shape.samples == 0) return Status::ok;
  if (args.loss == nullptr || (args.learned && args.error != nullptr)) return Status::invalid_argument;
  if (args.shape.elements == 0) {
    // The mean of nothing.
    for (std::int64_t b = 0; b < args.shape.samples; ++b) {
      if (args.dtype == DType::float64) {
        static_cast<double*>(args.loss)[b] = NAN;
      } else {
        static_cast<float*>(args.loss)[b] = NAN;
      }
    }
    return Status::ok;
  }
  if (args.output == nullptr || args.x0 == nullptr) return Status::invalid_argument;
  GENCORE_DISPATCH(denoising_loss, args, threads);
}

Status denoising_loss_backward(const DenoisingLossBackward& args, int threads) {
  if (!is_valid(args.shape, args.key, threads) || args.shape.draws != 1) return Status::invalid_argument;
  if (!has_rows(args.table, args.shape.samples)) return Status::invalid_argument;
  if (args.shape.samples == 0 || args.shape.elements == 0) return Status::ok;
  if (args.grad_loss == nullptr || args.output == nullptr || args.x0 == nullptr || args.grad_output == nullptr) {
    return Status::invalid_argument;
  }
  GENCORE_DISPATCH(denoising_loss_backward, args, threads);
}

Status denoising_loss_scale(const DenoisingLossBackward& args, int threads) {
  if (!is_valid(args.shape, args.key, threads) || args.shape.draws != 1) return Status::invalid_argument;
  if (!has_rows(args.table, args.shape.samples) || args.learned) return Status::invalid_argument;
  if (args.shape.samples == 0 || args.shape.elements == 0) return Status::ok;
  if (args.grad_loss == nullptr || args.grad_output == nullptr) return Status::invalid_argument;
  GENCORE_DISPATCH(denoising_loss_scale, args, threads);
}

}  // namespace gencore::cpu
#endif
