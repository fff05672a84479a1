#include "gencore/diffusion_step.h"

#include "noise.h"
#include "rows.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// The columns of a row, each rounded once to the type of the arithmetic.
template <class P, class A>
struct StepRow {
  using F = typename P::F;
  F output, second, predict_x, predict_output, limit, x0_scale, x, direct, x0, history0, history1, noise, log_scale,
      log_scale_slope, known, known_noise;
  bool makes_noise, scales_noise, noises_known;

  StepRow(const double* c, bool learned, bool with_known)
      : output(round(c[0])),
        second(round(c[1])),
        predict_x(round(c[2])),
        predict_output(round(c[3])),
        limit(round(c[4])),
        x0_scale(round(c[5])),
        x(round(c[6])),
        direct(round(c[7])),
        x0(round(c[8])),
        history0(round(c[9])),
        history1(round(c[10])),
        noise(round(c[11])),
        log_scale(round(c[12])),
        log_scale_slope(round(c[13])),
        known(round(c[14])),
        known_noise(round(c[15])),
        makes_noise(c[11] != 0),
        scales_noise(makes_noise && learned && (c[12] != 0 || c[13] != 0)),
        noises_known(with_known && c[15] != 0) {}

  // Whether a row needs noise.
  static bool draws(const double* c, bool with_known) { return c[11] != 0 || (with_known && c[15] != 0); }

 private:
  static F round(double coefficient) { return P::set(static_cast<A>(coefficient)); }
};

