#include "coefficients.cuh"
#include "gencore/diffusion_step.h"
#include "noise.cuh"

namespace gencore::cuda {

// The columns of a row, each rounded once to the type of the arithmetic, and which noise they ask for.
template <class F>
struct StepRow {
  F output, second, predict_x, predict_output, limit, x0_scale, x, direct, x0, history0, history1, noise, log_scale,
      log_scale_slope, known, known_noise;
  bool adds_noise, scales_noise, noises_known;

  __host__ __device__ __forceinline__ void set(const double (&c)[DiffusionStep::columns], bool learned,
                                               bool with_known) {
    output = static_cast<F>(c[0]);
    second = static_cast<F>(c[1]);
    predict_x = static_cast<F>(c[2]);
    predict_output = static_cast<F>(c[3]);
    limit = static_cast<F>(c[4]);
    x0_scale = static_cast<F>(c[5]);
    x = static_cast<F>(c[6]);
    direct = static_cast<F>(c[7]);
    x0 = static_cast<F>(c[8]);
    history0 = static_cast<F>(c[9]);
    history1 = static_cast<F>(c[10]);
    noise = static_cast<F>(c[11]);
    log_scale = static_cast<F>(c[12]);
    log_scale_slope = static_cast<F>(c[13]);
    known = static_cast<F>(c[14]);
    known_noise = static_cast<F>(c[15]);
    adds_noise = c[11] != 0;
    scales_noise = adds_noise && learned && (c[12] != 0 || c[13] != 0);
    noises_known = with_known && c[15] != 0;
  }
};

struct StepTensors {
  const void *x, *output, *second, *history0, *history1, *known, *mask;
  void *y, *prediction;
  bool learned, second_learned;
};

// A row that is every sample's is read from constant memory, as an operand of the arithmetic; others take registers.
template <class F, bool from_device>
using StepCoefficients = std::conditional_t<from_device, Table<DiffusionStep::columns>, StepRow<F>>;

template <class F>
__device__ __forceinline__ const StepRow<F>& chosen(const StepRow<F>& own, const Table<DiffusionStep::columns>&) {
  return own;
}
template <class F>
__device__ __forceinline__ const StepRow<F>& chosen(int, const StepRow<F>& only) {
  return only;
}

// Which tensors there are is asked at run time: all that there are are loaded before any is waited for, and the noise
// is made meanwhile.
template <class T, bool channels_last, bool from_device>
__global__ void __launch_bounds__(block_threads, at_least<T>(from_device || channels_last ? 2 : 3))
    diffusion_step_kernel(const __grid_constant__ StepTensors tensors,
                          const __grid_constant__ StepCoefficients<typename Arithmetic<T>::F, from_device> coefficients,
                          const __grid_constant__ Work work, const __grid_constant__ NoiseWords words) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int size = item_size<T, channels_last>;
  const auto of = [](const void* tensor) { return static_cast<const T*>(tensor); };
  RowNoise<from_device> noise;
  std::conditional_t<from_device, StepRow<F>, int> own{};
  for_each_item<T, channels_last>(
      work,
      [&](std::int64_t row) {
        noise.begin_either(words, row);
        if constexpr (from_device) {
          double c[DiffusionStep::columns];
          coefficients.read(row, c);
          own.set(c, tensors.learned, tensors.known != nullptr);
        }
      },
      [&](const Item<T, channels_last>& item) {
        const StepRow<F>& c = chosen(own, coefficients);
        Held<T, channels_last> output, place, second, history0, history1, known, mask;
        const auto x = item.hold(of(tensors.x));
        if (tensors.output != nullptr) {
          output = tensors.learned ? item.hold_half(of(tensors.output), 0) : item.hold(of(tensors.output));
          if (c.scales_noise) place = item.hold_half(of(tensors.output), 1);
        }
        if (tensors.second != nullptr) {
          second = tensors.second_learned ? item.hold_half(of(tensors.second), 0) : item.hold(of(tensors.second));
        }
        if (tensors.history0 != nullptr) history0 = item.hold(of(tensors.history0));
        if (tensors.history1 != nullptr) history1 = item.hold(of(tensors.history1));
        if (tensors.known != nullptr) {
          known = item.hold(of(tensors.known));
          mask = item.hold(of(tensors.mask));
        }
        float eps[size];
        if (c.adds_noise || c.noises_known) make_noise<Normals>(noise, item, 0, eps);

        F y[size], value[size];
        x.get(y);
        if (tensors.output != nullptr) {
          F guided[size];
          output.get(guided);
#pragma unroll
          for (int i = 0; i < size; ++i) guided[i] = P::mul(c.output, guided[i]);
          if (tensors.second != nullptr) {
            second.get(value);
#pragma unroll
            for (int i = 0; i < size; ++i) guided[i] = P::fma(c.second, value[i], guided[i]);
          }
#pragma unroll
          for (int i = 0; i < size; ++i) {
            const F raw = P::fma(c.predict_output, guided[i], P::mul(c.predict_x, y[i]));
            value[i] = P::mul(c.x0_scale, P::max(P::sub(P::set(0), c.limit), P::min(c.limit, raw)));
            y[i] = P::fma(c.x0, value[i], P::fma(c.direct, guided[i], P::mul(c.x, y[i])));
          }
          if (tensors.prediction != nullptr) item.store(static_cast<T*>(tensors.prediction), value);
        } else {
#pragma unroll
          for (int i = 0; i < size; ++i) y[i] = P::mul(c.x, y[i]);
        }
        if (tensors.history0 != nullptr) {
          history0.get(value);
#pragma unroll
          for (int i = 0; i < size; ++i) y[i] = P::fma(c.history0, value[i], y[i]);
        }
        if (tensors.history1 != nullptr) {
          history1.get(value);
#pragma unroll
          for (int i = 0; i < size; ++i) y[i] = P::fma(c.history1, value[i], y[i]);
        }
        if (c.scales_noise) {
          place.get(value);
#pragma unroll
          for (int i = 0; i < size; ++i) {
            const F scale = P::mul(c.noise, exponential<P>(P::fma(c.log_scale_slope, value[i], c.log_scale)));
            y[i] = P::fma(scale, F(eps[i]), y[i]);
          }
        } else if (c.adds_noise) {
#pragma unroll
          for (int i = 0; i < size; ++i) y[i] = P::fma(c.noise, F(eps[i]), y[i]);
        }
        if (tensors.known != nullptr) {
          F there[size];
          known.get(there);
          mask.get(value);
#pragma unroll
          for (int i = 0; i < size; ++i) there[i] = P::mul(c.known, there[i]);
          if (c.noises_known) {
#pragma unroll
            for (int i = 0; i < size; ++i) there[i] = P::fma(c.known_noise, F(eps[i]), there[i]);
          }
#pragma unroll
          for (int i = 0; i < size; ++i) {
            y[i] = P::fma(value[i], there[i], P::mul(P::sub(P::set(1.0f), value[i]), y[i]));
          }
        }
        item.store(static_cast<T*>(tensors.y), y);
      },
      [](std::int64_t) {});
}

