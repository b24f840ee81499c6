# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# Reads that the reader does by itself: the words alone, then both ways of reaching the memory.
add_executable(test_direct ${CMAKE_CURRENT_LIST_DIR}/test_direct.cpp $<TARGET_OBJECTS:doctest_main>)
target_include_directories(test_direct PRIVATE ${DOCTEST_INCLUDE_DIR})
target_link_libraries(test_direct PRIVATE kvxfer_engine)
add_test(NAME direct COMMAND test_direct)
set_tests_properties(direct PROPERTIES TIMEOUT 120)
