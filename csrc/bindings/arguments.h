// Arguments that both modules take.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "gencore/attention.h"
#include "gencore/diffusion_step.h"
#include "gencore/group_norm.h"
#include "gencore/upfirdn2d.h"

namespace gencore {

inline void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

// None, or the address and the four strides.
inline HeadsTensor heads_tensor(const pybind11::handle& tensor) {
  if (tensor.is_none()) return {};
  const auto words = tensor.cast<std::array<std::int64_t, 5>>();
  return {reinterpret_cast<void*>(words[0]), words[1], words[2], words[3], words[4]};
}

// sizes: batch, heads, queries, keys, channels of a head.
inline AttentionShape attention_shape(const std::array<std::int64_t, 5>& sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

// sizes: as above, then the heads of k and the channels of a value.
inline AttentionShape attention_shape(const std::array<std::int64_t, 7>& sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
}

// (mask as heads_tensor takes it, its dtype or -1 for a boolean one, address of the lengths or 0, causal, dropout,
// address of the key, its rows, and for CUDA whether it is in the memory of a device).
inline AttentionOptions attention_options(const pybind11::tuple& given) {
  if (given.size() != 7 && given.size() != 8) throw pybind11::value_error("options must be seven or eight");
  AttentionOptions options;
  options.mask = heads_tensor(given[0]);
  const int dtype = given[1].cast<int>();
  options.mask_is_boolean = dtype < 0;
  options.mask_dtype = DType(dtype < 0 ? 0 : dtype);
  options.key_lengths = static_cast<const std::int64_t*>(pointer(given[2].cast<std::uintptr_t>()));
  options.causal = given[3].cast<bool>();
  options.dropout = given[4].cast<double>();
  options.key = {static_cast<const std::int64_t*>(pointer(given[5].cast<std::uintptr_t>())),
                 given[6].cast<std::int64_t>(), given.size() == 8 && given[7].cast<bool>()};
  return options;
}

// tensors: grad_out, q, k, v, out; grads: those of q, k and v, None where one is not wanted.
inline AttentionBackward attention_arguments(const std::array<pybind11::object, 5>& tensors, std::uintptr_t lse,
                                             const std::array<pybind11::object, 3>& grads, int dtype,
                                             const AttentionShape& shape, double scale,
                                             const AttentionOptions& options = {}) {
  return {heads_tensor(tensors[0]),
          heads_tensor(tensors[1]),
          heads_tensor(tensors[2]),
          heads_tensor(tensors[3]),
          heads_tensor(tensors[4]),
          pointer(lse),
          heads_tensor(grads[0]),
          heads_tensor(grads[1]),
          heads_tensor(grads[2]),
          DType(dtype),
          shape,
          scale,
          options};
}

// tensors: q, k, v, out; direction: dq, dk, dv.
inline AttentionJvp attention_jvp_arguments(const std::array<pybind11::object, 4>& tensors, std::uintptr_t lse,
                                            const std::array<pybind11::object, 3>& direction,
                                            const pybind11::object& d_out, std::uintptr_t d_lse, int dtype,
                                            const AttentionShape& shape, double scale,
                                            const AttentionOptions& options = {}) {
  return {heads_tensor(tensors[0]),
          heads_tensor(tensors[1]),
          heads_tensor(tensors[2]),
          heads_tensor(tensors[3]),
          pointer(lse),
          heads_tensor(direction[0]),
          heads_tensor(direction[1]),
          heads_tensor(direction[2]),
          heads_tensor(d_out),
          pointer(d_lse),
          DType(dtype),
          shape,
          scale,
          options};
}

// tensors: grad_out, q, k, v, out; direction: dq, dk, dv; grads: of grad_out, q, k, v.
inline AttentionDoubleBackward attention_double_backward_arguments(const std::array<pybind11::object, 5>& tensors,
                                                                   std::uintptr_t lse,
                                                                   const std::array<pybind11::object, 3>& direction,
                                                                   const std::array<pybind11::object, 4>& grads,
                                                                   int dtype, const AttentionShape& shape, double scale,
                                                                   const AttentionOptions& options = {}) {
  return {heads_tensor(tensors[0]),
          heads_tensor(tensors[1]),
          heads_tensor(tensors[2]),
          heads_tensor(tensors[3]),
          heads_tensor(tensors[4]),
          pointer(lse),
          heads_tensor(direction[0]),
          heads_tensor(direction[1]),
          heads_tensor(direction[2]),
          heads_tensor(grads[0]),
          heads_tensor(grads[1]),
          heads_tensor(grads[2]),
          heads_tensor(grads[3]),
          DType(dtype),
          shape,
          scale,
          options};
}

// (address of the rows, how many, address of the index or 0, whether both are in the memory of a device).
inline Coefficients coefficients(const pybind11::tuple& table) {
  if (table.size() != 4) throw pybind11::value_error("coefficients must be four");
  return {static_cast<const double*>(pointer(table[0].cast<std::uintptr_t>())), table[1].cast<std::int64_t>(),
          static_cast<const std::int64_t*>(pointer(table[2].cast<std::uintptr_t>())), table[3].cast<bool>()};
}

// addresses: x, output, second, history0, history1, known, mask, y, prediction; 0 where there is none.
inline DiffusionStep diffusion_step_arguments(const std::array<std::uintptr_t, 9>& addresses, int dtype,
                                              const NoiseShape& shape, bool learned, bool second_learned,
                                              const Coefficients& table, const NoiseKey& key) {
  return {pointer(addresses[0]),
          pointer(addresses[1]),
          pointer(addresses[2]),
          pointer(addresses[3]),
          pointer(addresses[4]),
          pointer(addresses[5]),
          pointer(addresses[6]),
          pointer(addresses[7]),
          pointer(addresses[8]),
          DType(dtype),
          shape,
          learned,
          second_learned,
          table,
          key};
}

// sizes: samples and channels, then of rows and of columns those of a ResampledAxis.
inline Upfirdn2d upfirdn2d_arguments(std::uintptr_t x, std::uintptr_t filter, std::uintptr_t y, int dtype,
                                     const std::array<std::int64_t, 14>& sizes, bool channels_last, bool separable,
                                     bool flip, double gain) {
  return {pointer(x),
          pointer(filter),
          pointer(y),
          DType(dtype),
          sizes[0],
          sizes[1],
          {sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]},
          {sizes[8], sizes[9], sizes[10], sizes[11], sizes[12], sizes[13]},
          channels_last,
          separable,
          flip,
          gain};
}

// The shape of a tensor, samples and channels first.
inline GroupNormShape group_norm_shape(const pybind11::tuple& shape, std::int64_t groups, bool channels_last) {
  if (shape.size() < 2) throw pybind11::value_error("shape must have samples and channels");
  GroupNormShape sizes{shape[0].cast<std::int64_t>(), shape[1].cast<std::int64_t>(), 1, groups, channels_last};
  for (std::size_t i = 2; i < shape.size(); ++i) {
    if (__builtin_mul_overflow(sizes.pixels, shape[i].cast<std::int64_t>(), &sizes.pixels)) sizes.pixels = -1;
  }
  return sizes;
}

// weight, bias, scale, shift and bias_in: each None or (address, dtype, stride).
struct GroupNormValues {
  ChannelValues weight, bias, scale, shift, bias_in;

