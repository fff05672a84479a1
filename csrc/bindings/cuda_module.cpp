// gencore._cuda: the CUDA kernels for Python. Takes device addresses and sizes, so it knows nothing of torch.
//
// The argument `place` of every op says where: the device's index, a stream of it, and memory for the kernel's own use.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "gencore/add_noise.h"
#include "gencore/attention.h"
#include "gencore/bias_act.h"
#include "gencore/denoising_loss.h"
#include "gencore/diffusion_step.h"
#include "gencore/group_norm.h"
#include "gencore/normal.h"
#include "gencore/reparameterize.h"
#include "gencore/uniform.h"
#include "gencore/upfirdn2d.h"
#include "structs.h"

namespace py = pybind11;
using namespace gencore;

namespace {

// Makes a device the current one for as long as this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int before_ = 0;
  bool changed_ = false;
};

std::string described(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::bfloat16: return "bfloat16";
    case DType::float16: return "float16";
  }
  return "unknown dtype";
}

std::string described(const NoiseShape& shape, DType dtype) {
  return std::to_string(shape.draws) + " x " + std::to_string(shape.samples) + " x " + std::to_string(shape.elements) +
         " " + described(dtype) + " values" +
         (shape.channels > 1 ? ", channels_last with " + std::to_string(shape.channels) + " channels" : "");
}

std::string described(const GroupNormShape& shape, DType dtype) {
  return std::to_string(shape.samples) + " x " + std::to_string(shape.channels) + " x " + std::to_string(shape.pixels) +
         " " + described(dtype) + " values in " + std::to_string(shape.groups) + " groups" +
         (shape.channels_last ? ", channels_last" : "");
}

std::string described(const AttentionShape& shape, DType dtype) {
  return std::to_string(shape.batch) + " x " + std::to_string(shape.heads) + " heads of " + std::to_string(shape.size) +
         " " + described(dtype) + " channels, " + std::to_string(shape.queries) + " queries and " +
         std::to_string(shape.keys) + " keys";
}

std::string described(const BiasActShape& shape, DType dtype) {
  return std::to_string(shape.outer) + " x " + std::to_string(shape.channels) + " channels x " +
         std::to_string(shape.inner) + " " + described(dtype) + " values";
}

std::string described(const ResampledAxis& axis) {
  return std::to_string(axis.size) + " (up " + std::to_string(axis.up) + ", " + std::to_string(axis.taps) +
         " taps, down " + std::to_string(axis.down) + ")";
}

template <class Args>
std::string described(const Args& args) {
  return described(args.shape, args.dtype);
}

std::string described(const Upfirdn2d& args) {
  return std::to_string(args.samples) + " x " + std::to_string(args.channels) + " x " + described(args.rows) + " x " +
         described(args.columns) + " " + described(args.dtype) + " values" +
         (args.channels_last ? ", channels_last" : "");
}

// Launches kernels; an error becomes an exception that names the op and its shapes.
struct Cuda {
  struct Place {
    int device;
    cuda::Stream stream;
    void* workspace;  // For the functions that take one.
  };

  template <class Kernel, class Args>
  static void run(const bindings::Path& op, Kernel kernel, const Args& args, const Place& place) {
    cuda::Error error;
    {
      // A launch waits where its stream's queue is full, or a kernel is loaded: other threads must go on meanwhile.
      py::gil_scoped_release release;
      const DeviceGuard guard(place.device);
      error = guard.error() == cudaSuccess ? launch(kernel, args, place) : static_cast<cuda::Error>(guard.error());
    }
    if (error == cudaSuccess) return;
    const std::string what = op.text() + " of " + described(args) + ", on device " + std::to_string(place.device) +
                             ": " + cuda::message(error) + " (" + cuda::name(error) + ")";
    if (error == cudaErrorInvalidValue) throw std::invalid_argument(what);
    throw std::runtime_error(what);
  }

 private:
  template <class Args>
  static cuda::Error launch(cuda::Error (*kernel)(const Args&, cuda::Stream), const Args& args, const Place& place) {
    return kernel(args, place.stream);
  }