template <class T>
Status step(const DiffusionStep& args, int threads) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  using A = Accumulator<T>;
  const NoiseShape& shape = args.shape;
  const Tiles tiles(shape.samples, shape);
  const std::int64_t capacity = tiles.capacity();
  const T* const x = static_cast<const T*>(args.x);
  const T* const output = static_cast<const T*>(args.output);
  const T* const second = static_cast<const T*>(args.second);
  const T* const history[2] = {static_cast<const T*>(args.history0), static_cast<const T*>(args.history1)};
  const T* const known = static_cast<const T*>(args.known);
  const T* const mask = static_cast<const T*>(args.mask);
  T* const y = static_cast<T*>(args.y);
  T* const prediction = static_cast<T*>(args.prediction);
  const bool learned = args.learned && output != nullptr;
  const bool gathers = shape.channels > 1 && (learned || args.second_learned);

  const int team = tiles.team(threads);
  const Workspace<float> noise_space(team, capacity);
  const Workspace<A> sum_space(team, capacity);
  const Workspace<T> half_space(team, gathers ? 4 * capacity : 0);
  if (!noise_space.ok() || !sum_space.ok() || !half_space.ok()) return Status::out_of_memory;

  tiles.for_each(threads, [&](std::int64_t start, std::int64_t n, int thread) {
    float* const noise = noise_space.of_thread(thread);
    bool draws = false;
    for_each_row(start, n, shape.elements, [&](std::int64_t row, std::int64_t, std::int64_t) {
      draws |= StepRow<P, A>::draws(row_of(args.table, row, DiffusionStep::columns), known != nullptr);
    });
    if (draws) NoiseSource<Normals>(shape, args.key).fill(start, n, noise);

    for_each_row(start, n, shape.elements, [&](std::int64_t row, std::int64_t offset, std::int64_t length) {
      const StepRow<P, A> c(row_of(args.table, row, DiffusionStep::columns), learned, known != nullptr);
      const std::int64_t at = start + offset;
      // y as it grows; it stays in the first-level cache.
      A* const sum = sum_space.of_thread(thread);
      T* const space = half_space.of_thread(thread);
      Halves<T> first{};
      if (output != nullptr) {
        first = halves_of(output, learned, shape, row, at, length, space);
        const auto predict = [&](auto with_second, auto completes, auto adds_noise) {
          const T* other = nullptr;
          if constexpr (with_second) {
            other = halves_of(second, args.second_learned, shape, row, at, length, space + 2 * capacity).prediction;
          }
          for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
            const F state = load_part<P>(x + at + i, count);
            F guided = P::mul(c.output, load_part<P>(first.prediction + i, count));
            if constexpr (with_second) guided = P::fma(c.second, load_part<P>(other + i, count), guided);
            const F raw = P::fma(c.predict_output, guided, P::mul(c.predict_x, state));
            // min and max give their second operand if one is NaN.
            const F cut = P::max(P::sub(P::set(0), c.limit), P::min(c.limit, raw));
            const F x0 = P::mul(c.x0_scale, cut);
            if (prediction != nullptr) store_part<P>(prediction + at + i, x0, count);
            F value = P::fma(c.x0, x0, P::fma(c.direct, guided, P::mul(c.x, state)));
            if constexpr (completes) {
              if constexpr (adds_noise) value = P::fma(c.noise, load_part<P>(noise + offset + i, count), value);
              store_part<P>(y + at + i, value, count);
            } else {
              store_part<P>(sum + i, value, count);
            }
          });
        };
        const std::true_type yes;
        const std::false_type no;
        // Most steps are no more than this, and need no second look at y.
        const bool completes = history[0] == nullptr && history[1] == nullptr && known == nullptr && !c.scales_noise;
        if (second != nullptr) {
          !completes ? predict(yes, no, no) : c.makes_noise ? predict(yes, yes, yes) : predict(yes, yes, no);
        } else {
          !completes ? predict(no, no, no) : c.makes_noise ? predict(no, yes, yes) : predict(no, yes, no);
        }
        if (completes) return;
      } else {
        for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
          store_part<P>(sum + i, P::mul(c.x, load_part<P>(x + at + i, count)), count);
        });
      }
      for (int earlier = 0; earlier < 2; ++earlier) {
        if (history[earlier] == nullptr) continue;
        const F factor = earlier == 0 ? c.history0 : c.history1;
        const T* const values = history[earlier] + at;
        for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
          const F so_far = load_part<P>(sum + i, count);
          store_part<P>(sum + i, P::fma(factor, load_part<P>(values + i, count), so_far), count);
        });
      }
      if (c.scales_noise) {
        for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
          const F exponent = P::fma(c.log_scale_slope, load_part<P>(first.place + i, count), c.log_scale);
          const F scale = P::mul(c.noise, exponential<P>(exponent));
          const F drawn = load_part<P>(noise + offset + i, count);
          store_part<P>(sum + i, P::fma(scale, drawn, load_part<P>(sum + i, count)), count);
        });
      }
      const auto finish = [&](auto adds_noise, auto with_known) {
        for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) {
          F value = load_part<P>(sum + i, count);
          if constexpr (adds_noise) value = P::fma(c.noise, load_part<P>(noise + offset + i, count), value);
          if constexpr (with_known) {
            F there = P::mul(c.known, load_part<P>(known + at + i, count));
            if (c.noises_known) there = P::fma(c.known_noise, load_part<P>(noise + offset + i, count), there);
            const F share = load_part<P>(mask + at + i, count);
            value = P::fma(share, there, P::mul(P::sub(P::set(1.0f), share), value));
          }
          store_part<P>(y + at + i, value, count);
        });
      };
      const bool adds_noise = c.makes_noise && !c.scales_noise;
      if (known != nullptr) {
        adds_noise ? finish(std::true_type{}, std::true_type{}) : finish(std::false_type{}, std::true_type{});
      } else {
        adds_noise ? finish(std::true_type{}, std::false_type{}) : finish(std::false_type{}, std::false_type{});
      }
    });
  });
  return Status::ok;
}

}  // namespace

Status diffusion_step(const DiffusionStep& args, int threads) {
  return with_type(args.dtype, [&](auto* type) { return step<std::remove_pointer_t<decltype(type)>>(args, threads); });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status diffusion_step(const DiffusionStep&, int))

Status diffusion_step(const DiffusionStep& args, int threads) {
  if (!is_valid(args.shape, args.key, threads) || args.shape.draws != 1) return Status::invalid_argument;
  if (!has_rows(args.table, args.shape.samples)) return Status::invalid_argument;
  if (args.shape.samples == 0 || args.shape.elements == 0) return Status::ok;
  const bool needless = args.output == nullptr && (args.second != nullptr || args.prediction != nullptr);
  if (args.x == nullptr || args.y == nullptr || needless || (args.known == nullptr) != (args.mask == nullptr)) {
    return Status::invalid_argument;
  }
  GENCORE_DISPATCH(diffusion_step, args, threads);
}

}  // namespace gencore::cpu
#endif
