// Scaled dot-product attention (Vaswani et al., 2017), of images' pixels above all: heads of any size, in any layout.
#pragma once

#include "gencore/cuda.h"
#include "gencore/types.h"

namespace gencore {

// A tensor of batch x heads x tokens x channels of a head: element (b, h, t, c) is element
// b * batch + h * head + t * token + c * channel of data.
struct HeadsTensor {
  void* data;
  std::int64_t batch, head, token, channel;
};

// `queries` and `keys` are tokens; `size` is the channels of a head.
struct AttentionShape {
  std::int64_t batch, heads, queries, keys, size;
  // Heads of k and v, each for heads / key_heads neighbouring ones of q; channels of a value. 0: `heads`, `size`.
  std::int64_t key_heads = 0, value_size = 0;
};

// What is added to a logit hides a key, as minus infinity does, from here down: of such a logit float32 keeps no digit.
constexpr double least_bias = -67108864.0;

// Which queries see which keys, and which probabilities are dropped. A query that sees no key has the results 0 and
// minus infinity, and no gradient.
struct AttentionOptions {
  // For all batch x heads x queries x keys, by strides that may be 0; null: every query sees every key. Bytes, 0 where
  // a query does not see a key, or values of `mask_dtype` that are added to the logits.
  HeadsTensor mask{};
  bool mask_is_boolean = false;
  DType mask_dtype = DType::float32;
  // The keys that each sample has, more than there are count as all; null: all. The others are not read.
  const std::int64_t* key_lengths = nullptr;
  // Whether query i sees the keys up to i alone.
  bool causal = false;
  // p_ij of sample b and head h is replaced by 0 where the uniform noise of sample b, element (h queries + i) keys + j,
  // is below `dropout`, and by p_ij / (1 - dropout) elsewhere: lse stays.
  double dropout = 0;
  NoiseKey key{};
};

// Per sample and head, with s_ij = scale * sum_c q_ic k_jc:
//   lse_i = log(sum_j exp(s_ij))      p_ij = exp(s_ij - lse_i)      out_ic = sum_j p_ij v_jc
// Without a key, out is 0 and lse minus infinity. `lse` is dense, batch x heads x queries, of float32 (float64 for
// float64), and may be null. With `base`, which is as dense, the logarithm is kept as base_i + lse_i, base_i the
// largest logit: of a large one, as masks make them, a single number would lose the digits of the sum. The derivatives
// take both, or the one that was kept. Nothing of the size queries x keys is allocated. out may not overlap the others.
// The options change s and p, here and below, as AttentionOptions says; gradients of p are those of what replaces it.
struct Attention {
  HeadsTensor q, k, v, out;
  void* lse;
  DType dtype;
  AttentionShape shape;
  double scale;
  AttentionOptions options{};
  void* base = nullptr;
};

// The gradients, from `out` and `lse` of the forward pass. With delta_i = sum_c grad_out_ic out_ic:
//   ds_ij = p_ij (sum_c grad_out_ic v_jc - delta_i)
//   grad_q_ic = scale sum_j ds_ij k_jc    grad_k_jc = scale sum_i ds_ij q_ic    grad_v_jc = sum_i p_ij grad_out_ic
// The gradient of an added mask is ds, summed over what the mask is the same for. Each may be null: it is then not
// wanted.
struct AttentionBackward {
  HeadsTensor grad_out, q, k, v, out;
  const void* lse;
  HeadsTensor grad_q, grad_k, grad_v;
  DType dtype;
  AttentionShape shape;
  double scale;
  AttentionOptions options{};
  const void* base = nullptr;
  // On the CPU alone. Of the type of lse and dense, with strides of 0 along what it is summed over, and 0 before the
  // call. Summed over keys it is 0 and left as it is: what all logits of a query change by alike changes no result.
  HeadsTensor grad_mask{};
};

// The derivative along dq, dk, dv, each of which may be null: it is then 0. With the change of the logits
// t_ij = scale sum_c (dq_ic k_jc + q_ic dk_jc), and p, `out` and `lse` of the forward pass:
//   d_lse_i = sum_j p_ij t_ij    d_out_ic = sum_j p_ij (t_ij v_jc + dv_jc) - d_lse_i out_ic
// `d_lse`, dense as `lse`, may be null.
struct AttentionJvp {
  HeadsTensor q, k, v, out;
  const void* lse;
  HeadsTensor dq, dk, dv;
  HeadsTensor d_out;
  void* d_lse;
  DType dtype;
  AttentionShape shape;
  double scale;
  AttentionOptions options{};
  const void* base = nullptr;
};

// The gradient of sum (dq grad_q' + dk grad_k' + dv grad_v'), grad_q', grad_k', grad_v' what AttentionBackward gives
// for `grad_out`. That of grad_out is the derivative along dq, dk, dv; with t, d_lse, ds and delta as above and dp_ij =
// sum_c grad_out_ic v_jc, e_ij = sum_c grad_out_ic dv_jc:
//   w_ij = (t_ij - d_lse_i) (dp_ij - delta_i) + e_ij       z_ij = p_ij (w_ij - sum_j p_ij w_ij)
//   grad_q_ic = scale sum_j (z_ij k_jc + ds_ij dk_jc)      grad_k_jc = scale sum_i (z_ij q_ic + ds_ij dq_ic)
//   grad_v_jc = sum_i p_ij (t_ij - d_lse_i) grad_out_ic
// Each result may be null: it is then not wanted.
struct AttentionDoubleBackward {
  HeadsTensor grad_out, q, k, v, out;
  const void* lse;
  HeadsTensor dq, dk, dv;
  HeadsTensor grad_grad_out, grad_q, grad_k, grad_v;
  DType dtype;
  AttentionShape shape;
  double scale;
  AttentionOptions options{};
  const void* base = nullptr;
};

// Whether the sizes are valid and indices of a dense tensor of them fit.
static inline bool is_valid(const AttentionShape& shape) {
  if (shape.batch < 0 || shape.heads < 0 || shape.queries < 0 || shape.keys < 0 || shape.size < 1) return false;
  if (shape.key_heads < 0 || shape.value_size < 0) return false;
  if (shape.key_heads > 0 && shape.heads % shape.key_heads != 0) return false;
  const std::int64_t size = shape.size < shape.value_size ? shape.value_size : shape.size;
  std::int64_t planes, of_queries, of_keys, total;
  return !__builtin_mul_overflow(shape.batch, shape.heads, &planes) &&
         !__builtin_mul_overflow(planes, shape.queries, &of_queries) &&
         !__builtin_mul_overflow(planes, shape.keys, &of_keys) && !__builtin_mul_overflow(of_queries, size, &total) &&
         !__builtin_mul_overflow(of_keys, size, &total);
}

// With every size said.
static inline AttentionShape completed(AttentionShape shape) {
  if (shape.key_heads == 0) shape.key_heads = shape.heads;
  if (shape.value_size == 0) shape.value_size = shape.size;
  return shape;
}

// Whether the sizes are valid, and where something is dropped how much, and by which key.
static inline bool is_valid(const AttentionShape& shape, const AttentionOptions& options) {
  if (!is_valid(shape) || !(options.dropout >= 0 && options.dropout <= 1)) return false;
  if (options.dropout == 0) return true;
  // The products fit: without channels they are sizes of tensors.
  std::int64_t pairs;
  return !__builtin_mul_overflow(shape.heads * shape.queries, shape.keys, &pairs) &&
         is_valid({shape.batch, 1, pairs, 0}, options.key);
}

// Whether a call has none of the options, and as many heads and channels everywhere.
static inline bool is_plain(const AttentionShape& shape, const AttentionOptions& options) {
  return (shape.key_heads == 0 || shape.key_heads == shape.heads) &&
         (shape.value_size == 0 || shape.value_size == shape.size) && options.mask.data == nullptr &&
         options.key_lengths == nullptr && !options.causal && options.dropout == 0;
}

}  // namespace gencore

