// What C++20 can tell of a plain struct: how many fields it has, where they are, and how they are called. So the binder
// needs no list of them beside the struct.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

namespace gencore::bindings {

// Stands for a value of any type, where the question is only whether one fits.
struct Anything {
  template <class T>
  operator T() const;
};

template <class Struct, std::size_t... index>
consteval bool takes(std::index_sequence<index...>) {
  return requires { Struct{(static_cast<void>(index), Anything{})...}; };
}

template <class Struct, std::size_t n = 0>
consteval std::size_t count_fields() {
  if constexpr (takes<Struct>(std::make_index_sequence<n + 1>())) {
    return count_fields<Struct, n + 1>();
  } else {
    return n;
  }
}

template <class Struct>
inline constexpr std::size_t field_count = count_fields<Struct>();

template <class... Field>
constexpr std::tuple<const Field*...> addresses(const Field&... field) {
  return {&field...};
}

// Where the fields of `x` are. A structured binding says how many names it makes, so there is one for each number.
template <class Struct>
constexpr auto field_addresses(const Struct& x) {
#define GENCORE_FIELDS(number, ...)                 \
  if constexpr (field_count<Struct> == number) {    \
    [[maybe_unused]] const auto& [__VA_ARGS__] = x; \
    return addresses(__VA_ARGS__);                  \
  } else
  GENCORE_FIELDS(1, a)
  GENCORE_FIELDS(2, a, b)
  GENCORE_FIELDS(3, a, b, c)
  GENCORE_FIELDS(4, a, b, c, d)
  GENCORE_FIELDS(5, a, b, c, d, e)
  GENCORE_FIELDS(6, a, b, c, d, e, f)
  GENCORE_FIELDS(7, a, b, c, d, e, f, g)
  GENCORE_FIELDS(8, a, b, c, d, e, f, g, h)
  GENCORE_FIELDS(9, a, b, c, d, e, f, g, h, i)
  GENCORE_FIELDS(10, a, b, c, d, e, f, g, h, i, j)
  GENCORE_FIELDS(11, a, b, c, d, e, f, g, h, i, j, k)
  GENCORE_FIELDS(12, a, b, c, d, e, f, g, h, i, j, k, l)
  GENCORE_FIELDS(13, a, b, c, d, e, f, g, h, i, j, k, l, m)
  GENCORE_FIELDS(14, a, b, c, d, e, f, g, h, i, j, k, l, m, n)
  GENCORE_FIELDS(15, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o)
  GENCORE_FIELDS(16, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)
  GENCORE_FIELDS(17, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q)
  GENCORE_FIELDS(18, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r)
  GENCORE_FIELDS(19, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s)
  GENCORE_FIELDS(20, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t)
  GENCORE_FIELDS(21, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u)
  GENCORE_FIELDS(22, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v)
  GENCORE_FIELDS(23, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w)
  GENCORE_FIELDS(24, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, y) {
    static_assert(field_count<Struct> == 0, "no struct has more fields: write one line more");
  }
#undef GENCORE_FIELDS
}

#ifdef __clang__
#pragma clang diagnostic ignored "-Wundefined-var-template"
#endif
// An object that is nowhere: only its fields' addresses are spoken of.
template <class Struct>
struct Example {
  static const Example object;
  Struct value;
};

// A template takes the address of a part of an object only inside of a class.
template <class Pointer>
struct Held {
  constexpr explicit Held(Pointer given) : pointer(given) {}
  Pointer pointer;
};

// The compiler's words for this function, which end in those for the field: "...Reparameterize::mu)}]".
template <class Struct, Held field>
consteval auto words() {
  return std::string_view(__PRETTY_FUNCTION__);
}

consteval bool is_in_name(char c) {
  return c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

consteval std::string_view last_name(std::string_view text) {
  std::size_t end = text.size();
  while (end > 0 && !is_in_name(text[end - 1])) --end;
  std::size_t begin = end;
  while (begin > 0 && is_in_name(text[begin - 1])) --begin;
  return text.substr(begin, end - begin);
}

template <class Struct>
consteval std::array<std::string_view, field_count<Struct>> name_fields() {
  return []<std::size_t... index>(std::index_sequence<index...>) {
    return std::array<std::string_view, sizeof...(index)>{
        last_name(words<Struct, Held{std::get<index>(field_addresses(Example<Struct>::object.value))}>())...};
  }(std::make_index_sequence<field_count<Struct>>());
}

template <class Struct>
inline constexpr auto field_names = name_fields<Struct>();

// For messages.
template <class Names>
std::string listed(const Names& names) {
  std::string text;
  for (const std::string_view name : names) {
    if (!text.empty()) text += ", ";
    text += name;
  }
  return text;
}

// A compiler with other words would give wrong names: it is not to get through.
struct Probe {
  struct Inner {
    double x;
  };
  const void* first;
  Inner second_2;
  int Third = 3;
};
static_assert(field_names<Probe> == std::array<std::string_view, 3>{"first", "second_2", "Third"});

}  // namespace gencore::bindings
