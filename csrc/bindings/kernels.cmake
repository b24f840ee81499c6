# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
pybind11_add_module(_kernels_cpu MODULE kernels_cpu.cpp kernels_cpu_copy.cpp host_array.cpp errors.cpp)
target_link_libraries(_kernels_cpu PRIVATE kvxfer_kernels_cpu)
target_compile_definitions(_kernels_cpu PRIVATE
  KVXFER_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  KVXFER_BUILT_WITH_CUDA=$<BOOL:${KVXFER_WITH_CUDA}>
  KVXFER_BUILT_WITHOUT_CUDA_REASON="${KVXFER_CUDA_REASON}")
install(TARGETS _kernels_cpu LIBRARY DESTINATION kvxfer COMPONENT kernels_cpu)

if(TARGET kvxfer_kernels_cuda)
  pybind11_add_module(_kernels_cuda MODULE kernels_cuda.cpp errors.cpp)
  target_link_libraries(_kernels_cuda PRIVATE kvxfer_kernels_cuda kvxfer_common)
  install(TARGETS _kernels_cuda LIBRARY DESTINATION kvxfer COMPONENT kernels_cuda)
endif()
