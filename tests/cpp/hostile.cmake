# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# What a hostile peer of the same user may do to shared memory, and over cma; with the peer and the host of the fuzz target.
add_executable(test_hostile ${CMAKE_CURRENT_LIST_DIR}/test_hostile.cpp ${CMAKE_CURRENT_LIST_DIR}/test_hostile_cma.cpp
               $<TARGET_OBJECTS:doctest_main>)
target_include_directories(test_hostile PRIVATE ${DOCTEST_INCLUDE_DIR} ${PROJECT_SOURCE_DIR}/tests)
target_link_libraries(test_hostile PRIVATE kvxfer_transport)
add_test(NAME hostile COMMAND test_hostile)
set_tests_properties(hostile PROPERTIES TIMEOUT 120)
