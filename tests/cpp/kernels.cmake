# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
add_executable(test_kernels ${CMAKE_CURRENT_LIST_DIR}/test_kernels.cpp ${CMAKE_CURRENT_LIST_DIR}/kernels_isa_wide.cpp)
target_include_directories(test_kernels PRIVATE ${DOCTEST_INCLUDE_DIR})
target_link_libraries(test_kernels PRIVATE kvxfer_kernels_cpu)
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_isa_wide.cpp PROPERTIES COMPILE_OPTIONS "-O1;-Wno-psabi")
add_test(NAME kernels COMMAND test_kernels)
set_tests_properties(kernels PROPERTIES TIMEOUT 120)
