# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# A build on a machine that has no headers of libibverbs: all of it is configured, and the one file that then differs is
# compiled and used.
add_test(NAME configured_without_verbs
         COMMAND ${CMAKE_COMMAND} -S ${PROJECT_SOURCE_DIR} -B ${CMAKE_CURRENT_BINARY_DIR}/without_verbs -G ${CMAKE_GENERATOR}
                 -DKVXFER_HAVE_VERBS_H= -DIBVERBS_INCLUDE_DIR= -DKVXFER_TESTS=ON -DKVXFER_PYTHON=OFF -DKVXFER_CUDA=OFF)
set(verbs_reason "infiniband/verbs.h was not found when kvxfer was built")
set_tests_properties(configured_without_verbs PROPERTIES TIMEOUT 120 FAIL_REGULAR_EXPRESSION "CMake Error"
                     PASS_REGULAR_EXPRESSION "RDMA verbs: left out: ${verbs_reason}.*Build files have been written")

# Before that of the same name in the library, which may have verbs.
add_executable(test_without_verbs ${CMAKE_CURRENT_LIST_DIR}/test_without_verbs.cpp ${PROJECT_SOURCE_DIR}/csrc/transport/registry.cpp
               $<TARGET_OBJECTS:doctest_main>)
target_include_directories(test_without_verbs SYSTEM PRIVATE ${DOCTEST_INCLUDE_DIR})
target_compile_definitions(test_without_verbs PRIVATE "KVXFER_VERBS_REASON=\"${verbs_reason}\"")
target_link_libraries(test_without_verbs PRIVATE kvxfer_engine)
add_test(NAME without_verbs COMMAND test_without_verbs)
set_tests_properties(without_verbs PROPERTIES TIMEOUT 60)