  template <class Args>
  static cuda::Error launch(cuda::Error (*kernel)(const Args&, void*, cuda::Stream), const Args& args,
                            const Place& place) {
    return kernel(args, place.workspace, place.stream);
  }
};

template <auto kernel>
void bind(py::module_& m, const char* name) {
  bindings::bind<kernel, Cuda>(m, name);
}

template <auto noise>
cuda::Error fill(const Fill& args, cuda::Stream stream) {
  return noise(args.out, args.dtype, args.shape, args.key, stream);
}

template <class Shape>
void bind_workspace(py::module_& m, const char* name, std::int64_t (*bytes)(DType, const Shape&)) {
  m.def(name, [bytes, name](int dtype, const py::object& shape) {
    return bytes(DType(dtype), bindings::load<Shape>(shape.ptr(), {nullptr, name}));
  });
}

py::dict build_info() {
  py::dict info;
  info["version"] = GENCORE_VERSION;
  info["compiler"] = GENCORE_CUDA_COMPILER;
  info["architectures"] = GENCORE_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of gencore, by address. Call gencore.ops instead.";

  m.def("build_info", &build_info);
  // Why the kernels of this module cannot run on a device, such as a driver that is older than the CUDA runtime in
  // here, or no code for its architecture; empty if they can.
  m.def("unusable", [](int device) {
    py::gil_scoped_release release;
    const DeviceGuard guard(device);
    const cuda::Error error = guard.error() == cudaSuccess ? cuda::probe() : static_cast<cuda::Error>(guard.error());
    if (error != cudaSuccess) cudaGetLastError();
    return std::string(error == cudaSuccess ? "" : cuda::message(error));
  });

  bind_structs(m);
  bindings::bind_struct<Cuda::Place>(m, "Place");
  bind<&fill<&cuda::normal>>(m, "normal");
  bind<&fill<&cuda::uniform>>(m, "uniform");
  bind<&cuda::reparameterize>(m, "reparameterize");
  bind<&cuda::reparameterize_backward>(m, "reparameterize_backward");
  bind<&cuda::add_noise>(m, "add_noise");
  bind<&cuda::denoising_loss>(m, "denoising_loss");
  bind<&cuda::denoising_loss_backward>(m, "denoising_loss_backward");
  bind<&cuda::diffusion_step>(m, "diffusion_step");
  bind<&cuda::attention>(m, "attention");
  bind<&cuda::attention_backward>(m, "attention_backward");
  bind<&cuda::attention_jvp>(m, "attention_jvp");
  bind<&cuda::attention_double_backward>(m, "attention_double_backward");
  bind<&cuda::group_norm>(m, "group_norm");
  bind<&cuda::group_norm_backward>(m, "group_norm_backward");
  bind<&cuda::group_norm_jvp>(m, "group_norm_jvp");
  bind<&cuda::group_norm_double_backward>(m, "group_norm_double_backward");
  bind<&cuda::bias_act>(m, "bias_act");
  bind<&cuda::bias_act_backward>(m, "bias_act_backward");
  bind<&cuda::bias_act_double_backward>(m, "bias_act_double_backward");
  bind<&cuda::upfirdn2d>(m, "upfirdn2d");
  bind_workspace(m, "reparameterize_workspace", &cuda::reparameterize_workspace);
  bind_workspace(m, "denoising_loss_workspace", &cuda::denoising_loss_workspace);
  bind_workspace(m, "attention_workspace", &cuda::attention_workspace);
  bind_workspace(m, "attention_backward_workspace", &cuda::attention_backward_workspace);
  bind_workspace(m, "attention_jvp_workspace", &cuda::attention_jvp_workspace);
  bind_workspace(m, "attention_double_backward_workspace", &cuda::attention_double_backward_workspace);
  bind_workspace(m, "bias_act_workspace", &cuda::bias_act_workspace);
  bind_workspace(m, "group_norm_workspace", &cuda::group_norm_workspace);
  bind_workspace(m, "group_norm_backward_workspace", &cuda::group_norm_backward_workspace);
  bind_workspace(m, "group_norm_jvp_workspace", &cuda::group_norm_jvp_workspace);
  bind_workspace(m, "group_norm_double_backward_workspace", &cuda::group_norm_double_backward_workspace);
}
