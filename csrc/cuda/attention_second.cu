// Attention's derivatives beyond the gradient, of calls with options and without.
#include "attention_second.cuh"

namespace gencore::cuda {
namespace {

// Calls body(type, sees). Everyday calls have kernels of their own where they are to be fast: Triton has faster ones
// for half types.
template <class Args, class Body>
cudaError_t with_type_and_sees(const Args& args, Body&& body) {
  return with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float>) {
      if (is_plain(args.shape, args.options)) return body(type, EveryKey{});
    }
    return body(type, some_keys<typename Arithmetic<T>::F>(completed(args.shape), args.options));
  });
}

template <class Args>
bool has_tensors(const Args& args) {
  const AttentionShape& shape = args.shape;
  return !is_missing(args.q, shape.queries) && !is_missing(args.k, shape.keys) && !is_missing(args.v, shape.keys) &&
         !is_missing(args.out, shape.queries) && (args.lse != nullptr || shape.queries == 0);
}

std::int64_t of_all_queries(const AttentionShape& shape) { return shape.batch * shape.heads * shape.queries; }

}  // namespace

std::int64_t attention_jvp_workspace(DType, const AttentionShape&) { return 0; }

Error attention_jvp(const AttentionJvp& args, void*, Stream stream) {
  if (!is_acceptable(args.shape, args.options)) return cudaErrorInvalidValue;
  if (of_all_queries(args.shape) == 0) return cudaSuccess;
  if (!has_tensors(args) || args.d_out.data == nullptr || args.d_lse == nullptr) return cudaErrorInvalidValue;
  return with_type_and_sees(args, [&](auto* type, const auto& sees) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = typename Arithmetic<T>::F;
    const QueryMoments<F> of_queries{static_cast<const F*>(args.lse), static_cast<F*>(args.d_lse), nullptr, nullptr};
    return attention_tangent<T>(args, {}, args.d_out, of_queries, sees, stream);
  });
}

// Of every query the change of lse, and two sums over its keys.
std::int64_t attention_double_backward_workspace(DType dtype, const AttentionShape& shape) {
  const std::int64_t element = dtype == DType::float64 ? sizeof(double) : sizeof(float);
  return is_valid(shape) ? 3 * of_all_queries(shape) * element : 0;
}

Error attention_double_backward(const AttentionDoubleBackward& args, void* workspace, Stream stream) {
  const AttentionShape& shape = args.shape;
  if (!is_acceptable(shape, args.options)) return cudaErrorInvalidValue;
  const bool further = args.grad_q.data != nullptr || args.grad_k.data != nullptr || args.grad_v.data != nullptr;
  if (!further && args.grad_grad_out.data == nullptr) return cudaSuccess;
  if (shape.batch * shape.heads * (shape.queries + shape.keys) == 0) return cudaSuccess;
  if (!has_tensors(args) || is_missing(args.grad_out, shape.queries) || (shape.queries > 0 && workspace == nullptr)) {
    return cudaErrorInvalidValue;
  }
  return with_type_and_sees(args, [&](auto* type, const auto& sees) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = typename Arithmetic<T>::F;
    const std::int64_t queries = of_all_queries(shape);
    F* const values = static_cast<F*>(workspace);
    const QueryMoments<F> of_queries{static_cast<const F*>(args.lse), values, values + queries, values + 2 * queries};
    cudaError_t error = cudaSuccess;
    if (queries > 0) error = attention_tangent<T>(args, args.grad_out, args.grad_grad_out, of_queries, sees, stream);
    if (error != cudaSuccess || !further) return error;
    return attention_second<T>(args, of_queries, sees, stream);
  });
}

}  // namespace gencore::cuda
