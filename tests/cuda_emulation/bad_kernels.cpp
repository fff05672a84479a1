#include "bad_kernels.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

PYBIND11_MODULE(_bad_kernels, m) {
  m.def("run", [](const std::string& name, bool right, std::uintptr_t data, int n) {
    const int error = bad::run(name.c_str(), right, reinterpret_cast<float*>(data), n);
    if (error != 0) throw std::runtime_error(bad::message(error));
  });
}
