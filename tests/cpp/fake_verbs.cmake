# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# What the software NICs promise: each property of a reliable connection that kvxfer relies on.
if(TARGET fake_verbs)
  file(GLOB fake_verbs_tests CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/test_fake_verbs*.cpp)
  add_executable(test_fake_verbs ${fake_verbs_tests} $<TARGET_OBJECTS:doctest_main>)
  target_include_directories(test_fake_verbs SYSTEM PRIVATE ${DOCTEST_INCLUDE_DIR})
  target_link_libraries(test_fake_verbs PRIVATE kvxfer_options fake_verbs)
  # Hundreds of assertions, whose templates take minutes to compile under sanitizers otherwise.
  target_compile_definitions(test_fake_verbs PRIVATE DOCTEST_CONFIG_SUPER_FAST_ASSERTS)
  target_compile_options(test_fake_verbs PRIVATE -O1)
  add_test(NAME fake_verbs COMMAND test_fake_verbs)
  set_tests_properties(fake_verbs PROPERTIES TIMEOUT 180)
endif()
