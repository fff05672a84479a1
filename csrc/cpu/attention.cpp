#include "gencore/attention.h"

#include <algorithm>

#include "attention_backward.h"
#include "attention_double_backward.h"
#include "attention_few.h"

namespace gencore::cpu::GENCORE_SIMD {

#if GENCORE_SIMD_NUMBER == 3
Status attention(const Attention& args, int threads) {
  return attend<Pairs>(args, Elements<float>{sizeof(bfloat16), gather_pairs, spread<bfloat16>}, threads);
}
#else
Status attention(const Attention& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return attend<Plain<Arithmetic<T>, Accumulator<T>>>(args, elements_of<T>, threads);
  });
}

Status attention_backward(const AttentionBackward& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return backward<Arithmetic<T>>(args, elements_of<T>, threads);
  });
}

Status attention_jvp(const AttentionJvp& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return jvp<Arithmetic<T>>(args, elements_of<T>, threads);
  });
}

Status attention_double_backward(const AttentionDoubleBackward& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return double_backward<Arithmetic<T>>(args, elements_of<T>, threads);
  });
}
#endif

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status attention(const Attention& args, int threads);
                       Status attention_backward(const AttentionBackward& args, int threads);
                       Status attention_jvp(const AttentionJvp& args, int threads);
                       Status attention_double_backward(const AttentionDoubleBackward& args, int threads))

namespace {

// Whether what every query and every key has is there.
bool lacks(const AttentionShape& shape, std::initializer_list<const void*> of_queries,
           std::initializer_list<const void*> of_keys) {
  const auto is_null = [](const void* data) { return data == nullptr; };
  return (shape.queries > 0 && std::any_of(of_queries.begin(), of_queries.end(), is_null)) ||
         (shape.keys > 0 && std::any_of(of_keys.begin(), of_keys.end(), is_null));
}

// With every size said.
template <class Args>
Args completed(const Args& given) {
  Args args = given;
  args.shape = gencore::completed(given.shape);
  return args;
}

bool is_acceptable(const AttentionShape& shape, const AttentionOptions& options) {
  return gencore::is_valid(shape, options) && !options.key.on_device;
}

bool is_empty(const AttentionShape& shape) {
  return shape.batch == 0 || shape.heads == 0 || (shape.queries == 0 && shape.keys == 0);
}

}  // namespace

#ifdef GENCORE_X86_LEVELS
namespace avx512_bf16 {
Status attention(const Attention& args, int threads);
}
#endif

Status attention(const Attention& given, int threads) {
  const Attention args = completed(given);
  const AttentionShape& shape = args.shape;
  if (threads < 1 || !is_acceptable(shape, args.options)) return Status::invalid_argument;
  if (shape.batch == 0 || shape.heads == 0 || shape.queries == 0) return Status::ok;
  const bool has_keys = args.k.data != nullptr && args.v.data != nullptr;
  if (args.q.data == nullptr || args.out.data == nullptr || (shape.keys > 0 && !has_keys)) {
    return Status::invalid_argument;
  }
#ifdef GENCORE_X86_LEVELS
  if (args.dtype == DType::bfloat16 && simd_level() == SimdLevel::avx512_bf16) {
    return avx512_bf16::attention(args, threads);
  }
#endif
  if (args.dtype == DType::float64) return scalar::attention(args, threads);
  GENCORE_DISPATCH(attention, args, threads);
}

Status attention_backward(const AttentionBackward& given, int threads) {
  AttentionBackward args = completed(given);
  const AttentionShape& shape = args.shape;
  if (threads < 1 || !is_acceptable(shape, args.options)) return Status::invalid_argument;
  if (args.grad_mask.data != nullptr) {
    const bool is_added = args.options.mask.data != nullptr && !args.options.mask_is_boolean;
    if (!is_added || (args.grad_mask.channel != 0 && args.grad_mask.channel != 1)) return Status::invalid_argument;
    if (args.grad_mask.channel == 0 && shape.keys > 1) args.grad_mask = {};
  }
  if (is_empty(shape)) return Status::ok;
  if (lacks(shape, {args.grad_out.data, args.q.data, args.out.data, args.lse}, {args.k.data, args.v.data})) {
    return Status::invalid_argument;
  }
  if (args.dtype == DType::float64) return scalar::attention_backward(args, threads);
  GENCORE_DISPATCH(attention_backward, args, threads);
}

Status attention_jvp(const AttentionJvp& given, int threads) {
  const AttentionJvp args = completed(given);
  const AttentionShape& shape = args.shape;
  if (threads < 1 || !is_acceptable(shape, args.options)) return Status::invalid_argument;
  if (is_empty(shape) || shape.queries == 0) return Status::ok;
  if (lacks(shape, {args.q.data, args.out.data, args.lse, args.d_out.data}, {args.k.data, args.v.data})) {
    return Status::invalid_argument;
  }
  if (args.dtype == DType::float64) return scalar::attention_jvp(args, threads);
  GENCORE_DISPATCH(attention_jvp, args, threads);
}

Status attention_double_backward(const AttentionDoubleBackward& given, int threads) {
  const AttentionDoubleBackward args = completed(given);
  const AttentionShape& shape = args.shape;
  if (threads < 1 || !is_acceptable(shape, args.options)) return Status::invalid_argument;
  if (is_empty(shape)) return Status::ok;
  if (lacks(shape, {args.grad_out.data, args.q.data, args.out.data, args.lse}, {args.k.data, args.v.data})) {
    return Status::invalid_argument;
  }
  if (args.dtype == DType::float64) return scalar::attention_double_backward(args, threads);
  GENCORE_DISPATCH(attention_double_backward, args, threads);
}

}  // namespace gencore::cpu
#endif
