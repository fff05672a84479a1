// gencore._cpu: the CPU kernels for Python. Takes addresses and sizes, so it knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "gencore/add_noise.h"
#include "gencore/attention.h"
#include "gencore/denoising_loss.h"
#include "gencore/diffusion_step.h"
#include "gencore/group_norm.h"
#include "gencore/limits.h"
#include "gencore/normal.h"
#include "gencore/pages.h"
#include "gencore/reparameterize.h"
#include "gencore/simd.h"
#include "gencore/uniform.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;
using namespace gencore;

namespace {

NoiseKey noise_key(std::uintptr_t words, std::int64_t rows) {
  return {static_cast<const std::int64_t*>(pointer(words)), rows};
}

// Runs a kernel without the interpreter lock; a bad status becomes an exception that names the op.
template <class Kernel>
void run(const char* op, Kernel&& kernel) {
  Status status;
  {
    py::gil_scoped_release release;
    status = kernel();
  }
  if (status == Status::out_of_memory) throw std::bad_alloc();
  if (status != Status::ok) throw std::invalid_argument(std::string("gencore._cpu.") + op + ": " + message(status));
}

// The coefficients of `samples` samples, all of which have a row.
Coefficients checked_coefficients(const py::tuple& table, std::int64_t samples) {
  const Coefficients found = coefficients(table);
  for (std::int64_t b = 0; found.index != nullptr && b < samples; ++b) {
    if (found.index[b] < 0 || found.index[b] >= found.rows) {
      throw std::invalid_argument("t must be in [0, " + std::to_string(found.rows) +
                                  "), the steps of the schedule, got " + std::to_string(found.index[b]) +
                                  " for sample " + std::to_string(b));
    }
  }
  return found;
}

std::vector<std::string> levels(bool (*holds)(cpu::SimdLevel)) {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::simd_levels; ++i) {
    const auto level = static_cast<cpu::SimdLevel>(i);
    if (holds(level)) names.emplace_back(cpu::name(level));
  }
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = GENCORE_VERSION;
  info["compiler"] = GENCORE_COMPILER;
  info["simd_compiled"] = levels(cpu::is_compiled);
  info["simd_supported"] = levels(cpu::is_supported);
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  info["cuda_module"] = GENCORE_CUDA_STATE;
  return info;
}