Error diffusion_step(const DiffusionStep& args, Stream stream) {
  const NoiseShape& shape = args.shape;
  if (shape.draws != 1 || !is_acceptable(shape, args.key) || !is_acceptable(args.table, shape.samples)) {
    return cudaErrorInvalidValue;
  }
  if (shape.samples == 0 || shape.elements == 0) return cudaSuccess;
  const bool needless = args.output == nullptr && (args.second != nullptr || args.prediction != nullptr);
  if (args.x == nullptr || args.y == nullptr || needless || (args.known == nullptr) != (args.mask == nullptr)) {
    return cudaErrorInvalidValue;
  }
  const bool learned = args.learned && args.output != nullptr, second_learned = args.second_learned && args.second;
  const StepTensors tensors{args.x,    args.output, args.second,     args.history0, args.history1, args.known,
                            args.mask, args.y,      args.prediction, learned,       second_learned};
  return with_row_variant(
      args.dtype, shape, args.key.on_device || args.table.on_device,
      [&](auto* type, auto channels_last, auto from_device) {
        using T = std::remove_pointer_t<decltype(type)>;
        using F = typename Arithmetic<T>::F;
        const Work work = with_halves<T>(
            make_work<T, channels_last>(shape, {args.x, args.output, args.second, args.history0, args.history1,
                                                args.known, args.mask, args.y, args.prediction}),
            learned || second_learned);
        StepCoefficients<F, from_device> coefficients = [&] {
          const Table<DiffusionStep::columns> table(args.table);
          if constexpr (from_device) {
            return table;
          } else {
            StepRow<F> row;
            row.set(table.only, learned, args.known != nullptr);
            return row;
          }
        }();
        return launch(diffusion_step_kernel<T, channels_last, from_device>, work.grid(), block_threads, 0, stream,
                      tensors, coefficients, work, noise_words(args.key));
      });
}

}  // namespace gencore::cuda
