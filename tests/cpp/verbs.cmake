# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# The verbs transport over tests/fake_verbs: what holds for every transport, and what only it has.
if(KVXFER_WITH_VERBS)
  set(on_fake "KVXFER_TEST_TRANSPORT=verbs;KVXFER_LIBIBVERBS=$<TARGET_FILE:fake_verbs>")
  add_test(NAME transfer_verbs COMMAND test_transfer)
  # From memory that no peer may read: in messages.
  add_test(NAME transfer_verbs_never COMMAND test_transfer)
  # Regions that are still registered in the background when the first requests come.
  add_test(NAME transfer_verbs_background COMMAND test_transfer)
  set_tests_properties(transfer_verbs_background PROPERTIES TIMEOUT 300
                       ENVIRONMENT "${on_fake};KVXFER_TEST_BACKGROUND=1")
  set_tests_properties(transfer_verbs PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake}")
  set_tests_properties(transfer_verbs_never PROPERTIES TIMEOUT 300
                       ENVIRONMENT "${on_fake};KVXFER_TEST_SHARE=never")
  if(TARGET test_hooks)
    add_test(NAME hooks_verbs COMMAND test_hooks)
    set_tests_properties(hooks_verbs PROPERTIES TIMEOUT 120 ENVIRONMENT "${on_fake}")
  endif()

  # The same over two rails.
  set(on_two "${on_fake};KVXFER_FAKE_VERBS=devices=2")
  add_test(NAME transfer_verbs_two_rails COMMAND test_transfer)
  set_tests_properties(transfer_verbs_two_rails PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_two}")

  add_executable(test_verbs ${CMAKE_CURRENT_LIST_DIR}/test_verbs.cpp
                 ${CMAKE_CURRENT_LIST_DIR}/test_verbs_parts.cpp $<TARGET_OBJECTS:doctest_main>)
  target_include_directories(test_verbs SYSTEM PRIVATE ${DOCTEST_INCLUDE_DIR})
  target_link_libraries(test_verbs PRIVATE kvxfer_engine fake_verbs)
  add_test(NAME verbs COMMAND test_verbs)
  set_tests_properties(verbs PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake}")
  # But for what is said of the only port and device.
  add_test(NAME verbs_two_rails COMMAND test_verbs "-tce=*port that goes down ends*,*removing the device ends*")
  set_tests_properties(verbs_two_rails PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_two}")

  add_executable(test_verbs_memory ${CMAKE_CURRENT_LIST_DIR}/test_verbs_memory.cpp $<TARGET_OBJECTS:doctest_main>)
  target_include_directories(test_verbs_memory SYSTEM PRIVATE ${DOCTEST_INCLUDE_DIR})
  target_link_libraries(test_verbs_memory PRIVATE kvxfer_engine fake_verbs)
  add_test(NAME verbs_memory COMMAND test_verbs_memory)
  set_tests_properties(verbs_memory PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake}")
  add_test(NAME verbs_memory_two_rails COMMAND test_verbs_memory)
  set_tests_properties(verbs_memory_two_rails PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_two}")

  add_executable(test_verbs_rails ${CMAKE_CURRENT_LIST_DIR}/test_verbs_rails.cpp $<TARGET_OBJECTS:doctest_main>)
  target_include_directories(test_verbs_rails SYSTEM PRIVATE ${DOCTEST_INCLUDE_DIR})
  target_link_libraries(test_verbs_rails PRIVATE kvxfer_engine fake_verbs)
  add_test(NAME verbs_rails COMMAND test_verbs_rails)
  set_tests_properties(verbs_rails PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_two}")

  add_executable(test_verbs_hostile ${CMAKE_CURRENT_LIST_DIR}/test_verbs_hostile.cpp $<TARGET_OBJECTS:doctest_main>)
  target_include_directories(test_verbs_hostile SYSTEM PRIVATE ${DOCTEST_INCLUDE_DIR})
  target_link_libraries(test_verbs_hostile PRIVATE kvxfer_engine fake_verbs)
  add_test(NAME verbs_hostile COMMAND test_verbs_hostile)
  set_tests_properties(verbs_hostile PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake}")

  add_executable(test_verbs_control ${CMAKE_CURRENT_LIST_DIR}/test_verbs_control.cpp $<TARGET_OBJECTS:doctest_main>)
  target_include_directories(test_verbs_control SYSTEM PRIVATE ${DOCTEST_INCLUDE_DIR})
  target_link_libraries(test_verbs_control PRIVATE kvxfer_engine fake_verbs)
  add_test(NAME verbs_control COMMAND test_verbs_control)
  set_tests_properties(verbs_control PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_two}")
endif()
