// The tensors of attention as its kernels see them: planes, one for each sample and head, of tokens x channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gencore/attention.h"
#include "lane.cuh"
#include "launch.cuh"

namespace gencore::cuda {

// Elements of a half type that are copied at once, 16 bytes. Rows of shared memory are as much longer than they need
// be: eight rows that a warp reads together then lie in different banks.
constexpr int chunk_elements = 8;

// A plane has rows of elements side by side: the channels of a token or, in columns, the tokens of a channel.
template <class T>
struct Heads {
  T* data;
  // From a sample, a head, a row to the next.
  std::int64_t batch, head, row;
  bool columns;
  // Whether every row begins at a multiple of 16 bytes and has whole chunks of 16 bytes.
  bool aligned;

  __host__ __device__ std::int64_t token_stride() const { return columns ? 1 : row; }
  __host__ __device__ std::int64_t channel_stride() const { return columns ? row : 1; }

  __device__ __forceinline__ T* plane(std::int64_t number, std::int64_t heads) const {
    const std::int64_t sample = number / heads;
    return data + sample * batch + (number - sample * heads) * head;
  }
};

// The shape that some of the tensors have, of so many heads of that size.
inline AttentionShape with_heads(AttentionShape shape, std::int64_t heads, std::int64_t size) {
  shape.heads = heads;
  shape.size = size;
  return shape;
}

// Where neither the channels nor the tokens lie side by side, there is none. Strides of a dimension of one element say
// nothing.
template <class T>
bool make_heads(const HeadsTensor& tensor, const AttentionShape& shape, std::int64_t tokens, Heads<T>& heads) {
  const bool tokens_adjoin = tensor.token == 1 || tokens == 1, channels_adjoin = tensor.channel == 1 || shape.size == 1;
  if (!tokens_adjoin && !channels_adjoin) return false;
  heads.data = static_cast<T*>(tensor.data);
  heads.columns = tokens_adjoin && !(channels_adjoin && shape.size > 1);
  heads.batch = shape.batch > 1 ? tensor.batch : 0;
  heads.head = shape.heads > 1 ? tensor.head : 0;
  const std::int64_t rows = heads.columns ? shape.size : tokens, elements = heads.columns ? tokens : shape.size;
  heads.row = rows > 1 ? (heads.columns ? tensor.channel : tensor.token) : 0;
  constexpr std::int64_t vector = 16 / sizeof(T);
  heads.aligned = reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0 && heads.batch % vector == 0 &&
                  heads.head % vector == 0 && heads.row % vector == 0 && elements % vector == 0;
  return true;
}

template <class T>
constexpr bool is_half = sizeof(T) == 2;

// A value as it is after rounding to T, for types of which sums are in F.
template <class T, class F>
__device__ __forceinline__ F rounded_to(F x) {
  T y;
  from_arithmetic(x, y);
  return to_arithmetic(y);
}

constexpr double log2_of_e = 1.4426950408889634, log_of_2 = 0.69314718055994531;

// What the gradient needs of each query besides the tensors: a row of `queries` logarithms of denominators and one of
// `queries` deltas for each plane. Rows are filled up with zeros to whole vectors of 16 bytes.
template <class F>
struct QueryValues {
  const F* values;
  std::int64_t padded;

  __device__ __forceinline__ const F* log_sums(std::int64_t plane) const { return values + 2 * plane * padded; }
  __device__ __forceinline__ const F* deltas(std::int64_t plane) const { return log_sums(plane) + padded; }
};

template <class F>
constexpr std::int64_t padded_queries(std::int64_t queries) {
  constexpr std::int64_t vector = 16 / sizeof(F);
  return (queries + vector - 1) / vector * vector;
}

// Fills in those values, of which the logarithms are natural ones times `factor`.
template <class T>
cudaError_t attention_prepare(const AttentionBackward& args, typename Arithmetic<T>::F* values, double factor,
                              cudaStream_t stream);

// The kernels count the channels of a head and the tiles of tokens in 32 bits.
inline bool is_acceptable(const AttentionShape& shape, const AttentionOptions& options) {
  constexpr std::int64_t most_size = std::int64_t{1} << 30, most_tokens = std::int64_t{1} << 34;
  return is_valid(shape, options) && std::max(shape.size, shape.value_size) <= most_size &&
         std::max(shape.queries, shape.keys) <= most_tokens && (options.key.on_device || options.key.rows == 0);
}

inline bool is_missing(const HeadsTensor& tensor, std::int64_t tokens) { return tensor.data == nullptr && tokens > 0; }

// As many blocks as there are tasks; kernels stride over what the largest grid leaves.
inline dim3 blocks_of(std::int64_t tasks) {
  return dim3(static_cast<unsigned>(std::min<std::int64_t>(tasks, (std::int64_t{1} << 31) - 1)));
}

// The kernels for half types, of heads of at most this many channels. They say cudaErrorNotSupported where a block has
// too little shared memory for heads of that size.
constexpr std::int64_t most_mma_channels = 512;

template <class T>
cudaError_t attention_mma(const Attention& args, cudaStream_t stream);

template <class T>
cudaError_t attention_mma_backward(const AttentionBackward& args, const QueryValues<float>& of_queries,
                                   cudaStream_t stream);

// Calls with options, of all types.
template <class T>
cudaError_t attention_general(const Attention& args, cudaStream_t stream);

template <class T>
cudaError_t attention_general_backward(const AttentionBackward& args,
                                       const QueryValues<typename Arithmetic<T>::F>& of_queries, cudaStream_t stream);

}  // namespace gencore::cuda
