# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# How shm and cma join a session, with somebody else at the other end.
if(KVXFER_TEST_HOOKS)
  add_executable(test_join ${CMAKE_CURRENT_LIST_DIR}/test_join.cpp
    ${CMAKE_CURRENT_LIST_DIR}/test_join_server.cpp $<TARGET_OBJECTS:doctest_main>)
  target_include_directories(test_join PRIVATE ${DOCTEST_INCLUDE_DIR} ${PROJECT_SOURCE_DIR}/tests)
  target_link_libraries(test_join PRIVATE kvxfer_engine)
  add_test(NAME join COMMAND test_join)
  set_tests_properties(join PROPERTIES TIMEOUT 120)
endif()
