# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
add_executable(test_transfer test_common.cpp test_wire.cpp test_spans.cpp test_tcp_pair.cpp main.cpp)
target_include_directories(test_transfer PRIVATE ${DOCTEST_INCLUDE_DIR})
target_link_libraries(test_transfer PRIVATE kvxfer_engine)
add_test(NAME transfer COMMAND test_transfer)
set_tests_properties(transfer PROPERTIES TIMEOUT 120)
