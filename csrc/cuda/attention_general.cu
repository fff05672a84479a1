// Attention with masks, causal order, lengths, shared heads, values of another size, dropout.
#include "attention_simt.cuh"

namespace gencore::cuda {

template <class T>
cudaError_t attention_general(const Attention& args, cudaStream_t stream) {
  return attention_simt<T>(args, some_keys<typename Arithmetic<T>::F>(completed(args.shape), args.options), stream);
}

template <class T>
cudaError_t attention_general_backward(const AttentionBackward& args,
                                       const QueryValues<typename Arithmetic<T>::F>& of_queries, cudaStream_t stream) {
  return attention_simt_backward<T>(args, of_queries,
                                    some_keys<typename Arithmetic<T>::F>(completed(args.shape), args.options), stream);
}

template cudaError_t attention_general<float>(const Attention&, cudaStream_t);
template cudaError_t attention_general<double>(const Attention&, cudaStream_t);
template cudaError_t attention_general<bfloat16>(const Attention&, cudaStream_t);
template cudaError_t attention_general<float16>(const Attention&, cudaStream_t);
template cudaError_t attention_general_backward<float>(const AttentionBackward&, const QueryValues<float>&,
                                                       cudaStream_t);
template cudaError_t attention_general_backward<double>(const AttentionBackward&, const QueryValues<double>&,
                                                        cudaStream_t);
template cudaError_t attention_general_backward<bfloat16>(const AttentionBackward&, const QueryValues<float>&,
                                                          cudaStream_t);
template cudaError_t attention_general_backward<float16>(const AttentionBackward&, const QueryValues<float>&,
                                                         cudaStream_t);

}  // namespace gencore::cuda
