// The functions of CUDA's runtime API, and those that tests call.
#include <algorithm>
#include <cstring>
#include <map>

#include "cuda_runtime_api.h"
#include "memory.h"
#include "module.h"
#include "state.h"

using gencore_emulation::emulator;
using gencore_emulation::Emulator;

namespace {

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};

constexpr ErrorText error_texts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};

// The whole story of the last fault of each kind.
std::map<int, std::string>& stories() {
  static auto* const gencore_emulation_stories = new std::map<int, std::string>;
  return *gencore_emulation_stories;
}

}  // namespace

void gencore_emulation::remember_error(int error, std::string message) { stories()[error] = std::move(message); }

const char* cudaGetErrorString(cudaError_t error) {
  const auto story = stories().find(error);
  if (story != stories().end()) return story->second.c_str();
  for (const ErrorText& text : error_texts) {
    if (text.error == error) return text.text;
  }
  return "unrecognized error code";
}

const char* cudaGetErrorName(cudaError_t error) {
  for (const ErrorText& text : error_texts) {
    if (text.error == error) return text.name;
  }
  return "unrecognized error code";
}

// On a device, a fault of a kernel stays until the process ends. Here the next test can go on.
cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator().last_error;
  emulator().last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return emulator().last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7FFFFFFF; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = gencore_emulation::usual_shared_bytes; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrMultiProcessorCount: *value = emulator().multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(emulator().shared_limit); break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t) {
  if (!gencore_emulation::is_registered(address, bytes)) return emulator().last_error = cudaErrorInvalidValue;
  std::memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<std::size_t>(value) > emulator().shared_limit) {
    return emulator().last_error = cudaErrorInvalidValue;
  }
  emulator().shared_limits[kernel] = static_cast<std::size_t>(value);
  return cudaSuccess;
}

// Static shared memory has a place of its own here, and counts for nothing.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int block_size, std::size_t) {
  *blocks = 2048 / block_size;
  return cudaSuccess;
}

// For tests, by ctypes.
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void register_buffer(const void* address, std::size_t bytes, const char* name) {
  gencore_emulation::register_memory(address, bytes, name);
}

EXPORTED void clear_buffers() { gencore_emulation::clear_memory(); }

// 0: blocks and threads run in order. Else they run in an order drawn at random from this seed.
EXPORTED void set_schedule(unsigned seed) { emulator().schedule = seed; }

EXPORTED void set_blocks(std::int64_t first, std::int64_t count) {
  emulator().first_block = first;
  emulator().block_count = count;
}

EXPORTED void set_multiprocessors(int count) { emulator().multiprocessors = count; }

// At most what the largest device has, 227 KiB, which it is at first.
EXPORTED void set_shared_memory(std::size_t bytes) {
  emulator().shared_limit = std::min(bytes, gencore_emulation::most_shared_bytes);
}
