# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# The verbs transport with pushed writes, over one rail and over two.
if(KVXFER_WITH_VERBS)
  verbs_program(test_verbs_push test_verbs_push.cpp test_verbs_push_faults.cpp test_verbs_work.cpp test_verbs_stuck.cpp)
  set(on_fake "KVXFER_TEST_TRANSPORT=verbs;KVXFER_LIBIBVERBS=$<TARGET_FILE:fake_verbs>")
  foreach(num_rails 1 2)
    set(suffix "")
    if(num_rails EQUAL 2)
      set(suffix "_two_rails")
    endif()
    set(on_rails "${on_fake};KVXFER_FAKE_VERBS=devices=${num_rails}")
    add_test(NAME verbs_push${suffix} COMMAND test_verbs_push)
    # What holds for every transport.
    add_test(NAME transfer_verbs_push${suffix} COMMAND test_transfer)
    set_tests_properties(verbs_push${suffix} transfer_verbs_push${suffix} PROPERTIES TIMEOUT 300
                         ENVIRONMENT "${on_rails}")
    set_property(TEST transfer_verbs_push${suffix} APPEND PROPERTY ENVIRONMENT "KVXFER_TEST_VERBS_PUSH=1")
    # And what is endured when everything goes wrong; but for what is said of addresses, and of a write that a READ holds.
    add_test(NAME verbs_push_endured${suffix}
             COMMAND test_verbs_faults "-tce=*every kind of address*,*a link that goes*")
    set_tests_properties(verbs_push_endured${suffix} PROPERTIES TIMEOUT 300
                         ENVIRONMENT "${on_rails};KVXFER_TEST_VERBS_PUSH=1")
  endforeach()
endif()
