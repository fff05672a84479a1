# The CUDA kernels, the target gencore_cuda. GENCORE_CUDA says where: "on"; "off"; or "auto", where there is an nvcc and
# either a GPU, for which alone they are then built, or a choice of GPUs in GENCORE_CUDA_ARCHITECTURES.
# gencore_cuda_state says in words what was decided and why.
string(TOLOWER "${GENCORE_CUDA}" gencore_cuda_wanted)
if(NOT gencore_cuda_wanted MATCHES "^(on|off|auto)$")
  message(FATAL_ERROR "GENCORE_CUDA must be on, off or auto, got ${GENCORE_CUDA}")
endif()

# Ends this file: no CUDA kernels are built.
macro(gencore_without_cuda reason)
  set(gencore_cuda_state "${reason}")
  message(STATUS "gencore: no CUDA kernels: ${reason}")
  return()
endmacro()

# The architectures of the GPUs that the driver shows, and none if it does not answer: a broken one fails, or waits.
function(gencore_find_gpus result)
  set(${result} "" PARENT_SCOPE)
  # WSL keeps it beside the driver.
  find_program(GENCORE_NVIDIA_SMI nvidia-smi PATHS /usr/lib/wsl/lib)
  mark_as_advanced(GENCORE_NVIDIA_SMI)
  if(NOT GENCORE_NVIDIA_SMI)
    return()
  endif()
  execute_process(
    COMMAND "${GENCORE_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
    TIMEOUT 30
    RESULT_VARIABLE status
    OUTPUT_VARIABLE said
    ERROR_QUIET)
  if(NOT status EQUAL 0)
    return()
  endif()
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" found "${said}")
  list(TRANSFORM found REPLACE "\\." "")
  list(REMOVE_DUPLICATES found)
  list(SORT found COMPARE NATURAL)
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

if(gencore_cuda_wanted STREQUAL "off")
  gencore_without_cuda("it was built with GENCORE_CUDA=off")
endif()
set(gencore_gpus "")
if(gencore_cuda_wanted STREQUAL "auto" AND NOT GENCORE_CUDA_ARCHITECTURES)
  gencore_find_gpus(gencore_gpus)
  if(NOT gencore_gpus)
    gencore_without_cuda("no GPU was seen when it was built (GENCORE_CUDA=on builds it)")
  endif()
  list(FILTER gencore_gpus EXCLUDE REGEX "^[0-7].$")
  if(NOT gencore_gpus)
    gencore_without_cuda("no GPU of compute capability 8.0 or later was seen when it was built")
  endif()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(gencore_cuda_wanted STREQUAL "on")
    message(FATAL_ERROR "GENCORE_CUDA=on needs nvcc, which was not found; CUDACXX=/path/to/nvcc says where it is")
  endif()
  gencore_without_cuda("nvcc was not found when it was built")
endif()

# Chosen below, for this project's targets alone.
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  if(gencore_cuda_wanted STREQUAL "on")
    message(FATAL_ERROR "GENCORE_CUDA=on needs nvcc 12.0 or later, found ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  gencore_without_cuda("nvcc was older than 12.0, ${CMAKE_CUDA_COMPILER_VERSION}, when it was built")
endif()
if(gencore_gpus)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known)
  foreach(gpu IN LISTS gencore_gpus)
    # One that this nvcc does not know is served by PTX, below.
    if(NOT known MATCHES "compute_${gpu}[^0-9]")
      set(gencore_gpus "")
      break()
    endif()
  endforeach()
  set(GENCORE_CUDA_ARCHITECTURES ${gencore_gpus})
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
                                csrc/cuda/attention_general.cu csrc/cuda/attention_second.cu
                                csrc/cuda/group_norm_second.cu
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
