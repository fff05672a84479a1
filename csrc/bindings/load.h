// Values of the C++ API from Python's: an address from an int or None, a struct from a tuple of its fields.
#pragma once

#include <pybind11/pybind11.h>

#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>

#include "fields.h"

namespace gencore::bindings {

namespace py = pybind11;

// What a value is, for errors: the field of a struct that is an argument of a function.
struct Path {
  const Path* above;
  std::string_view name;

  std::string text() const {
    if (above == nullptr) return std::string(name);
    return above->text() + (above->above == nullptr ? ": " : ".") + std::string(name);
  }
};

template <class Exception>
[[noreturn]] void refuse(const Path& path, const std::string& wanted, PyObject* given) {
  throw Exception(path.text() + " must be " + wanted + ", got " + std::string(py::repr(given)));
}

template <std::same_as<bool> T>
T load(PyObject* given, const Path& path) {
  if (!PyBool_Check(given)) refuse<py::type_error>(path, "a bool", given);
  return given == Py_True;
}

template <std::floating_point T>
T load(PyObject* given, const Path& path) {
  if (!PyFloat_Check(given) && !PyLong_Check(given)) refuse<py::type_error>(path, "a float", given);
  const double value = PyFloat_AsDouble(given);
  if (value == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return static_cast<T>(value);
}

template <std::signed_integral T>
T load(PyObject* given, const Path& path) {
  if (!PyLong_Check(given)) refuse<py::type_error>(path, "an int", given);
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(given, &overflow);
  if (overflow != 0 || value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) {
    refuse<py::value_error>(path, "an int of " + std::to_string(8 * sizeof(T)) + " bits", given);
  }
  return static_cast<T>(value);
}

// The functions themselves say which of its values an enumeration has.
template <class T>
  requires std::is_enum_v<T>
T load(PyObject* given, const Path& path) {
  return static_cast<T>(load<std::underlying_type_t<T>>(given, path));
}

template <class T>
  requires std::is_pointer_v<T>
T load(PyObject* given, const Path& path) {
  if (given == Py_None) return nullptr;
  if (!PyLong_Check(given)) refuse<py::type_error>(path, "an address or None", given);
  const unsigned long long address = PyLong_AsUnsignedLongLong(given);
  if (address == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    refuse<py::value_error>(path, "an address", given);
  }
  return reinterpret_cast<T>(static_cast<std::uintptr_t>(address));
}

template <class T>
  requires std::is_aggregate_v<T>
T load(PyObject* given, const Path& path);

// Becomes whatever field it is put in the place of.
struct Field {
  PyObject* given;
  Path path;

  template <class T>
  operator T() const {
    return load<T>(given, path);
  }
};

template <class Struct>
Struct load_fields(PyObject* const* given, const Path& path) {
  return [&]<std::size_t... index>(std::index_sequence<index...>) {
    return Struct{Field{given[index], {&path, field_names<Struct>[index]}}...};
  }(std::make_index_sequence<field_count<Struct>>());
}

// None: the struct as it is where nothing is said.
template <class T>
  requires std::is_aggregate_v<T>
T load(PyObject* given, const Path& path) {
  if (given == Py_None) return T{};
  constexpr auto size = static_cast<Py_ssize_t>(field_count<T>);
  if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) != size) {
    refuse<py::type_error>(path, "None or a tuple of " + listed(field_names<T>), given);
  }
  PyObject* fields[field_count<T>];
  for (Py_ssize_t i = 0; i < size; ++i) fields[i] = PyTuple_GET_ITEM(given, i);
  return load_fields<T>(fields, path);
}

}  // namespace gencore::bindings
