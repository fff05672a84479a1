// What the CUDA functions of the API share. It needs no CUDA header.
//
// They take addresses in the memory of the current device and a stream of it, launch their kernels there and return at
// once: they neither synchronise nor allocate, so that they can be captured in a graph.
#pragma once

struct CUstream_st;

namespace gencore::cuda {

using Stream = CUstream_st*;  // a cudaStream_t

using Error = int;  // a cudaError_t; 0 is success

// Whether there is code for the current device: looks for a kernel and launches nothing.
Error probe();

// The name and the description of an error.
const char* name(Error error);
const char* message(Error error);

}  // namespace gencore::cuda
