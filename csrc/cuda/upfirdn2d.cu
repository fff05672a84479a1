// A thread makes one access of 16 bytes of outputs, or one output where they do not lie so: pixels of a row, or, in
// channels_last, channels of a pixel. What its taps meet it reads where it lies, as do its neighbours, from the cache.
// Where up, down and the taps are the usual ones, these are constants, and what the pixels of a row share is read once.

#include "gencore/upfirdn2d.h"
#include "lane.cuh"
#include "launch.cuh"

namespace gencore::cuda {
namespace {

// Divides by multiplication with a reciprocal of 64 bits, whose error stays below 1 / by for numbers below 2^64 / by.
struct Divisor {
  std::uint64_t reciprocal;
  int by;

  explicit Divisor(std::int64_t by_) : reciprocal(~std::uint64_t{0} / by_ + 1), by(static_cast<int>(by_)) {}

  bool divides(std::int64_t most) const { return static_cast<std::uint64_t>(most) <= ~std::uint64_t{0} / by; }

  __device__ __forceinline__ void divide(std::int64_t a, std::int64_t& quotient, int& rest) const {
    // The reciprocal of 1 does not fit.
    quotient = by == 1 ? a : static_cast<std::int64_t>(__umul64hi(static_cast<std::uint64_t>(a), reciprocal));
    rest = static_cast<int>(a - quotient * by);
  }
};

// Lines are rows of y of all planes, or, in channels_last, all its pixels; neighbours are made by units of `width`.
struct UpfirdnWork {
  std::int64_t lines;
  Divisor out_rows, out_columns;
  int units;
  // The logarithm of the threads of a block that share a line.
  int across_log2;

  UpfirdnWork(const Upfirdn2d& args, bool channels_last, int width)
      : lines(args.samples * args.rows.out_size * (channels_last ? args.columns.out_size : args.channels)),
        out_rows(args.rows.out_size),
        out_columns(args.columns.out_size),
        across_log2(0) {
    const std::int64_t neighbours = channels_last ? args.channels : args.columns.out_size;
    units = static_cast<int>((neighbours + width - 1) / width);
    while (1 << across_log2 < warp_threads && 1 << across_log2 < units) ++across_log2;
  }

  bool is_valid() const { return out_rows.divides(lines) && out_columns.divides(lines); }

  dim3 grid() const {
    const std::int64_t rows = block_threads >> across_log2, across = std::int64_t{1} << across_log2;
    const unsigned x = blocks_for((lines + rows - 1) / rows * block_threads).x;
    return dim3(x, static_cast<unsigned>(std::min<std::int64_t>((units + across - 1) / across, 65535)));
  }
};

// Calls body(line, first neighbour) for what this thread makes.
template <int width, class Body>
__device__ __forceinline__ void for_each_unit(const UpfirdnWork& work, Body&& body) {
  const int across = 1 << work.across_log2, rows = block_threads >> work.across_log2;
  const int in_line = static_cast<int>(threadIdx.x) & (across - 1);
  std::int64_t line =
      static_cast<std::int64_t>(blockIdx.x) * rows + (static_cast<int>(threadIdx.x) >> work.across_log2);
  for (; line < work.lines; line += static_cast<std::int64_t>(gridDim.x) * rows) {
    for (int unit = static_cast<int>(blockIdx.y) * across + in_line; unit < work.units;
         unit += static_cast<int>(gridDim.y) * across) {
      body(line, unit * width);
    }
  }
}

// The weights that taps multiply with.
template <class F>
struct UpfirdnFilter {
  const F* data;
  int rows, columns;
  bool flip;

  __device__ __forceinline__ explicit UpfirdnFilter(const Upfirdn2d& args)
      : data(static_cast<const F*>(args.filter)),
        rows(static_cast<int>(args.rows.taps)),
        columns(static_cast<int>(args.columns.taps)),
        flip(args.flip) {}

