// gencore._cpu: the CPU kernels for Python. Takes addresses and sizes, so it knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "gencore/add_noise.h"
#include "gencore/attention.h"
#include "gencore/bias_act.h"
#include "gencore/denoising_loss.h"
#include "gencore/diffusion_step.h"
#include "gencore/group_norm.h"
#include "gencore/limits.h"
#include "gencore/normal.h"
#include "gencore/pages.h"
#include "gencore/reparameterize.h"
#include "gencore/simd.h"
#include "gencore/uniform.h"
#include "gencore/upfirdn2d.h"
#include "structs.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;
using namespace gencore;

namespace {

// That every sample has a row of the coefficients it points to: an index may be wrong where the sizes are right.
template <class Args>
void check_index(const Args& args) {
  if constexpr (requires { args.table.index; }) {
    const std::int64_t* const index = args.table.index;
    for (std::int64_t b = 0; index != nullptr && b < args.shape.samples; ++b) {
      if (index[b] >= 0 && index[b] < args.table.rows) continue;
      throw std::invalid_argument("t must be in [0, " + std::to_string(args.table.rows) +
                                  "), the steps of the schedule, got " + std::to_string(index[b]) + " for sample " +
                                  std::to_string(b));
    }
  }
}

// Runs kernels without the interpreter lock; a bad status becomes an exception that names the op.
struct Cpu {
  using Place = int;  // The number of threads.

  template <class Args>
  static void run(const bindings::Path& op, Status (*kernel)(const Args&, int), const Args& args, int threads) {
    check_index(args);
    Status status;
    {
      py::gil_scoped_release release;
      status = kernel(args, threads);
    }
    if (status == Status::out_of_memory) throw std::bad_alloc();
    if (status != Status::ok) throw std::invalid_argument(op.text() + ": " + message(status));
  }
};

template <auto kernel>
void bind(py::module_& m, const char* name) {
  bindings::bind<kernel, Cpu>(m, name);
}

template <auto noise>
Status fill(const Fill& args, int threads) {
  return noise(args.out, args.dtype, args.shape, args.key, threads);
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

  m.def("request_huge_pages", [](std::uintptr_t memory, std::int64_t bytes) {
    cpu::request_huge_pages(reinterpret_cast<void*>(memory), bytes);
  });

  bind_structs(m);
  bind<&fill<&cpu::normal>>(m, "normal");
  bind<&fill<&cpu::uniform>>(m, "uniform");
  bind<&cpu::reparameterize>(m, "reparameterize");
  bind<&cpu::reparameterize_backward>(m, "reparameterize_backward");
  bind<&cpu::add_noise>(m, "add_noise");
  bind<&cpu::denoising_loss>(m, "denoising_loss");
  bind<&cpu::denoising_loss_backward>(m, "denoising_loss_backward");
  bind<&cpu::denoising_loss_scale>(m, "denoising_loss_scale");
  bind<&cpu::diffusion_step>(m, "diffusion_step");
  bind<&cpu::attention>(m, "attention");
  bind<&cpu::attention_backward>(m, "attention_backward");
  bind<&cpu::attention_jvp>(m, "attention_jvp");
  bind<&cpu::attention_double_backward>(m, "attention_double_backward");
  bind<&cpu::group_norm>(m, "group_norm");
  bind<&cpu::group_norm_backward>(m, "group_norm_backward");
  bind<&cpu::group_norm_jvp>(m, "group_norm_jvp");
  bind<&cpu::group_norm_double_backward>(m, "group_norm_double_backward");
  bind<&cpu::bias_act>(m, "bias_act");
  bind<&cpu::bias_act_backward>(m, "bias_act_backward");
  bind<&cpu::bias_act_double_backward>(m, "bias_act_double_backward");
  bind<&cpu::upfirdn2d>(m, "upfirdn2d");
}
