// CUDA's vector types, with CUDA's sizes and alignments.
#pragma once

#define GENCORE_VECTOR_1_TO_4(type, name, align2, align4)                                                    \
  struct name##1 { type x; };                                                                                \
  struct alignas(align2) name##2 { type x, y; };                                                             \
  struct name##3 { type x, y, z; };                                                                          \
  struct alignas(align4) name##4 { type x, y, z, w; };                                                       \
  inline __attribute__((always_inline)) name##1 make_##name##1(type x) { return {x}; }                       \
  inline __attribute__((always_inline)) name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline __attribute__((always_inline)) name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline __attribute__((always_inline)) name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

GENCORE_VECTOR_1_TO_4(signed char, char, 2, 4)
GENCORE_VECTOR_1_TO_4(unsigned char, uchar, 2, 4)
GENCORE_VECTOR_1_TO_4(short, short, 4, 8)
GENCORE_VECTOR_1_TO_4(unsigned short, ushort, 4, 8)
GENCORE_VECTOR_1_TO_4(int, int, 8, 16)
GENCORE_VECTOR_1_TO_4(unsigned int, uint, 8, 16)
GENCORE_VECTOR_1_TO_4(long long, longlong, 16, 16)
GENCORE_VECTOR_1_TO_4(unsigned long long, ulonglong, 16, 16)
GENCORE_VECTOR_1_TO_4(float, float, 8, 16)
GENCORE_VECTOR_1_TO_4(double, double, 16, 16)

#undef GENCORE_VECTOR_1_TO_4

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
