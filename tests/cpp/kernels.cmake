# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
add_executable(test_kernels ${CMAKE_CURRENT_LIST_DIR}/test_kernels.cpp ${CMAKE_CURRENT_LIST_DIR}/kernels_isa_wide.cpp)
target_include_directories(test_kernels PRIVATE ${DOCTEST_INCLUDE_DIR})
target_link_libraries(test_kernels PRIVATE kvxfer_kernels_cpu)
if(KVXFER_SANITIZE)  # as csrc/kernels/cpu says
  set(wide_level -O0)
else()
  set(wide_level -O1)
endif()
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_isa_wide.cpp
  PROPERTIES COMPILE_OPTIONS "${wide_level};-g1;-Wno-psabi")
add_test(NAME kernels COMMAND test_kernels)
set_tests_properties(kernels PROPERTIES TIMEOUT 120)

option(KVXFER_CUDA_SHIM "Test the CUDA kernels' own sources on the CPU" ON)
# The CUDA sources run on the CPU: one thread that switches stacks, which TSan has nothing to say on.
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  message(STATUS "kvxfer: tests of the CUDA kernels on the CPU: left out: their fibers are written for x86-64")
elseif(KVXFER_CUDA_SHIM AND NOT KVXFER_SANITIZE MATCHES "thread")
  add_subdirectory(${CMAKE_CURRENT_LIST_DIR}/cuda_shim)
endif()
