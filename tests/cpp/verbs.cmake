# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# The verbs transport over tests/fake_verbs: what holds for every transport, and what only it has.
# verbs_program(NAME SOURCE...): tests of engines over NICs that are made of software.
function(verbs_program name)
  list(TRANSFORM ARGN PREPEND ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/)
  add_executable(${name} ${ARGN} $<TARGET_OBJECTS:doctest_main>)
  target_include_directories(${name} SYSTEM PRIVATE ${DOCTEST_INCLUDE_DIR})
  target_link_libraries(${name} PRIVATE kvxfer_engine fake_verbs)
endfunction()

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

  verbs_program(test_verbs test_verbs.cpp test_verbs_parts.cpp test_verbs_setup.cpp)
  add_test(NAME verbs COMMAND test_verbs)
  set_tests_properties(verbs PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake}")
  # But for what is said of the only port and device.
  add_test(NAME verbs_two_rails COMMAND test_verbs "-tce=*port that goes down ends*,*removing the device ends*")
  set_tests_properties(verbs_two_rails PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_two}")

  verbs_program(test_verbs_memory test_verbs_memory.cpp)
  add_test(NAME verbs_memory COMMAND test_verbs_memory)
  set_tests_properties(verbs_memory PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake}")
  add_test(NAME verbs_memory_two_rails COMMAND test_verbs_memory)
  set_tests_properties(verbs_memory_two_rails PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_two}")

  verbs_program(test_verbs_rails test_verbs_rails.cpp)
  add_test(NAME verbs_rails COMMAND test_verbs_rails)
  set_tests_properties(verbs_rails PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_two}")

  verbs_program(test_verbs_hostile test_verbs_hostile.cpp)
  add_test(NAME verbs_hostile COMMAND test_verbs_hostile)
  set_tests_properties(verbs_hostile PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake}")

  verbs_program(test_verbs_control test_verbs_control.cpp)
  add_test(NAME verbs_control COMMAND test_verbs_control)
  set_tests_properties(verbs_control PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_two}")
endif()
