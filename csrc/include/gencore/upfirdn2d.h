// Resampling with a filter: insert zeros, pad or crop, filter, keep every n-th pixel (Crochiere and Rabiner, "Multirate
// Digital Signal Processing", 1983; in generators Karras et al., "Analyzing and Improving the Image Quality of
// StyleGAN", 2020, and Zhang, "Making Convolutional Networks Shift-Invariant Again", 2019).
#pragma once

#include <initializer_list>

#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore {

// One of the two dimensions of an image. `size` pixels, each followed by up - 1 zeros, are preceded by `start` further
// zeros, or, where it is negative, lose as many; behind them are as many zeros as are asked for. Output o is made of
// the `taps` of these from o * down on.
struct ResampledAxis {
  std::int64_t size, out_size, taps, up, down, start;
};

// With w the filter, turned around in both dimensions unless `flip`, and x 0 wherever it has no pixel:
//   y[oy, ox] = gain sum_ky,kx w[ky, kx] x[(oy down_y + ky - start_y) / up_y, (ox down_x + kx - start_x) / up_x]
// where only those terms count whose divisions leave no rest. The sum goes along rows of w, one row after another.
// A separable filter has one row of taps for both dimensions, w[ky, kx] = w[ky] w[kx], and the sums over ky stand
// within that over kx.
//
// x and y: samples x channels x pixels, or, with channels_last, samples x pixels x channels. filter: dense, float64 for
// float64 tensors, else float32. y may not be x.
struct Upfirdn2d {
  const void* x;
  const void* filter;
  void* y;
  DType dtype;
  std::int64_t samples, channels;
  ResampledAxis rows, columns;
  bool channels_last, separable, flip;
  double gain;
};

// The taps that meet pixels, of one output: tap first_tap + i * up meets pixel first + i, for i from `begin` to `end`.
struct MetTaps {
  int first_tap, first, begin, end;
};

GENCORE_INLINE MetTaps met_taps(const ResampledAxis& axis, int output) {
  const int up = static_cast<int>(axis.up), taps = static_cast<int>(axis.taps), size = static_cast<int>(axis.size);
  const int at = output * static_cast<int>(axis.down) - static_cast<int>(axis.start);
  // The quotient is rounded up, also below 0.
  const int first = at >= 0 ? (at + up - 1) / up : -(-at / up);
  const int tap = first * up - at;
  const int count = tap < taps ? (taps - tap + up - 1) / up : 0;
  const int begin = first < 0 ? -first : 0;
  const int end = count < size - first ? count : size - first;
  return {tap, first, begin < end ? begin : 0, begin < end ? end : 0};
}

// Whether the sizes fit together: what is counted along an axis fits in 31 bits.
static inline bool is_valid(const ResampledAxis& axis) {
  constexpr std::int64_t most = std::int64_t{1} << 29;
  for (const std::int64_t count : {axis.size, axis.out_size, axis.taps, axis.up, axis.down}) {
    if (count < 1 || count >= most) return false;
  }
  return axis.start > -most && axis.start < most && axis.out_size * axis.down < 2 * most &&
         axis.size * axis.up < 2 * most;
}

static inline bool is_valid(const Upfirdn2d& args) {
  if (args.samples < 0 || args.channels < 0 || !is_valid(args.rows) || !is_valid(args.columns)) return false;
  if (args.separable && args.rows.taps != args.columns.taps) return false;
  std::int64_t planes, total;
  const std::int64_t pixels = args.rows.size * args.columns.size, made = args.rows.out_size * args.columns.out_size;
  if (__builtin_mul_overflow(args.samples, args.channels, &planes)) return false;
  return !__builtin_mul_overflow(planes, pixels > made ? pixels : made, &total);
}

}  // namespace gencore

namespace gencore::cpu {

// `threads` is at least 1; small tensors take fewer. The bits of the result do not depend on it.
Status upfirdn2d(const Upfirdn2d& args, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

Error upfirdn2d(const Upfirdn2d& args, Stream stream);

}  // namespace gencore::cuda
