// The probes for Python. Every argument that is a pointer there is an address here.
#include "probes.h"

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <type_traits>

namespace py = pybind11;

namespace {

template <class T>
using Argument = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T from_python(Argument<T> argument) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(argument);
  } else {
    return argument;
  }
}

void check(int error) {
  if (error != 0) throw std::runtime_error(probes::message(error));
}

template <class... Arguments>
void define(py::module_& m, const char* name, int (*function)(Arguments...)) {
  m.def(name, [function](Argument<Arguments>... arguments) { check(function(from_python<Arguments>(arguments)...)); });
}

}  // namespace

PYBIND11_MODULE(_probes, m) {
  define(m, "shuffle_int", probes::shuffle_int);
  define(m, "shuffle_float", probes::shuffle_float);
  define(m, "shuffle_double", probes::shuffle_double);
  define(m, "shuffle_halves", probes::shuffle_halves);
  define(m, "votes", probes::votes);
  define(m, "reductions", probes::reductions);
  define(m, "block_sum", probes::block_sum);
  define(m, "warp_sum", probes::warp_sum);
  define(m, "reverse", probes::reverse);
  define(m, "barrier_votes", probes::barrier_votes);
  m.def("indices", [](std::uintptr_t out, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z) {
    check(probes::indices(reinterpret_cast<int*>(out), {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}));
  });
  define(m, "copy_vectors", probes::copy_vectors);
  define(m, "pass_on", probes::pass_on);
  define(m, "atomics_int", probes::atomics_int);
  define(m, "atomic_sums", probes::atomic_sums);
  define(m, "matrix_product", probes::matrix_product);
  define(m, "copy_async", probes::copy_async);
  define(m, "to_halves", probes::to_halves);
  define(m, "from_halves", probes::from_halves);
  define(m, "integer_functions", probes::integer_functions);
  define(m, "float_functions", probes::float_functions);
  define(m, "square_roots", probes::square_roots);
  define(m, "launch_only", probes::launch_only);
}