namespace gencore::cpu {

// Any strides. `threads` is at least 1; small tensors take fewer. The bits of the results do not depend on it, nor on
// how the batch and the queries are split into calls.
Status attention(const Attention& args, int threads);
Status attention_backward(const AttentionBackward& args, int threads);
Status attention_jvp(const AttentionJvp& args, int threads);
Status attention_double_backward(const AttentionDoubleBackward& args, int threads);

}  // namespace gencore::cpu

namespace gencore::cuda {

// Of each tensor but the mask the channels or the tokens lie side by side: one of the two strides is 1. `workspace` is
// device memory of as many bytes as the function of that name says, which may be 0. Mask and lengths are in device
// memory, and so is a key that has a row per sample.
std::int64_t attention_workspace(DType dtype, const AttentionShape& shape);
Error attention(const Attention& args, void* workspace, Stream stream);
std::int64_t attention_backward_workspace(DType dtype, const AttentionShape& shape);
Error attention_backward(const AttentionBackward& args, void* workspace, Stream stream);
// Those of half types are for where Triton is not: their products are not the tensor cores'.
std::int64_t attention_jvp_workspace(DType dtype, const AttentionShape& shape);
Error attention_jvp(const AttentionJvp& args, void* workspace, Stream stream);
std::int64_t attention_double_backward_workspace(DType dtype, const AttentionShape& shape);
Error attention_double_backward(const AttentionDoubleBackward& args, void* workspace, Stream stream);

}  // namespace gencore::cuda
