// gencore._cuda: the CUDA kernels for Python. Takes device addresses and sizes, so it knows nothing of torch.
//
// The last arguments of every op say where: the device's index, and a stream of it.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "gencore/add_noise.h"
#include "gencore/attention.h"
#include "gencore/denoising_loss.h"
#include "gencore/diffusion_step.h"
#include "gencore/group_norm.h"
#include "gencore/normal.h"
#include "gencore/reparameterize.h"
#include "gencore/uniform.h"

namespace py = pybind11;
using namespace gencore;

namespace {

cuda::Stream stream_at(std::uintptr_t address) { return static_cast<cuda::Stream>(pointer(address)); }

NoiseKey noise_key(std::uintptr_t words, std::int64_t rows, bool on_device) {
  return {static_cast<const std::int64_t*>(pointer(words)), rows, on_device};
}

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

// Launches kernels; an error becomes an exception that names the op and its shapes.
template <class Shape, class Kernel>
void run(const char* op, DType dtype, const Shape& shape, int device, Kernel&& kernel) {
  cuda::Error error;
  {
    // A launch waits where its stream's queue is full, or a kernel is loaded: other threads must go on meanwhile.
    py::gil_scoped_release release;
    const DeviceGuard guard(device);
    error = guard.error() == cudaSuccess ? kernel() : static_cast<cuda::Error>(guard.error());
  }
  if (error == cudaSuccess) return;
  const std::string what = std::string("gencore._cuda.") + op + " of " + described(shape, dtype) + ", on device " +
                           std::to_string(device) + ": " + cuda::message(error) + " (" + cuda::name(error) + ")";
  if (error == cudaErrorInvalidValue) throw std::invalid_argument(what);
  throw std::runtime_error(what);
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

  m.def("normal", [](std::uintptr_t out, int dtype, std::int64_t samples, std::int64_t elements, std::int64_t channels,
                     std::uintptr_t key, std::int64_t key_rows, bool key_on_device, int device, std::uintptr_t stream) {
    const NoiseShape shape{samples, 1, elements, channels};
    run("normal", DType(dtype), shape, device, [&] {
      return cuda::normal(pointer(out), DType(dtype), shape, noise_key(key, key_rows, key_on_device),
                          stream_at(stream));
    });
  });
  m.def("uniform",
        [](std::uintptr_t out, int dtype, std::int64_t samples, std::int64_t elements, std::int64_t channels,
           std::uintptr_t key, std::int64_t key_rows, bool key_on_device, int device, std::uintptr_t stream) {
          const NoiseShape shape{samples, 1, elements, channels};
          run("uniform", DType(dtype), shape, device, [&] {
            return cuda::uniform(pointer(out), DType(dtype), shape, noise_key(key, key_rows, key_on_device),
                                 stream_at(stream));
          });
        });
  m.def("reparameterize_workspace",
        [](int dtype, std::int64_t samples, std::int64_t draws, std::int64_t elements, std::int64_t channels) {
          return cuda::reparameterize_workspace(DType(dtype), {samples, draws, elements, channels});
        });
  m.def(
      "reparameterize",
      [](std::uintptr_t mu, std::uintptr_t logvar, std::uintptr_t z, std::uintptr_t slope, std::uintptr_t kl, int dtype,
         std::int64_t samples, std::int64_t draws, std::int64_t elements, std::int64_t channels, std::uintptr_t key,
         std::int64_t key_rows, bool key_on_device, int device, std::uintptr_t stream, std::uintptr_t workspace) {
        const NoiseShape shape{samples, draws, elements, channels};
        run("reparameterize", DType(dtype), shape, device, [&] {
          return cuda::reparameterize({pointer(mu), pointer(logvar), pointer(z), pointer(slope), pointer(kl),
                                       DType(dtype), shape, noise_key(key, key_rows, key_on_device)},
                                      pointer(workspace), stream_at(stream));
        });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("workspace") = 0);
  m.def("reparameterize_backward",
        [](std::uintptr_t grad_z, std::uintptr_t grad_kl, std::uintptr_t mu, std::uintptr_t logvar,
           std::uintptr_t grad_mu, std::uintptr_t grad_logvar, int dtype, std::int64_t samples, std::int64_t draws,
           std::int64_t elements, std::int64_t channels, std::uintptr_t key, std::int64_t key_rows, bool key_on_device,
           int device, std::uintptr_t stream) {
          const NoiseShape shape{samples, draws, elements, channels};
          run("reparameterize_backward", DType(dtype), shape, device, [&] {
            return cuda::reparameterize_backward(
                {pointer(grad_z), pointer(grad_kl), pointer(mu), pointer(logvar), pointer(grad_mu),
                 pointer(grad_logvar), DType(dtype), shape, noise_key(key, key_rows, key_on_device)},
                stream_at(stream));
          });
        });
  m.def("add_noise", [](std::uintptr_t x0, std::uintptr_t x_t, std::uintptr_t noise, int dtype, std::int64_t samples,
                        std::int64_t elements, std::int64_t channels, const py::tuple& table, std::uintptr_t key,
                        std::int64_t key_rows, bool key_on_device, int device, std::uintptr_t stream) {
    const AddNoise args{pointer(x0),
                        pointer(x_t),
                        pointer(noise),
                        DType(dtype),
                        {samples, 1, elements, channels},
                        coefficients(table),
                        noise_key(key, key_rows, key_on_device)};
    run("add_noise", args.dtype, args.shape, device, [&] { return cuda::add_noise(args, stream_at(stream)); });
  });
  m.def("denoising_loss_workspace", [](int dtype, std::int64_t samples, std::int64_t elements, std::int64_t channels) {
    return cuda::denoising_loss_workspace(DType(dtype), {samples, 1, elements, channels});
  });
  m.def(
      "denoising_loss",
      [](std::uintptr_t output, std::uintptr_t x0, std::uintptr_t noise, std::uintptr_t loss, int dtype,
         std::int64_t samples, std::int64_t elements, std::int64_t channels, bool learned, const py::tuple& table,
         std::uintptr_t key, std::int64_t key_rows, bool key_on_device, int device, std::uintptr_t stream,
         std::uintptr_t workspace) {
        const DenoisingLoss args{pointer(output), pointer(x0),         pointer(noise),
                                 pointer(loss),   DType(dtype),        {samples, 1, elements, channels},
                                 learned,         coefficients(table), noise_key(key, key_rows, key_on_device)};
        run("denoising_loss", args.dtype, args.shape, device,
            [&] { return cuda::denoising_loss(args, pointer(workspace), stream_at(stream)); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("workspace") = 0);
  m.def("denoising_loss_backward",
        [](std::uintptr_t grad_loss, std::uintptr_t output, std::uintptr_t x0, std::uintptr_t noise,
           std::uintptr_t grad_output, int dtype, std::int64_t samples, std::int64_t elements, std::int64_t channels,
           bool learned, const py::tuple& table, std::uintptr_t key, std::int64_t key_rows, bool key_on_device,
           int device, std::uintptr_t stream) {
          const DenoisingLossBackward args{pointer(grad_loss),
                                           pointer(output),
                                           pointer(x0),
                                           pointer(noise),
                                           pointer(grad_output),
                                           DType(dtype),
                                           {samples, 1, elements, channels},
                                           learned,
                                           coefficients(table),
                                           noise_key(key, key_rows, key_on_device)};
          run("denoising_loss_backward", args.dtype, args.shape, device,
              [&] { return cuda::denoising_loss_backward(args, stream_at(stream)); });
        });
  m.def("diffusion_step",
        [](const std::array<std::uintptr_t, 9>& addresses, int dtype, std::int64_t samples, std::int64_t elements,
           std::int64_t channels, bool learned, bool second_learned, const py::tuple& table, std::uintptr_t key,
           std::int64_t key_rows, bool key_on_device, int device, std::uintptr_t stream) {
          const DiffusionStep args =
              diffusion_step_arguments(addresses, dtype, {samples, 1, elements, channels}, learned, second_learned,
                                       coefficients(table), noise_key(key, key_rows, key_on_device));
          run("diffusion_step", args.dtype, args.shape, device,
              [&] { return cuda::diffusion_step(args, stream_at(stream)); });
        });
  m.def("attention_workspace", [](int dtype, const std::array<std::int64_t, 5>& sizes) {
    return cuda::attention_workspace(DType(dtype), attention_shape(sizes));
  });
  m.def("attention_backward_workspace", [](int dtype, const std::array<std::int64_t, 5>& sizes) {
    return cuda::attention_backward_workspace(DType(dtype), attention_shape(sizes));
  });
  m.def(
      "attention",
      [](const py::object& q, const py::object& k, const py::object& v, const py::object& out, std::uintptr_t lse,
         int dtype, const std::array<std::int64_t, 5>& sizes, double scale, int device, std::uintptr_t stream,
         std::uintptr_t workspace) {
        const Attention args{heads_tensor(q), heads_tensor(k), heads_tensor(v),        heads_tensor(out),
                             pointer(lse),    DType(dtype),    attention_shape(sizes), scale};
        run("attention", args.dtype, args.shape, device,
            [&] { return cuda::attention(args, pointer(workspace), stream_at(stream)); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg("workspace") = 0);
  m.def(
      "attention_backward",
      [](const std::array<py::object, 5>& tensors, std::uintptr_t lse, const std::array<py::object, 3>& grads,
         int dtype, const std::array<std::int64_t, 5>& sizes, double scale, int device, std::uintptr_t stream,
         std::uintptr_t workspace) {
        const AttentionBackward args = attention_arguments(tensors, lse, grads, dtype, attention_shape(sizes), scale);
        run("attention_backward", args.dtype, args.shape, device,
            [&] { return cuda::attention_backward(args, pointer(workspace), stream_at(stream)); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("workspace") = 0);
  m.def("general_attention_workspace", [](int dtype, const std::array<std::int64_t, 7>& sizes) {
    return cuda::attention_workspace(DType(dtype), attention_shape(sizes));
  });
  m.def("general_attention_backward_workspace", [](int dtype, const std::array<std::int64_t, 7>& sizes) {
    return cuda::attention_backward_workspace(DType(dtype), attention_shape(sizes));
  });
  m.def(
      "general_attention",
      [](const py::object& q, const py::object& k, const py::object& v, const py::object& out, std::uintptr_t lse,
         int dtype, const std::array<std::int64_t, 7>& sizes, double scale, const py::tuple& options, int device,
         std::uintptr_t stream, std::uintptr_t workspace) {
        const Attention args{heads_tensor(q),        heads_tensor(k), heads_tensor(v),
                             heads_tensor(out),      pointer(lse),    DType(dtype),
                             attention_shape(sizes), scale,           attention_options(options)};
        run("general_attention", args.dtype, args.shape, device,
            [&] { return cuda::attention(args, pointer(workspace), stream_at(stream)); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg("workspace") = 0);
  m.def(
      "general_attention_backward",
      [](const std::array<py::object, 5>& tensors, std::uintptr_t lse, const std::array<py::object, 3>& grads,
         int dtype, const std::array<std::int64_t, 7>& sizes, double scale, const py::tuple& options, int device,
         std::uintptr_t stream, std::uintptr_t workspace) {
        const AttentionBackward args =
            attention_arguments(tensors, lse, grads, dtype, attention_shape(sizes), scale, attention_options(options));
        run("general_attention_backward", args.dtype, args.shape, device,
            [&] { return cuda::attention_backward(args, pointer(workspace), stream_at(stream)); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg("workspace") = 0);
  m.def("group_norm_workspace", [](int dtype, const py::tuple& shape, std::int64_t groups, bool channels_last) {
    return cuda::group_norm_workspace(DType(dtype), group_norm_shape(shape, groups, channels_last));
  });
  m.def("group_norm_backward_workspace",
        [](int dtype, const py::tuple& shape, std::int64_t groups, bool channels_last) {
          return cuda::group_norm_backward_workspace(DType(dtype), group_norm_shape(shape, groups, channels_last));
        });
  m.def(
      "group_norm",
      [](std::uintptr_t x, std::uintptr_t y, std::uintptr_t statistics, int dtype, const py::tuple& sizes,
         std::int64_t groups, bool channels_last, double eps, int activation, const py::tuple& values, int device,
         std::uintptr_t stream, std::uintptr_t workspace) {
        const GroupNormShape shape = group_norm_shape(sizes, groups, channels_last);
        const GroupNorm args = group_norm_arguments(x, y, statistics, dtype, shape, eps, activation, values);
        run("group_norm", DType(dtype), shape, device,
            [&] { return cuda::group_norm(args, pointer(workspace), stream_at(stream)); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg("workspace") = 0);
  m.def(
      "group_norm_backward",
      [](std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t statistics, int dtype, const py::tuple& sizes,
         std::int64_t groups, bool channels_last, int activation, const py::tuple& values,
         const std::array<std::uintptr_t, 6>& grads, int device, std::uintptr_t stream, std::uintptr_t workspace) {
        const GroupNormShape shape = group_norm_shape(sizes, groups, channels_last);
        const GroupNormBackward args =
            group_norm_arguments(grad_y, x, statistics, dtype, shape, activation, values, grads);
        run("group_norm_backward", DType(dtype), shape, device,
            [&] { return cuda::group_norm_backward(args, pointer(workspace), stream_at(stream)); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg("workspace") = 0);
  m.def("group_norm_jvp_workspace", [](int dtype, const py::tuple& shape, std::int64_t groups, bool channels_last) {
    return cuda::group_norm_jvp_workspace(DType(dtype), group_norm_shape(shape, groups, channels_last));
  });
  m.def("group_norm_double_backward_workspace", [](int dtype, const py::tuple& shape, std::int64_t groups,
                                                   bool channels_last) {
    return cuda::group_norm_double_backward_workspace(DType(dtype), group_norm_shape(shape, groups, channels_last));
  });
  m.def(
      "group_norm_jvp",
      [](std::uintptr_t x, std::uintptr_t d_y, std::uintptr_t statistics, int dtype, const py::tuple& sizes,
         std::int64_t groups, bool channels_last, int activation, const py::tuple& values, std::uintptr_t d_x,
         const py::tuple& d_values, int device, std::uintptr_t stream, std::uintptr_t workspace) {
        const GroupNormShape shape = group_norm_shape(sizes, groups, channels_last);
        const GroupNormJvp args = group_norm_jvp_arguments(x, d_y, statistics, dtype, shape, activation, values,
                                                           group_norm_direction(d_x, d_values));
        run("group_norm_jvp", DType(dtype), shape, device,
            [&] { return cuda::group_norm_jvp(args, pointer(workspace), stream_at(stream)); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg(), py::arg("workspace") = 0);
  m.def(
      "group_norm_double_backward",
      [](std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t statistics, int dtype, const py::tuple& sizes,
         std::int64_t groups, bool channels_last, int activation, const py::tuple& values, std::uintptr_t d_x,
         const py::tuple& d_values, const std::array<std::uintptr_t, 7>& grads, int device, std::uintptr_t stream,
         std::uintptr_t workspace) {
        const GroupNormShape shape = group_norm_shape(sizes, groups, channels_last);
        const GroupNormDoubleBackward args = group_norm_double_backward_arguments(
            grad_y, x, statistics, dtype, shape, activation, values, group_norm_direction(d_x, d_values), grads);
        run("group_norm_double_backward", DType(dtype), shape, device,
            [&] { return cuda::group_norm_double_backward(args, pointer(workspace), stream_at(stream)); });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg("workspace") = 0);
}
