#include "gencore/group_norm.h"
#include "group_norm_backward.cuh"
#include "group_norm_forward.cuh"
#include "group_norm_launch.cuh"

namespace gencore::cuda {
namespace {

// Where a group's values take several blocks to read, one may still keep them, if there are groups for all of a GPU.
// The results are the same bits.
constexpr std::int64_t enough_blocks = 128;

// Whether one block, with `bytes` of shared memory, takes all slices of a tile.
bool takes_whole(const GroupNormWork& work, bool channels_last, std::uintptr_t bytes, std::uintptr_t most_bytes) {
  if (work.tiles_per_group > 1) return false;
  if (work.slices == 1 && bytes <= usual_shared_bytes) return true;
  return !channels_last && work.tiles >= enough_blocks && work.slices <= rows_at_once && bytes <= most_bytes;
}

// The threads of a block that takes a whole tile: a team for each strand, if there are not too many.
template <bool channels_last>
int threads_of_whole(const GroupNormWork& work) {
  if (channels_last) return block_threads;
  const std::int64_t wanted = work.slices * work.tile_channels * work.strands << work.team_log2;
  return wanted > block_threads ? whole_threads : block_threads;
}

template <class F, class Base>
BackwardSpace<F> backward_space(Arrays<Base>& arrays, const GroupNormWork& work) {
  BackwardSpace<F> space{};
  const std::int64_t channels = work.rows * work.channels;
  arrays.place(space.parts, work.rows * work.groups * work.parts());
  arrays.place(space.of_samples, 2 * channels);
  arrays.place(space.sums, channel_sums * work.slices * channels);
  return space;
}

template <class T>
std::uintptr_t forward_bytes(const GroupNormWork& work, GroupNormPhase phase, bool keep) {
  Arrays<std::nullptr_t> arrays{nullptr};
  forward_shared<T>(arrays, work, phase, keep);
  return arrays.bytes;
}

template <class T>
std::uintptr_t backward_bytes(const GroupNormWork& work, GroupNormPhase phase, bool keep) {
  Arrays<std::nullptr_t> arrays{nullptr};
  backward_shared<T>(arrays, work, phase, keep);
  return arrays.bytes;
}

// As little as every device has, so that the workspace depends on none.
template <class T, bool channels_last>
bool forward_takes_whole(const GroupNormWork& work) {
  return takes_whole(work, channels_last, forward_bytes<T>(work, GroupNormPhase::whole, !channels_last),
                     common_shared_bytes);
}

template <class T, int width, bool channels_last>
cudaError_t forward(const GroupNorm& args, void* workspace, cudaStream_t stream) {
  const auto work = make_group_norm_work<T, width, channels_last>(args.shape);
  if (forward_takes_whole<T, channels_last>(work)) {
    return launch_blocks(group_norm_whole_kernel<T, width, channels_last>, work.rows * work.tiles,
                         threads_of_whole<channels_last>(work),
                         forward_bytes<T>(work, GroupNormPhase::whole, !channels_last), stream, args, work);
  }
  if (workspace == nullptr) return cudaErrorInvalidValue;
  auto* const parts = static_cast<GroupNormMoments*>(workspace);
  const cudaError_t error =
      launch_blocks(group_norm_gather_kernel<T, width, channels_last>, work.blocks(), block_threads,
                    forward_bytes<T>(work, GroupNormPhase::gather, false), stream, args, work, parts);
  if (error != cudaSuccess) return error;
  return launch_blocks(group_norm_scatter_kernel<T, width, channels_last>, work.blocks(), block_threads,
                       forward_bytes<T>(work, GroupNormPhase::scatter, false), stream, args, work, parts);
}

template <class T, int width, bool channels_last>
cudaError_t backward(const GroupNormBackward& args, void* workspace, cudaStream_t stream) {
  using F = typename Arithmetic<T>::F;
  const auto work = make_group_norm_work<T, width, channels_last>(args.shape);
  const bool over_samples = args.grad_weight != nullptr || args.grad_bias != nullptr;
  const bool with_values =
      over_samples || args.grad_scale != nullptr || args.grad_shift != nullptr || args.grad_bias_in != nullptr;
  if (!with_values && args.grad_x == nullptr) return cudaSuccess;
  if (workspace == nullptr) return cudaErrorInvalidValue;
  Arrays<> arrays{static_cast<unsigned char*>(workspace)};
  const BackwardSpace<F> space = backward_space<F>(arrays, work);

  const std::uintptr_t whole_bytes = backward_bytes<T>(work, GroupNormPhase::whole, !channels_last);
  cudaError_t error;
  if (takes_whole(work, channels_last, whole_bytes, most_shared_bytes())) {
    error = launch_blocks(group_norm_backward_whole_kernel<T, width, channels_last>, work.rows * work.tiles,
                          threads_of_whole<channels_last>(work), whole_bytes, stream, args, work, space.of_samples,
                          with_values);
  } else {
    error =
        launch_blocks(group_norm_backward_gather_kernel<T, width, channels_last>, work.blocks(), block_threads,
                      backward_bytes<T>(work, GroupNormPhase::gather, false), stream, args, work, space, with_values);
    if (error == cudaSuccess && args.grad_x != nullptr) {
      error = launch_blocks(group_norm_backward_scatter_kernel<T, width, channels_last>, work.blocks(), block_threads,
                            backward_bytes<T>(work, GroupNormPhase::scatter, false), stream, args, work,
                            static_cast<const GroupSums*>(space.parts));
    }
    if (error == cudaSuccess && with_values) {
      error = launch_blocks(group_norm_channels_kernel<T>,
                            (work.rows * work.channels + columns_at_once - 1) / columns_at_once, block_threads, 0,
                            stream, args, work, space);
    }
  }
  if (error != cudaSuccess || !over_samples) return error;
  return launch_samples<T>(args, space.of_samples, stream);
}

}  // namespace

std::int64_t group_norm_workspace(DType dtype, const GroupNormShape& shape) {
  return most_bytes(dtype, shape, [&](auto* type, auto width, auto channels_last) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto work = make_group_norm_work<T, width, channels_last>(shape);
    if (forward_takes_whole<T, channels_last>(work)) return std::int64_t{0};
    return work.rows * work.groups * work.parts() * static_cast<std::int64_t>(sizeof(GroupNormMoments));
  });
}

