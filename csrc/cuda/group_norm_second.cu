#include "gencore/group_norm.h"
#include "group_norm_launch.cuh"
#include "group_norm_second.cuh"

namespace gencore::cuda {
namespace {

template <class F, class Base>
SecondSpace<F> second_space(Arrays<Base>& arrays, const GroupNormWork& work, int terms) {
  SecondSpace<F> space{};
  const std::int64_t channels = work.rows * work.channels;
  arrays.place(space.sums, channels * work.slices * terms);
  arrays.place(space.totals, channels * terms);
  arrays.place(space.coefficients, channels * all_coefficients);
  arrays.place(space.of_samples, terms > direction_terms ? 2 * channels : 0);
  return space;
}

std::int64_t second_workspace(DType dtype, const GroupNormShape& shape, int terms) {
  return most_bytes(dtype, shape, [&](auto* type, auto width, auto channels_last) {
    using T = std::remove_pointer_t<decltype(type)>;
    Arrays<std::nullptr_t> arrays{nullptr};
    second_space<typename Arithmetic<T>::F>(arrays, make_group_norm_work<T, width, channels_last>(shape), terms);
    return arrays.bytes;
  });
}

template <class T, int width, bool channels_last, int terms>
cudaError_t along(const GroupNormDoubleBackward& args, void* workspace, cudaStream_t stream) {
  using F = typename Arithmetic<T>::F;
  constexpr bool second = terms > direction_terms;
  const auto work = make_group_norm_work<T, width, channels_last>(args.shape);
  Arrays<> arrays{static_cast<unsigned char*>(workspace)};
  const SecondSpace<F> space = second_space<F>(arrays, work, terms);
  Arrays<std::nullptr_t> shared{nullptr};
  SecondShared<F> unplaced;
  place<channels_last, terms>(shared, work, unplaced);
  cudaError_t error = launch_blocks(group_norm_second_gather_kernel<T, width, channels_last, terms>, work.blocks(),
                                    block_threads, shared.bytes, stream, args, work, space);
  if (error == cudaSuccess) {
    error = launch_blocks(group_norm_second_merge_kernel<T, terms>, work.rows * work.groups, block_threads, 0, stream,
                          args, work, space);
  }
  if (error == cudaSuccess && (args.grad_grad_y != nullptr || args.grad_x != nullptr)) {
    error = launch_blocks(group_norm_second_scatter_kernel<T, width, channels_last, second>, work.blocks(),
                          block_threads, 0, stream, args, work, static_cast<const F*>(space.coefficients));
  }
  if (error != cudaSuccess || (args.grad_weight == nullptr && args.grad_bias == nullptr)) return error;
  return launch_samples<T>(args, space.of_samples, stream);
}

// With `second` all of the results, else that of grad_y alone.
cudaError_t along(const GroupNormDoubleBackward& args, bool second, void* workspace, cudaStream_t stream) {
  if (workspace == nullptr) return cudaErrorInvalidValue;
  const bool aligned = are_aligned({args.x, args.direction.x, args.grad_y, args.grad_grad_y, args.grad_x});
  return with_layout(args.dtype, args.shape, aligned, [&](auto* type, auto width, auto channels_last) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!second) return along<T, width, channels_last, direction_terms>(args, workspace, stream);
    if (args.activation == Activation::linear) {
      return along<T, width, channels_last, linear_terms>(args, workspace, stream);
    }
    return along<T, width, channels_last, all_terms>(args, workspace, stream);
  });
}

}  // namespace

std::int64_t group_norm_jvp_workspace(DType dtype, const GroupNormShape& shape) {
  return second_workspace(dtype, shape, direction_terms);
}

Error group_norm_jvp(const GroupNormJvp& args, void* workspace, Stream stream) {
  if (!is_valid(args.shape) || !has_valid_changes(args)) return cudaErrorInvalidValue;
  if (is_empty(args.shape)) return cudaSuccess;
  if (args.x == nullptr || args.d_y == nullptr || args.statistics == nullptr) return cudaErrorInvalidValue;
  GroupNormDoubleBackward all{};
  all.x = args.x;
  all.grad_grad_y = args.d_y;
  all.statistics = args.statistics;
  all.dtype = args.dtype;
  all.shape = args.shape;
  all.activation = args.activation;
  all.weight = args.weight;
  all.bias = args.bias;
  all.scale = args.scale;
  all.shift = args.shift;
  all.bias_in = args.bias_in;
  all.direction = args.direction;
  return along(all, false, workspace, stream);
}

std::int64_t group_norm_double_backward_workspace(DType dtype, const GroupNormShape& shape) {
  return second_workspace(dtype, shape, all_terms);
}

Error group_norm_double_backward(const GroupNormDoubleBackward& args, void* workspace, Stream stream) {
  if (!is_valid(args.shape) || !has_valid_changes(args)) return cudaErrorInvalidValue;
  if (is_empty(args.shape)) return set_values_zero(args, stream);
  if (args.grad_y == nullptr || args.x == nullptr || args.statistics == nullptr) return cudaErrorInvalidValue;
  const bool second = args.grad_x != nullptr || args.grad_weight != nullptr || args.grad_bias != nullptr ||
                      args.grad_scale != nullptr || args.grad_shift != nullptr || args.grad_bias_in != nullptr;
  if (!second && args.grad_grad_y == nullptr) return cudaSuccess;
  return along(args, second, workspace, stream);
}

}  // namespace gencore::cuda
