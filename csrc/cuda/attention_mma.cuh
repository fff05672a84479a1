// How the kernels with the tensor cores are launched; the files of the half types make them.
#pragma once

#include "attention_mma_backward.cuh"

namespace gencore::cuda {

// Calls body(std::integral_constant<int, channels>{}) with the channels that kernels are made for: as few above those
// of a head as there are. What is beyond these is zero in shared memory and not there in the memory of the GPU.
template <class Body>
cudaError_t with_channels(std::int64_t size, Body&& body) {
  if (size <= 32) return body(std::integral_constant<int, 32>{});
  if (size <= 48) return body(std::integral_constant<int, 48>{});
  if (size <= 64) return body(std::integral_constant<int, 64>{});
  if (size <= 80) return body(std::integral_constant<int, 80>{});
  if (size <= 96) return body(std::integral_constant<int, 96>{});
  if (size <= 128) return body(std::integral_constant<int, 128>{});
  if (size <= 160) return body(std::integral_constant<int, 160>{});
  if (size <= 256) return body(std::integral_constant<int, 256>{});
  if (size <= most_mma_channels) return body(std::integral_constant<int, most_mma_channels>{});
  return cudaErrorInvalidValue;
}

// The tiles, by what a thread can hold in its 255 registers: sums of blocks x part / 2 words, or twice that for two
// gradients; dot products of blocks x streamed / 2 words, or twice that with their gradients.
template <int channels>
using ForwardTiles = MmaTiles<channels, channels <= 128 ? 2 : 1, channels <= 256 ? 1 : 2,
                              channels <= 96 || channels == 160 ? 64 : 32, channels <= 64>;
template <int channels>
using QueriesTiles =
    MmaTiles<channels, channels <= 80 ? 2 : 1, channels <= 256 ? 1 : 2, channels <= 256 ? 32 : 16, channels <= 48>;
template <int channels>
using KeysTiles = MmaTiles<channels, channels <= 64 ? 2 : 1, channels <= 160 ? 1 : channels / 128,
                           channels <= 256 ? 32 : 16, channels <= 32>;

// What a launch takes of a plane.
struct MmaPlan {
  // The tokens that blocks have as their own; how many tensors of them, and how many sums for add_splits.
  std::int64_t own_tokens;
  int own_tensors, exchanges;
  // Floats that come with each token of a tile.
  int values;
  // Whether one of the tensors is in columns.
  bool columns;
};

// Launches a kernel. Of blocks there are to be enough for all multiprocessors, even if each has fewer warps to share
// its tiles with; what is computed for a token, and in which order, is the same. Says cudaErrorNotSupported, and
// launches nothing, where a block has too little shared memory.
template <class Tiles, class Arguments>
cudaError_t launch_tiles(void (*kernel)(Arguments), Arguments args, const AttentionShape& shape, const MmaPlan& plan,
                         cudaStream_t stream) {
  const std::int64_t planes = shape.batch * shape.heads;
  const int most_bytes = static_cast<int>(most_shared_bytes());
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, 1);
  const int streamed = tile_elements(Tiles::streamed, Tiles::channels, plan.columns);
  const auto own_of = [&](int groups) {
    return tile_elements(Tiles::own_tokens(groups), Tiles::channels, plan.columns);
  };
  const auto bytes_of = [&](int groups, int stages) {
    return (plan.own_tensors * own_of(groups) + stages * 2 * streamed) * 2 +
           plan.exchanges * Tiles::exchanged(groups) * 16 + stages * plan.values * Tiles::streamed * 4;
  };
  const auto tiles_of = [&](int groups) {
    return (plan.own_tokens + Tiles::own_tokens(groups) - 1) / Tiles::own_tokens(groups);
  };
  int groups = Tiles::most_groups;
  while (groups > 1 && (bytes_of(groups, 1) > most_bytes || planes * tiles_of(groups) < multiprocessors)) groups /= 2;
  if (bytes_of(groups, 1) > most_bytes) return cudaErrorNotSupported;
  args.work.heads = shape.heads;
  args.work.planes = planes;
  args.work.tiles = static_cast<int>(tiles_of(groups));
  args.work.size = static_cast<int>(shape.size);
  args.work.own = own_of(groups);
  args.work.streamed = streamed;
  args.work.stages = bytes_of(groups, 2) <= most_bytes ? 2 : 1;
  const int bytes = bytes_of(groups, args.work.stages);
  return launch(kernel, blocks_of(planes * args.work.tiles), groups * Tiles::splits * warp_threads,
                static_cast<std::size_t>(bytes), stream, args);
}

