# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
add_executable(test_transfer test_common.cpp test_wire.cpp test_spans.cpp test_engine_pair.cpp test_parked.cpp
               $<TARGET_OBJECTS:doctest_main>)
target_include_directories(test_transfer PRIVATE ${DOCTEST_INCLUDE_DIR})
target_link_libraries(test_transfer PRIVATE kvxfer_engine)
add_test(NAME transfer COMMAND test_transfer)
set_tests_properties(transfer PROPERTIES TIMEOUT 120)
# The same over shared memory: mapped, and staged as for memory that peers may not map.
add_test(NAME transfer_shm COMMAND test_transfer)
set_tests_properties(transfer_shm PROPERTIES TIMEOUT 120 ENVIRONMENT "KVXFER_TEST_TRANSPORT=shm")
add_test(NAME transfer_shm_staged COMMAND test_transfer)
set_tests_properties(transfer_shm_staged PROPERTIES TIMEOUT 120
                     ENVIRONMENT "KVXFER_TEST_TRANSPORT=shm;KVXFER_TEST_SHARE=never")
# And with threads that copy beside the progress thread.
add_test(NAME transfer_shm_pool COMMAND test_transfer)
set_tests_properties(transfer_shm_pool PROPERTIES TIMEOUT 120
                     ENVIRONMENT "KVXFER_TEST_TRANSPORT=shm;KVXFER_TEST_COPY_THREADS=4")
add_test(NAME transfer_shm_staged_pool COMMAND test_transfer)
set_tests_properties(transfer_shm_staged_pool PROPERTIES TIMEOUT 120
                     ENVIRONMENT "KVXFER_TEST_TRANSPORT=shm;KVXFER_TEST_SHARE=never;KVXFER_TEST_COPY_THREADS=4")
add_test(NAME transfer_cma COMMAND test_transfer)
set_tests_properties(transfer_cma PROPERTIES TIMEOUT 120 ENVIRONMENT "KVXFER_TEST_TRANSPORT=cma")