void set_simd_level(const std::string& wanted) {
  for (int i = 0; i < cpu::simd_levels; ++i) {
    const auto level = static_cast<cpu::SimdLevel>(i);
    if (wanted == cpu::name(level) && cpu::set_simd_level(level)) return;
  }
  throw std::invalid_argument("level must be compiled and supported here, got '" + wanted + "'");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of gencore, by address. Call gencore.ops instead.";

  m.def("build_info", &build_info);
#ifdef _OPENMP
  // Which OpenMP runtime answers this module: the address of one of its functions tells.
  m.def("openmp_address", [] { return reinterpret_cast<std::uintptr_t>(&omp_get_max_threads); });
#else
  m.def("openmp_address", [] { return std::uintptr_t{0}; });
#endif
  m.def("simd_level", [] { return cpu::name(cpu::simd_level()); });
  m.def("set_simd_level", &set_simd_level);
  m.def("multiplications_per_second", &cpu::multiplications_per_second);
  m.def("vector_instructions_per_second", &cpu::vector_instructions_per_second);
  m.def("multiply_adds_per_second", &cpu::multiply_adds_per_second);

  m.def("request_huge_pages",
        [](std::uintptr_t memory, std::int64_t bytes) { cpu::request_huge_pages(pointer(memory), bytes); });

  m.def("normal", [](std::uintptr_t out, int dtype, std::int64_t samples, std::int64_t elements, std::int64_t channels,
                     std::uintptr_t key, std::int64_t key_rows, int threads) {
    run("normal", [&] {
      return cpu::normal(pointer(out), DType(dtype), {samples, 1, elements, channels}, noise_key(key, key_rows),
                         threads);
    });
  });
  m.def("uniform", [](std::uintptr_t out, int dtype, std::int64_t samples, std::int64_t elements, std::int64_t channels,
                      std::uintptr_t key, std::int64_t key_rows, int threads) {
    run("uniform", [&] {
      return cpu::uniform(pointer(out), DType(dtype), {samples, 1, elements, channels}, noise_key(key, key_rows),
                          threads);
    });
  });
  m.def("reparameterize",
        [](std::uintptr_t mu, std::uintptr_t logvar, std::uintptr_t z, std::uintptr_t slope, std::uintptr_t kl,
           int dtype, std::int64_t samples, std::int64_t draws, std::int64_t elements, std::int64_t channels,
           std::uintptr_t key, std::int64_t key_rows, int threads) {
          run("reparameterize", [&] {
            return cpu::reparameterize({pointer(mu),
                                        pointer(logvar),
                                        pointer(z),
                                        pointer(slope),
                                        pointer(kl),
                                        DType(dtype),
                                        {samples, draws, elements, channels},
                                        noise_key(key, key_rows)},
                                       threads);
          });
        });
  m.def("reparameterize_backward",
        [](std::uintptr_t grad_z, std::uintptr_t grad_kl, std::uintptr_t mu, std::uintptr_t logvar,
           std::uintptr_t grad_mu, std::uintptr_t grad_logvar, int dtype, std::int64_t samples, std::int64_t draws,
           std::int64_t elements, std::int64_t channels, std::uintptr_t key, std::int64_t key_rows, int threads) {
          run("reparameterize_backward", [&] {
            return cpu::reparameterize_backward({pointer(grad_z),
                                                 pointer(grad_kl),
                                                 pointer(mu),
                                                 pointer(logvar),
                                                 pointer(grad_mu),
                                                 pointer(grad_logvar),
                                                 DType(dtype),
                                                 {samples, draws, elements, channels},
                                                 noise_key(key, key_rows)},
                                                threads);
          });
        });
  m.def("add_noise", [](std::uintptr_t x0, std::uintptr_t x_t, std::uintptr_t noise, int dtype, std::int64_t samples,
                        std::int64_t elements, std::int64_t channels, const py::tuple& table, std::uintptr_t key,
                        std::int64_t key_rows, int threads) {
    const AddNoise args{pointer(x0),
                        pointer(x_t),
                        pointer(noise),
                        DType(dtype),
                        {samples, 1, elements, channels},
                        checked_coefficients(table, samples),
                        noise_key(key, key_rows)};
    run("add_noise", [&] { return cpu::add_noise(args, threads); });
  });
  m.def(
      "denoising_loss",
      [](std::uintptr_t output, std::uintptr_t x0, std::uintptr_t noise, std::uintptr_t loss, int dtype,
         std::int64_t samples, std::int64_t elements, std::int64_t channels, bool learned, const py::tuple& table,
         std::uintptr_t key, std::int64_t key_rows, int threads, std::uintptr_t error) {
        const DenoisingLoss args{pointer(output),
                                 pointer(x0),
                                 pointer(noise),
                                 pointer(loss),
                                 DType(dtype),
                                 {samples, 1, elements, channels},
                                 learned,
                                 checked_coefficients(table, samples),
                                 noise_key(key, key_rows)};
        run("denoising_loss", [&] { return cpu::denoising_loss(args, pointer(error), threads); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg(), py::arg("error") = 0);
  m.def("denoising_loss_backward",
        [](std::uintptr_t grad_loss, std::uintptr_t output, std::uintptr_t x0, std::uintptr_t noise,
           std::uintptr_t grad_output, int dtype, std::int64_t samples, std::int64_t elements, std::int64_t channels,
           bool learned, const py::tuple& table, std::uintptr_t key, std::int64_t key_rows, int threads) {
          const DenoisingLossBackward args{pointer(grad_loss),
                                           pointer(output),
                                           pointer(x0),
                                           pointer(noise),
                                           pointer(grad_output),
                                           DType(dtype),
                                           {samples, 1, elements, channels},
                                           learned,
                                           checked_coefficients(table, samples),
                                           noise_key(key, key_rows)};
          run("denoising_loss_backward", [&] { return cpu::denoising_loss_backward(args, threads); });
        });
  m.def("denoising_loss_scale",
        [](std::uintptr_t grad_loss, std::uintptr_t error, int dtype, std::int64_t samples, std::int64_t elements,
           std::int64_t channels, const py::tuple& table, std::uintptr_t key, std::int64_t key_rows, int threads) {
          const DenoisingLossBackward args{pointer(grad_loss),
                                           nullptr,
                                           nullptr,
                                           nullptr,
                                           pointer(error),
                                           DType(dtype),
                                           {samples, 1, elements, channels},
                                           false,
                                           checked_coefficients(table, samples),
                                           noise_key(key, key_rows)};
          run("denoising_loss_scale", [&] { return cpu::denoising_loss_scale(args, threads); });
        });
  m.def("diffusion_step", [](const std::array<std::uintptr_t, 9>& addresses, int dtype, std::int64_t samples,
                             std::int64_t elements, std::int64_t channels, bool learned, bool second_learned,
                             const py::tuple& table, std::uintptr_t key, std::int64_t key_rows, int threads) {
    const DiffusionStep args =
        diffusion_step_arguments(addresses, dtype, {samples, 1, elements, channels}, learned, second_learned,
                                 checked_coefficients(table, samples), noise_key(key, key_rows));
    run("diffusion_step", [&] { return cpu::diffusion_step(args, threads); });
  });
  m.def("attention",
        [](const py::object& q, const py::object& k, const py::object& v, const py::object& out, std::uintptr_t lse,
           int dtype, const std::array<std::int64_t, 5>& sizes, double scale, int threads) {
          const Attention args{heads_tensor(q), heads_tensor(k), heads_tensor(v),        heads_tensor(out),
                               pointer(lse),    DType(dtype),    attention_shape(sizes), scale};
          run("attention", [&] { return cpu::attention(args, threads); });
        });
  m.def("attention_backward",
        [](const std::array<py::object, 5>& tensors, std::uintptr_t lse, const std::array<py::object, 3>& grads,
           int dtype, const std::array<std::int64_t, 5>& sizes, double scale, int threads) {
          const AttentionBackward args = attention_arguments(tensors, lse, grads, dtype, attention_shape(sizes), scale);
          run("attention_backward", [&] { return cpu::attention_backward(args, threads); });
        });
  m.def("attention_jvp", [](const std::array<py::object, 4>& tensors, std::uintptr_t lse,
                            const std::array<py::object, 3>& direction, const py::object& d_out, std::uintptr_t d_lse,
                            int dtype, const std::array<std::int64_t, 5>& sizes, double scale, int threads) {
    const AttentionJvp args =
        attention_jvp_arguments(tensors, lse, direction, d_out, d_lse, dtype, attention_shape(sizes), scale);
    run("attention_jvp", [&] { return cpu::attention_jvp(args, threads); });
  });
  m.def("attention_double_backward",
        [](const std::array<py::object, 5>& tensors, std::uintptr_t lse, const std::array<py::object, 3>& direction,
           const std::array<py::object, 4>& grads, int dtype, const std::array<std::int64_t, 5>& sizes, double scale,
           int threads) {
          const AttentionDoubleBackward args =
              attention_double_backward_arguments(tensors, lse, direction, grads, dtype, attention_shape(sizes), scale);
          run("attention_double_backward", [&] { return cpu::attention_double_backward(args, threads); });
        });
  m.def("general_attention",
        [](const py::object& q, const py::object& k, const py::object& v, const py::object& out, std::uintptr_t lse,
           std::uintptr_t base, int dtype, const std::array<std::int64_t, 7>& sizes, double scale,
           const py::tuple& options, int threads) {
          const Attention args{
              heads_tensor(q), heads_tensor(k),        heads_tensor(v), heads_tensor(out),          pointer(lse),
              DType(dtype),    attention_shape(sizes), scale,           attention_options(options), pointer(base)};
          run("general_attention", [&] { return cpu::attention(args, threads); });
        });
  m.def("general_attention_backward",
        [](const std::array<py::object, 5>& tensors, std::uintptr_t lse, std::uintptr_t base,
           const std::array<py::object, 3>& grads, const py::object& grad_mask, int dtype,
           const std::array<std::int64_t, 7>& sizes, double scale, const py::tuple& options, int threads) {
          AttentionBackward args = attention_arguments(tensors, lse, grads, dtype, attention_shape(sizes), scale,
                                                       attention_options(options));
          args.base = pointer(base);
          args.grad_mask = heads_tensor(grad_mask);
          run("general_attention_backward", [&] { return cpu::attention_backward(args, threads); });
        });
  m.def("general_attention_jvp",
        [](const std::array<py::object, 4>& tensors, std::uintptr_t lse, std::uintptr_t base,
           const std::array<py::object, 3>& direction, const py::object& d_out, std::uintptr_t d_lse, int dtype,
           const std::array<std::int64_t, 7>& sizes, double scale, const py::tuple& options, int threads) {
          AttentionJvp args = attention_jvp_arguments(tensors, lse, direction, d_out, d_lse, dtype,
                                                      attention_shape(sizes), scale, attention_options(options));
          args.base = pointer(base);
          run("general_attention_jvp", [&] { return cpu::attention_jvp(args, threads); });
        });
  m.def("general_attention_double_backward",
        [](const std::array<py::object, 5>& tensors, std::uintptr_t lse, std::uintptr_t base,
           const std::array<py::object, 3>& direction, const std::array<py::object, 4>& grads, int dtype,
           const std::array<std::int64_t, 7>& sizes, double scale, const py::tuple& options, int threads) {
          AttentionDoubleBackward args = attention_double_backward_arguments(
              tensors, lse, direction, grads, dtype, attention_shape(sizes), scale, attention_options(options));
          args.base = pointer(base);
          run("general_attention_double_backward", [&] { return cpu::attention_double_backward(args, threads); });
        });
  m.def("group_norm",
        [](std::uintptr_t x, std::uintptr_t y, std::uintptr_t statistics, int dtype, const py::tuple& shape,
           std::int64_t groups, bool channels_last, double eps, int activation, const py::tuple& values, int threads) {
          const GroupNorm args = group_norm_arguments(
              x, y, statistics, dtype, group_norm_shape(shape, groups, channels_last), eps, activation, values);
          run("group_norm", [&] { return cpu::group_norm(args, threads); });
        });
  m.def("group_norm_backward", [](std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t statistics, int dtype,
                                  const py::tuple& shape, std::int64_t groups, bool channels_last, int activation,
                                  const py::tuple& values, const std::array<std::uintptr_t, 6>& grads, int threads) {
    const GroupNormBackward args = group_norm_arguments(
        grad_y, x, statistics, dtype, group_norm_shape(shape, groups, channels_last), activation, values, grads);
    run("group_norm_backward", [&] { return cpu::group_norm_backward(args, threads); });
  });
  m.def("group_norm_jvp", [](std::uintptr_t x, std::uintptr_t d_y, std::uintptr_t statistics, int dtype,
                             const py::tuple& shape, std::int64_t groups, bool channels_last, int activation,
                             const py::tuple& values, std::uintptr_t d_x, const py::tuple& d_values, int threads) {
    const GroupNormJvp args =
        group_norm_jvp_arguments(x, d_y, statistics, dtype, group_norm_shape(shape, groups, channels_last), activation,
                                 values, group_norm_direction(d_x, d_values));
    run("group_norm_jvp", [&] { return cpu::group_norm_jvp(args, threads); });
  });
  m.def("group_norm_double_backward",
        [](std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t statistics, int dtype, const py::tuple& shape,
           std::int64_t groups, bool channels_last, int activation, const py::tuple& values, std::uintptr_t d_x,
           const py::tuple& d_values, const std::array<std::uintptr_t, 7>& grads, int threads) {
          const GroupNormDoubleBackward args = group_norm_double_backward_arguments(
              grad_y, x, statistics, dtype, group_norm_shape(shape, groups, channels_last), activation, values,
              group_norm_direction(d_x, d_values), grads);
          run("group_norm_double_backward", [&] { return cpu::group_norm_double_backward(args, threads); });
        });
}