  __device__ __forceinline__ F at(int ky, int kx) const {
    return __ldg(data +
                 (flip ? std::int64_t{ky} * columns + kx : std::int64_t{rows - 1 - ky} * columns + (columns - 1 - kx)));
  }
  // Of a separable one.
  __device__ __forceinline__ F at(int k) const { return __ldg(data + (flip ? k : columns - 1 - k)); }
};

// sums[c] = sum of w[ky, kx] read(iy, ix, c), for n values that are met by the same taps.
template <class P, int n, bool separable, class Read>
__device__ __forceinline__ void sum_up(const Upfirdn2d& args, const MetTaps& y, const MetTaps& x, Read&& read,
                                       typename P::F (&sums)[n]) {
  using F = typename P::F;
  const UpfirdnFilter<F> filter(args);
  const int up_y = static_cast<int>(args.rows.up), up_x = static_cast<int>(args.columns.up);
#pragma unroll
  for (int c = 0; c < n; ++c) sums[c] = 0;
  if constexpr (separable) {
    for (int j = x.begin; j < x.end; ++j) {
      F of_rows[n] = {};
      for (int i = y.begin; i < y.end; ++i) {
        F met[n];
        read(y.first + i, x.first + j, met);
        const F weight = filter.at(y.first_tap + i * up_y);
#pragma unroll
        for (int c = 0; c < n; ++c) of_rows[c] = P::fma(weight, met[c], of_rows[c]);
      }
      const F weight = filter.at(x.first_tap + j * up_x);
#pragma unroll
      for (int c = 0; c < n; ++c) sums[c] = P::fma(weight, of_rows[c], sums[c]);
    }
  } else {
    for (int i = y.begin; i < y.end; ++i) {
      for (int j = x.begin; j < x.end; ++j) {
        F met[n];
        read(y.first + i, x.first + j, met);
        const F weight = filter.at(y.first_tap + i * up_y, x.first_tap + j * up_x);
#pragma unroll
        for (int c = 0; c < n; ++c) sums[c] = P::fma(weight, met[c], sums[c]);
      }
    }
  }
}

template <class T, bool channels_last, bool separable, int width>
__global__ void __launch_bounds__(block_threads)
    upfirdn2d_kernel(const __grid_constant__ Upfirdn2d args, const __grid_constant__ UpfirdnWork work) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  const F gain = static_cast<F>(args.gain);
  for_each_unit<width>(work, [&](std::int64_t line, int neighbour) {
    std::int64_t row = line, plane;
    int ox = neighbour, oy;
    if constexpr (channels_last) work.out_columns.divide(line, row, ox);
    work.out_rows.divide(row, plane, oy);
    const std::int64_t step = channels_last ? args.channels : 1, pixels = args.rows.size * args.columns.size;
    const T* const x = static_cast<const T*>(args.x) + plane * pixels * step + (channels_last ? neighbour : 0);
    F sums[width];
    const auto read = [&](int iy, int ix, F(&met)[width]) {
      const T* const at = x + (iy * args.columns.size + ix) * step;
      if constexpr (width == 1) {
        met[0] = to_arithmetic(*at);
      } else {
        Vector<T>::unpack(__ldg(reinterpret_cast<const typename Vector<T>::Memory*>(at)), met);
      }
    };
    sum_up<P, width, separable>(args, met_taps(args.rows, oy), met_taps(args.columns, ox), read, sums);
#pragma unroll
    for (int c = 0; c < width; ++c) sums[c] = P::mul(gain, sums[c]);
    T* const y = static_cast<T*>(args.y) + line * (channels_last ? args.channels : args.columns.out_size) + neighbour;
    if constexpr (width == 1) {
      from_arithmetic(sums[0], *y);
    } else {
      ptx::store(reinterpret_cast<typename Vector<T>::Memory*>(y), Vector<T>::pack(sums));
    }
  });
}

// What is known of a usual axis, along which a thread makes `outputs`: tap first_tap of the first of them is the first
// that meets a pixel.
template <int up, int down, int taps, int first_tap, int outputs>
struct KnownAxis {
  // Pixels that they meet.
  static constexpr int span = ((outputs - 1) * down + taps - 1 - first_tap) / up + 1;