Error group_norm(const GroupNorm& args, void* workspace, Stream stream) {
  const GroupNormShape& shape = args.shape;
  if (!is_valid(shape) || !has_valid_values(args)) return cudaErrorInvalidValue;
  if (is_empty(shape)) return cudaSuccess;
  if (args.x == nullptr || args.y == nullptr) return cudaErrorInvalidValue;
  return with_layout(args.dtype, shape, are_aligned({args.x, args.y}), [&](auto* type, auto width, auto channels_last) {
    return forward<std::remove_pointer_t<decltype(type)>, width, channels_last>(args, workspace, stream);
  });
}

std::int64_t group_norm_backward_workspace(DType dtype, const GroupNormShape& shape) {
  return most_bytes(dtype, shape, [&](auto* type, auto width, auto channels_last) {
    using T = std::remove_pointer_t<decltype(type)>;
    Arrays<std::nullptr_t> arrays{nullptr};
    backward_space<typename Arithmetic<T>::F>(arrays, make_group_norm_work<T, width, channels_last>(shape));
    return arrays.bytes;
  });
}

Error group_norm_backward(const GroupNormBackward& args, void* workspace, Stream stream) {
  const GroupNormShape& shape = args.shape;
  if (!is_valid(shape) || !has_valid_values(args)) return cudaErrorInvalidValue;
  if (is_empty(shape)) return set_values_zero(args, stream);
  if (args.grad_y == nullptr || args.x == nullptr || args.statistics == nullptr) return cudaErrorInvalidValue;
  return with_layout(args.dtype, shape, are_aligned({args.grad_y, args.x, args.grad_x}),
                     [&](auto* type, auto width, auto channels_last) {
                       return backward<std::remove_pointer_t<decltype(type)>, width, channels_last>(args, workspace,
                                                                                                    stream);
                     });
}

}  // namespace gencore::cuda
