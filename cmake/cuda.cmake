# The CUDA kernels, the target gencore_cuda: where GENCORE_CUDA is "on", and where it is "auto" and there is an nvcc. Whether
# this machine has a GPU plays no part. gencore_cuda_state says in words what was decided.
string(TOLOWER "${GENCORE_CUDA}" gencore_cuda_wanted)
if(NOT gencore_cuda_wanted MATCHES "^(on|off|auto)$")
  message(FATAL_ERROR "GENCORE_CUDA must be on, off or auto, got ${GENCORE_CUDA}")
endif()

include(CheckLanguage)
if(gencore_cuda_wanted STREQUAL "off")
  set(gencore_cuda_state "it was built with GENCORE_CUDA=off")
  return()
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(gencore_cuda_wanted STREQUAL "on")
    message(FATAL_ERROR "GENCORE_CUDA=on needs nvcc, which was not found; CUDACXX=/path/to/nvcc says where it is")
  endif()
  set(gencore_cuda_state "nvcc was not found when it was built")
  return()
endif()

# Chosen below, for this project's targets alone.
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  if(gencore_cuda_wanted STREQUAL "on")
    message(FATAL_ERROR "GENCORE_CUDA=on needs nvcc 12.0 or later, found ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  message(WARNING "gencore: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0, so no CUDA kernels are built")
  set(gencore_cuda_state "nvcc was older than 12.0 when it was built")
  return()
endif()
if(NOT GENCORE_CUDA_ARCHITECTURES)
  # PTX of the newest serves later GPUs, which compile it when it is loaded.
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(GENCORE_CUDA_ARCHITECTURES 80-real 90)
  else()
    set(GENCORE_CUDA_ARCHITECTURES 80-real 90-real 100)
  endif()
endif()
list(JOIN GENCORE_CUDA_ARCHITECTURES " " gencore_cuda_architectures)
set(gencore_cuda_state "built by nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${gencore_cuda_architectures}")
message(STATUS "gencore: CUDA kernels for ${gencore_cuda_architectures}, by nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

find_package(CUDAToolkit REQUIRED)
list(TRANSFORM gencore_ops PREPEND csrc/cuda/ OUTPUT_VARIABLE cuda_sources)
list(TRANSFORM cuda_sources APPEND .cu)
add_library(gencore_cuda STATIC csrc/cuda/error.cu csrc/cuda/attention_bfloat16.cu csrc/cuda/attention_float16.cu
                                ${cuda_sources})
add_library(gencore::gencore_cuda ALIAS gencore_cuda)
set_target_properties(
  gencore_cuda PROPERTIES CUDA_ARCHITECTURES "${GENCORE_CUDA_ARCHITECTURES}" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
                          CUDA_RUNTIME_LIBRARY Static)
# Nothing is contracted, because the noise is defined operation by operation.
target_compile_options(gencore_cuda PRIVATE -fmad=false -Xcompiler=-Wall,-Wextra)
if(GENCORE_WERROR)
  target_compile_options(gencore_cuda PRIVATE -Werror=all-warnings)
endif()
target_include_directories(gencore_cuda PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include>
                                               $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(gencore_cuda PUBLIC CUDA::cudart_static)