  explicit GroupNormValues(const pybind11::tuple& values) {
    ChannelValues* const into[] = {&weight, &bias, &scale, &shift, &bias_in};
    if (values.size() != std::size(into)) throw pybind11::value_error("values must be five");
    for (std::size_t i = 0; i < std::size(into); ++i) {
      *into[i] = {nullptr, DType::float32, 0};
      if (values[i].is_none()) continue;
      const auto value = values[i].cast<pybind11::tuple>();
      *into[i] = {pointer(value[0].cast<std::uintptr_t>()), DType(value[1].cast<int>()), value[2].cast<std::int64_t>()};
    }
  }
};

inline GroupNorm group_norm_arguments(std::uintptr_t x, std::uintptr_t y, std::uintptr_t statistics, int dtype,
                                      const GroupNormShape& shape, double eps, int activation,
                                      const pybind11::tuple& values) {
  const GroupNormValues v(values);
  return {pointer(x),
          pointer(y),
          static_cast<double*>(pointer(statistics)),
          DType(dtype),
          shape,
          eps,
          Activation(activation),
          v.weight,
          v.bias,
          v.scale,
          v.shift,
          v.bias_in};
}

// grads: the addresses of the gradients of x and of the five values, 0 where one is not wanted.
inline GroupNormBackward group_norm_arguments(std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t statistics,
                                              int dtype, const GroupNormShape& shape, int activation,
                                              const pybind11::tuple& values,
                                              const std::array<std::uintptr_t, 6>& grads) {
  const GroupNormValues v(values);
  return {pointer(grad_y),
          pointer(x),
          static_cast<const double*>(pointer(statistics)),
          DType(dtype),
          shape,
          Activation(activation),
          v.weight,
          v.bias,
          v.scale,
          v.shift,
          v.bias_in,
          pointer(grads[0]),
          pointer(grads[1]),
          pointer(grads[2]),
          pointer(grads[3]),
          pointer(grads[4]),
          pointer(grads[5])};
}

// The address of d_x, 0 where x does not change, and the changes of the five values as GroupNormValues takes values.
inline GroupNormDirection group_norm_direction(std::uintptr_t d_x, const pybind11::tuple& d_values) {
  const GroupNormValues d(d_values);
  return {pointer(d_x), d.weight, d.bias, d.scale, d.shift, d.bias_in};
}

inline GroupNormJvp group_norm_jvp_arguments(std::uintptr_t x, std::uintptr_t d_y, std::uintptr_t statistics, int dtype,
                                             const GroupNormShape& shape, int activation, const pybind11::tuple& values,
                                             const GroupNormDirection& direction) {
  const GroupNormValues v(values);
  return {pointer(x),   pointer(d_y), static_cast<const double*>(pointer(statistics)),
          DType(dtype), shape,        Activation(activation),
          v.weight,     v.bias,       v.scale,
          v.shift,      v.bias_in,    direction};
}

// grads: the addresses of the gradients of grad_y, of x and of the five values, 0 where one is not wanted.
inline GroupNormDoubleBackward group_norm_double_backward_arguments(std::uintptr_t grad_y, std::uintptr_t x,
                                                                    std::uintptr_t statistics, int dtype,
                                                                    const GroupNormShape& shape, int activation,
                                                                    const pybind11::tuple& values,
                                                                    const GroupNormDirection& direction,
                                                                    const std::array<std::uintptr_t, 7>& grads) {
  const GroupNormValues v(values);
  return {pointer(grad_y),
          pointer(x),
          static_cast<const double*>(pointer(statistics)),
          DType(dtype),
          shape,
          Activation(activation),
          v.weight,
          v.bias,
          v.scale,
          v.shift,
          v.bias_in,
          direction,
          pointer(grads[0]),
          pointer(grads[1]),
          pointer(grads[2]),
          pointer(grads[3]),
          pointer(grads[4]),
          pointer(grads[5]),
          pointer(grads[6])};
}

}  // namespace gencore
