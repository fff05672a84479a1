#include <type_traits>

#include "attention_simt.cuh"
#include "attention_tensors.cuh"
#include "gencore/attention.h"

namespace gencore::cuda {
namespace {

// Eight sums, added up as the threads of a team do it by shuffles.
template <class F>
__device__ __forceinline__ F sum_of_eight(const F (&x)[8]) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// The natural logarithm times `factor` and the delta of each query, and zeros behind a plane's last. Eight threads take
// a token and read its channels a vector each; where the tokens lie side by side one thread does what the eight do, and
// its neighbours take the tokens beside it. The bits are the same, and for any address.
template <class T, class F>
__global__ void __launch_bounds__(block_threads)
    attention_prepare_kernel(const __grid_constant__ Heads<const T> grad_out,
                             const __grid_constant__ Heads<const T> out, const F* lse, F* values, std::int64_t planes,
                             std::int64_t heads, std::int64_t queries, std::int64_t padded, int size, F factor) {
  using P = Arithmetic<T>;
  using V = Vector<T>;
  constexpr int team = 8;
  const int members = grad_out.columns ? 1 : team, tokens = warp_threads / members;
  const int lane = static_cast<int>(threadIdx.x) % warp_threads, member = lane % members;
  const bool vectors = grad_out.aligned && out.aligned && !grad_out.columns && !out.columns;
  const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * block_threads + threadIdx.x) / warp_threads;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * (block_threads / warp_threads) * tokens;
  for (std::int64_t first = warp * tokens; first < planes * padded; first += step) {
    const std::int64_t at = first + lane / members, number = at / padded, query = at - number * padded;
    F sum = 0;
    if (number < planes && query < queries) {
      const T* const a = grad_out.plane(number, heads) + query * grad_out.token_stride();
      const T* const b = out.plane(number, heads) + query * out.token_stride();
      // Adds what a member of a team finds in its vector that begins with channel c.
      const auto add = [&](F& part, int c) {
#pragma unroll 2
        for (int i = c; i < c + V::size; ++i) {
          if (i < size) {
            part = P::fma(to_arithmetic(a[i * grad_out.channel_stride()]), to_arithmetic(b[i * out.channel_stride()]),
                          part);
          }
        }
      };
      if (members == 1) {
        F parts[team] = {};
        for (int c = 0; c < size; c += team * V::size) {
#pragma unroll
          for (int i = 0; i < team; ++i) add(parts[i], c + i * V::size);
        }
        sum = sum_of_eight(parts);
      } else if (vectors) {
        for (int c = member * V::size; c < size; c += team * V::size) {
          F x[V::size], y[V::size];
          V::unpack(__ldg(reinterpret_cast<const typename V::Memory*>(a + c)), x);
          V::unpack(__ldg(reinterpret_cast<const typename V::Memory*>(b + c)), y);
#pragma unroll
          for (int i = 0; i < V::size; ++i) sum = P::fma(x[i], y[i], sum);
        }
      } else {
        for (int c = member * V::size; c < size; c += team * V::size) add(sum, c);
      }
    }
    for (int distance = members / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
    }
    if (number < planes && member == 0) {
      F* const row = values + 2 * number * padded + query;
      row[0] = query < queries ? lse[number * queries + query] * factor : F(0);
      row[padded] = sum;
    }
  }
}

}  // namespace

template <class T>
cudaError_t attention_prepare(const AttentionBackward& args, typename Arithmetic<T>::F* values, double factor,
                              cudaStream_t stream) {
  using F = typename Arithmetic<T>::F;
  const AttentionShape shape = completed(args.shape);
  if (shape.queries == 0) return cudaSuccess;
  const AttentionShape of_values = with_heads(shape, shape.heads, shape.value_size);
  Heads<const T> grad_out, out;
  if (!make_heads(args.grad_out, of_values, shape.queries, grad_out) ||
      !make_heads(args.out, of_values, shape.queries, out)) {
    return cudaErrorInvalidValue;
  }
  const std::int64_t planes = shape.batch * shape.heads, padded = padded_queries<F>(shape.queries);
  return launch(attention_prepare_kernel<T, F>, blocks_for(planes * padded * (grad_out.columns ? 1 : 8)), block_threads,
                0, stream, grad_out, out, static_cast<const F*>(args.lse), values, planes, shape.heads, shape.queries,
                padded, static_cast<int>(shape.value_size), static_cast<F>(factor));
}

std::int64_t attention_workspace(DType, const AttentionShape&) { return 0; }

Error attention(const Attention& args, void*, Stream stream) {
  const AttentionShape& shape = args.shape;
  if (!is_acceptable(shape, args.options)) return cudaErrorInvalidValue;
  if (shape.batch * shape.heads * shape.queries == 0) return cudaSuccess;
  if (is_missing(args.q, shape.queries) || is_missing(args.k, shape.keys) || is_missing(args.v, shape.keys) ||
      is_missing(args.out, shape.queries)) {
    return cudaErrorInvalidValue;
  }
  return with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!is_plain(shape, args.options)) return attention_general<T>(args, stream);
    if constexpr (is_half<T>) {
      if (shape.size <= most_mma_channels) {
        const cudaError_t error = attention_mma<T>(args, stream);
        if (error != cudaErrorNotSupported) return error;
      }
    }
    return attention_simt<T>(args, EveryKey{}, stream);
  });
}

std::int64_t attention_backward_workspace(DType dtype, const AttentionShape& shape) {
  if (!is_valid(shape)) return 0;
  const std::int64_t planes = shape.batch * shape.heads;
  if (dtype == DType::float64) return planes * 2 * padded_queries<double>(shape.queries) * std::int64_t{sizeof(double)};
  return planes * 2 * padded_queries<float>(shape.queries) * std::int64_t{sizeof(float)};
}

Error attention_backward(const AttentionBackward& args, void* workspace, Stream stream) {
  const AttentionShape& shape = args.shape;
  if (!is_acceptable(shape, args.options)) return cudaErrorInvalidValue;
  if (args.grad_q.data == nullptr && args.grad_k.data == nullptr && args.grad_v.data == nullptr) return cudaSuccess;
  const std::int64_t planes = shape.batch * shape.heads;
  if (planes * (shape.queries + shape.keys) == 0) return cudaSuccess;
  if (is_missing(args.grad_out, shape.queries) || is_missing(args.q, shape.queries) ||
      is_missing(args.out, shape.queries) || is_missing(args.k, shape.keys) || is_missing(args.v, shape.keys) ||
      (shape.queries > 0 && (args.lse == nullptr || workspace == nullptr))) {
    return cudaErrorInvalidValue;
  }
  return with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = typename Arithmetic<T>::F;
    auto* const values = static_cast<F*>(workspace);
    const QueryValues<F> of_queries{values, padded_queries<F>(shape.queries)};
    if (!is_plain(shape, args.options)) {
      const cudaError_t error = attention_prepare<T>(args, values, 1.0, stream);
      return error == cudaSuccess ? attention_general_backward<T>(args, of_queries, stream) : error;
    }
    if constexpr (is_half<T>) {
      if (shape.size <= most_mma_channels) {
        cudaError_t error = attention_prepare<T>(args, values, log2_of_e, stream);
        if (error == cudaSuccess) error = attention_mma_backward<T>(args, of_queries, stream);
        if (error != cudaErrorNotSupported) return error;
      }
    }
    const cudaError_t error = attention_prepare<T>(args, values, 1.0, stream);
    if (error != cudaSuccess) return error;
    return attention_simt_backward<T>(args, of_queries, EveryKey{}, stream);
  });
}

}  // namespace gencore::cuda
