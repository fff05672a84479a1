// The binder: a function of the C++ API becomes one of Python that takes the fields of its struct by name.
//
//   bind<&cpu::add_noise, Cpu>(m, "add_noise")   ->   add_noise(*, x0, x_t, noise, dtype, shape, table, key, place)
//   bind_struct<NoiseShape>(m, "NoiseShape")     ->   NoiseShape(*, samples, draws, elements, channels): a tuple
//
// Every argument must be given, and by name, which costs no more than giving it by place: nothing can be confused.
// Values are loaded as load.h says. A kernel that has no struct can be given one by a function around it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fields.h"
#include "load.h"

namespace gencore::bindings {

// A C++ exception as one of Python, where pybind11 does not stand between.
template <class Body>
PyObject* guarded(Body&& body) noexcept {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A function of Python's: its names, and what finds the arguments of a call by them. It lives as long as the process.
class Signature {
 public:
  using Call = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);

  // Defines the function in the module.
  template <class Names>
  static void define(py::module_& m, const char* function, const Names& names, Call call) {
    const py::object module_name = m.attr("__name__");
    auto* const signature = new Signature(module_name.cast<std::string>() + "." + function, names);
    signature->doc_.insert(0, function);
    // Python calls it as METH_FASTCALL says, whatever the type of a pointer in a PyMethodDef.
    signature->method_ = {function, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                          METH_FASTCALL | METH_KEYWORDS, signature->doc_.c_str()};
    const py::capsule self(signature);
    m.add_object(function, py::reinterpret_steal<py::object>(
                               PyCFunction_NewEx(&signature->method_, self.ptr(), module_name.ptr())));
  }

  // What Python calls the function with first.
  static const Signature& of(PyObject* self) {
    return *static_cast<const Signature*>(PyCapsule_GetPointer(self, nullptr));
  }

  Path path() const { return {nullptr, path_}; }

  // The arguments of a call in the order of the names.
  void order(PyObject* const* values, Py_ssize_t positional, PyObject* keywords, PyObject** ordered) const {
    if (positional != 0) throw py::type_error(path_ + ": arguments are given by name");
    std::fill_n(ordered, names_.size(), nullptr);
    const std::size_t count = keywords == nullptr ? 0 : static_cast<std::size_t>(PyTuple_GET_SIZE(keywords));
    for (std::size_t i = 0; i < count; ++i) {
      PyObject* const name = PyTuple_GET_ITEM(keywords, static_cast<Py_ssize_t>(i));
      ordered[index_of(name, i)] = values[i];
    }
    for (std::size_t i = 0; i < names_.size(); ++i) {
      if (ordered[i] == nullptr) throw py::type_error(path_ + ": " + std::string(py::str(names_[i])) + " is missing");
    }
  }

 private:
  template <class Names>
  Signature(std::string path, const Names& names)
      : path_(std::move(path)), all_(listed(names)), doc_("(*, " + all_ + ")\n--\n\n") {
    for (const std::string_view name : names) {
      names_.push_back(PyUnicode_FromStringAndSize(name.data(), static_cast<Py_ssize_t>(name.size())));
      if (names_.back() == nullptr) throw py::error_already_set();
      PyUnicode_InternInPlace(&names_.back());
    }
  }

  // As a rule arguments stand in their order, and their names are interned as ours are.
  std::size_t index_of(PyObject* name, std::size_t guess) const {
    if (guess < names_.size() && names_[guess] == name) return guess;
    auto found = std::find(names_.begin(), names_.end(), name);
    if (found == names_.end()) {
      found =
          std::find_if(names_.begin(), names_.end(), [&](PyObject* own) { return PyUnicode_Compare(own, name) == 0; });
    }
    if (found != names_.end()) return static_cast<std::size_t>(found - names_.begin());
    throw py::type_error(path_ + ": no argument is called " + std::string(py::str(name)) + "; there are " + all_);
  }

  std::string path_, all_, doc_;
  std::vector<PyObject*> names_;
  PyMethodDef method_{};
};

template <class Struct>
void bind_struct(py::module_& m, const char* name) {
  static constexpr std::size_t size = field_count<Struct>;
  const auto call = [](PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* keywords) {
    return guarded([&] {
      PyObject* fields[size];
      Signature::of(self).order(values, positional, keywords, fields);
      PyObject* const made = PyTuple_New(static_cast<Py_ssize_t>(size));
      if (made == nullptr) throw py::error_already_set();
      for (std::size_t i = 0; i < size; ++i) {
        Py_INCREF(fields[i]);
        PyTuple_SET_ITEM(made, static_cast<Py_ssize_t>(i), fields[i]);
      }
      return made;
    });
  };
  Signature::define(m, name, field_names<Struct>, call);
}

template <class Result, class Args, class... Others>
Args arguments_of(Result (*)(const Args&, Others...));

// `Backend` has a type Place, of the last argument, and runs kernels: run(path, kernel, args, place).
template <auto kernel, class Backend>
void bind(py::module_& m, const char* name) {
  using Args = decltype(arguments_of(kernel));
  static constexpr std::size_t size = field_count<Args>;
  static constexpr std::string_view place = "place";
  std::array<std::string_view, size + 1> names{};
  std::copy_n(field_names<Args>.begin(), size, names.begin());
  names[size] = place;
  const auto call = [](PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* keywords) {
    return guarded([&]() -> PyObject* {
      PyObject* given[size + 1];
      const Signature& signature = Signature::of(self);
      signature.order(values, positional, keywords, given);
      const Path path = signature.path();
      const auto args = load_fields<Args>(given, path);
      Backend::run(path, kernel, args, load<typename Backend::Place>(given[size], {&path, place}));
      Py_RETURN_NONE;
    });
  };
  Signature::define(m, name, names, call);
}

}  // namespace gencore::bindings
