#include "attention_mma.cuh"

namespace gencore::cuda {

template cudaError_t attention_mma<bfloat16>(const Attention& args, cudaStream_t stream);
template cudaError_t attention_mma_backward<bfloat16>(const AttentionBackward& args,
                                                      const QueryValues<float>& of_queries, cudaStream_t stream);

}  // namespace gencore::cuda
