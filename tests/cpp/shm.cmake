# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
add_executable(test_shm ${CMAKE_CURRENT_LIST_DIR}/test_shm.cpp ${CMAKE_CURRENT_LIST_DIR}/test_copy_pool.cpp
               ${CMAKE_CURRENT_LIST_DIR}/test_reactor.cpp)
target_link_libraries(test_shm PRIVATE kvxfer_transport)
target_include_directories(test_shm PRIVATE ${DOCTEST_INCLUDE_DIR})
add_test(NAME shm COMMAND test_shm)
