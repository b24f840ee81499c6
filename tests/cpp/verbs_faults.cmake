# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# Whole engines over software NICs on which everything goes wrong that can.
if(TARGET fake_verbs AND KVXFER_WITH_VERBS)
  verbs_program(test_verbs_faults test_verbs_faults.cpp)
  add_test(NAME verbs_faults COMMAND test_verbs_faults)
  set(on_fake "KVXFER_TEST_TRANSPORT=verbs;KVXFER_LIBIBVERBS=$<TARGET_FILE:fake_verbs>")
  set_tests_properties(verbs_faults PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake}")
  # Over two rails, but for what is said of the only device.
  add_test(NAME verbs_faults_two_rails COMMAND test_verbs_faults "-tce=*every kind of address*")
  set_tests_properties(verbs_faults_two_rails PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake};KVXFER_FAKE_VERBS=devices=2")
endif()