  static __device__ constexpr int tap_of(int output) { return ((first_tap - output * down) % up + up) % up; }
  // Of the pixel that a tap of an output meets, counted from the first.
  static __device__ constexpr int pixel_of(int output, int tap) { return (output * down + tap - first_tap) / up; }
};

// Contiguous rows of outputs, a multiple of what a thread makes; as many taps along both axes, a multiple of up.
template <class T, bool separable, int up, int down, int taps, int first_tap>
__global__ void __launch_bounds__(block_threads, 1)
    upfirdn2d_rows_kernel(const __grid_constant__ Upfirdn2d args, const __grid_constant__ UpfirdnWork work) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  using V = Vector<T>;
  constexpr int width = V::size, met_rows = taps / up;
  using Axis = KnownAxis<up, down, taps, first_tap, width>;
  const UpfirdnFilter<F> filter(args);
  const F gain = static_cast<F>(args.gain);
  const int height = static_cast<int>(args.rows.size), columns = static_cast<int>(args.columns.size);
  for_each_unit<width>(work, [&](std::int64_t line, int ox) {
    std::int64_t plane;
    int oy;
    work.out_rows.divide(line, plane, oy);
    const T* const x = static_cast<const T*>(args.x) + plane * args.rows.size * args.columns.size;
    const int at_y = oy * down - static_cast<int>(args.rows.start);
    const int first_y = at_y >= 0 ? (at_y + up - 1) / up : -(-at_y / up), tap_y = first_y * up - at_y;
    // A multiple of up.
    const int first_x = (ox * down - static_cast<int>(args.columns.start) + first_tap) / up;
    const bool whole = first_x >= 0 && first_x + Axis::span <= columns;
    F sums[width] = {}, of_rows[separable ? Axis::span : 1] = {};
#pragma unroll
    for (int i = 0; i < met_rows; ++i) {
      const int iy = first_y + i, ky = tap_y + i * up;
      F met[Axis::span] = {};
      if (iy >= 0 && iy < height) {
        const T* const row = x + static_cast<std::int64_t>(iy) * columns;
#pragma unroll
        for (int j = 0; j < Axis::span; ++j) {
          if (whole || (first_x + j >= 0 && first_x + j < columns)) met[j] = to_arithmetic(row[first_x + j]);
        }
      }
      if constexpr (separable) {
        const F weight = filter.at(ky);
#pragma unroll
        for (int j = 0; j < Axis::span; ++j) of_rows[j] = P::fma(weight, met[j], of_rows[j]);
      } else {
        F weights[taps];
#pragma unroll
        for (int k = 0; k < taps; ++k) weights[k] = filter.at(ky, k);
#pragma unroll
        for (int o = 0; o < width; ++o) {
#pragma unroll
          for (int k = Axis::tap_of(o); k < taps; k += up) {
            sums[o] = P::fma(weights[k], met[Axis::pixel_of(o, k)], sums[o]);
          }
        }
      }
    }
    if constexpr (separable) {
#pragma unroll
      for (int o = 0; o < width; ++o) {
#pragma unroll
        for (int k = Axis::tap_of(o); k < taps; k += up) {
          sums[o] = P::fma(filter.at(k), of_rows[Axis::pixel_of(o, k)], sums[o]);
        }
      }
    }
#pragma unroll
    for (int o = 0; o < width; ++o) sums[o] = P::mul(gain, sums[o]);
    ptx::store(reinterpret_cast<typename V::Memory*>(static_cast<T*>(args.y) + line * args.columns.out_size + ox),
               V::pack(sums));
  });
}

bool is_aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

template <class... Parameters>
cudaError_t launch_work(void (*kernel)(Parameters...), const UpfirdnWork& work, const Upfirdn2d& args,
                        cudaStream_t stream) {
  if (!work.is_valid()) return cudaErrorInvalidValue;
  return launch(kernel, work.grid(), block_threads, 0, stream, args, work);
}

template <class T, bool channels_last, bool separable, int width>
cudaError_t run(const Upfirdn2d& args, cudaStream_t stream) {
  return launch_work(upfirdn2d_kernel<T, channels_last, separable, width>, UpfirdnWork(args, channels_last, width),
                     args, stream);
}

template <class T, bool separable, int up, int down, int first_tap>
cudaError_t run_rows(const Upfirdn2d& args, cudaStream_t stream) {
  return launch_work(upfirdn2d_rows_kernel<T, separable, up, down, 4, first_tap>,
                     UpfirdnWork(args, false, Vector<T>::size), args, stream);
}

// The kernel for what is usual in generators: four taps, both axes alike.
template <class T, bool separable>
cudaError_t run_usual(const Upfirdn2d& args, cudaStream_t stream, bool& is_usual) {
  const ResampledAxis &a = args.rows, &b = args.columns;
  is_usual = a.taps == 4 && b.taps == 4 && a.up == b.up && a.down == b.down && a.up * a.down <= 2 &&
             b.out_size % Vector<T>::size == 0 && is_aligned(args.y);
  if (!is_usual) return cudaSuccess;
  if (a.down == 2) return run_rows<T, separable, 1, 2, 0>(args, stream);
  if (a.up == 1) return run_rows<T, separable, 1, 1, 0>(args, stream);
  return b.start % 2 == 0 ? run_rows<T, separable, 2, 1, 0>(args, stream)
                          : run_rows<T, separable, 2, 1, 1>(args, stream);
}

}  // namespace

Error upfirdn2d(const Upfirdn2d& args, Stream stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (args.samples == 0 || args.channels == 0) return cudaSuccess;
  if (args.x == nullptr || args.y == nullptr || args.filter == nullptr) return cudaErrorInvalidValue;
  return with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_constants(
        [&](auto channels_last, auto separable) {
          if constexpr (!std::is_same_v<T, double>) {
            if constexpr (channels_last) {
              if (args.channels % Vector<T>::size == 0 && is_aligned(args.x) && is_aligned(args.y)) {
                return run<T, true, separable, Vector<T>::size>(args, stream);
              }
            } else {
              bool is_usual;
              const cudaError_t error = run_usual<T, separable>(args, stream, is_usual);
              if (is_usual) return error;
            }
          }
          return run<T, channels_last, separable, 1>(args, stream);
        },
        args.channels_last, args.separable);
  });
}

}  // namespace gencore::cuda