template <class T>
cudaError_t attention_mma(const Attention& args, cudaStream_t stream) {
  const AttentionShape& shape = args.shape;
  MmaForward<T> given{};
  if (!make_heads(args.q, shape, shape.queries, given.q) || !make_heads(args.k, shape, shape.keys, given.k) ||
      !make_heads(args.v, shape, shape.keys, given.v) || !make_heads(args.out, shape, shape.queries, given.out)) {
    return cudaErrorInvalidValue;
  }
  given.lse = static_cast<float*>(args.lse);
  given.queries = shape.queries;
  given.keys = shape.keys;
  given.scale = std::max(static_cast<float>(std::abs(args.scale) * log2_of_e), std::numeric_limits<float>::min());
  given.negative = args.scale < 0;
  const bool columns = given.q.columns || given.k.columns || given.v.columns || given.out.columns;
  return with_channels(shape.size, [&](auto channels) {
    using Tiles = ForwardTiles<channels>;
    const MmaPlan plan{shape.queries, 1, 1, 0, columns};
    const cudaError_t error = launch_tiles<Tiles>(attention_mma_kernel<T, Tiles>, given, shape, plan, stream);
    if constexpr (channels == most_mma_channels) {
      if (error == cudaErrorNotSupported) {
        using Fewer = MmaTiles<channels, Tiles::blocks, Tiles::splits, Tiles::streamed / 2, Tiles::kept>;
        return launch_tiles<Fewer>(attention_mma_kernel<T, Fewer>, given, shape, plan, stream);
      }
    }
    return error;
  });
}

template <class T>
cudaError_t attention_mma_backward(const AttentionBackward& args, const QueryValues<float>& of_queries,
                                   cudaStream_t stream) {
  const AttentionShape& shape = args.shape;
  MmaBackward<T> given{};
  const auto wanted = [&](const HeadsTensor& tensor, std::int64_t tokens, Heads<T>& heads) {
    return tensor.data == nullptr || make_heads(tensor, shape, tokens, heads);
  };
  if (!make_heads(args.grad_out, shape, shape.queries, given.grad_out) ||
      !make_heads(args.q, shape, shape.queries, given.q) || !make_heads(args.k, shape, shape.keys, given.k) ||
      !make_heads(args.v, shape, shape.keys, given.v) || !wanted(args.grad_q, shape.queries, given.grad_q) ||
      !wanted(args.grad_k, shape.keys, given.grad_k) || !wanted(args.grad_v, shape.keys, given.grad_v)) {
    return cudaErrorInvalidValue;
  }
  given.of_queries = of_queries;
  given.queries = shape.queries;
  given.keys = shape.keys;
  given.scale = static_cast<float>(args.scale);
  given.exponent_scale = static_cast<float>(args.scale * log2_of_e);
  const bool columns = given.grad_out.columns || given.q.columns || given.k.columns || given.v.columns ||
                       given.grad_q.columns || given.grad_k.columns || given.grad_v.columns;
  return with_channels(shape.size, [&](auto channels) {
    cudaError_t error = cudaSuccess;
    if (given.grad_q.data != nullptr && shape.queries > 0) {
      using Tiles = QueriesTiles<channels>;
      const MmaPlan plan{shape.queries, 2, 2, 0, columns};
      error = launch_tiles<Tiles>(attention_mma_queries_kernel<T, Tiles>, given, shape, plan, stream);
    }
    if (error == cudaSuccess && (given.grad_k.data != nullptr || given.grad_v.data != nullptr) && shape.keys > 0) {
      using Tiles = KeysTiles<channels>;
      const MmaPlan plan{shape.keys, 2, 2, 2, columns};
      error = launch_tiles<Tiles>(attention_mma_keys_kernel<T, Tiles>, given, shape, plan, stream);
    }
    return error;
  });
}

}  // namespace gencore::cuda
