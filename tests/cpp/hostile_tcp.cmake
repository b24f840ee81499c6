# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# What an authenticated tcp peer may do to an engine by what it says after the handshake.
add_executable(test_hostile_tcp ${CMAKE_CURRENT_LIST_DIR}/test_hostile_tcp.cpp ${CMAKE_CURRENT_LIST_DIR}/test_hostile_tcp_replies.cpp
               ${CMAKE_CURRENT_LIST_DIR}/test_hostile_tcp_looks.cpp
               $<TARGET_OBJECTS:doctest_main>)
target_include_directories(test_hostile_tcp PRIVATE ${DOCTEST_INCLUDE_DIR} ${PROJECT_SOURCE_DIR}/tests)
target_link_libraries(test_hostile_tcp PRIVATE kvxfer_engine)
add_test(NAME hostile_tcp COMMAND test_hostile_tcp)
set_tests_properties(hostile_tcp PROPERTIES TIMEOUT 180)
