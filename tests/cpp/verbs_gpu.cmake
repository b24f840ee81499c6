# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# A GPU's memory over verbs: software NICs, and GPUs whose memory no CPU can touch (tests/fake_cuda).
if(KVXFER_WITH_VERBS)
  verbs_program(test_verbs_gpu test_verbs_gpu.cpp test_verbs_gpu_refused.cpp test_verbs_nearness.cpp)
  target_link_libraries(test_verbs_gpu PRIVATE fake_cuda)
  set(on_fake "KVXFER_TEST_TRANSPORT=verbs;KVXFER_LIBIBVERBS=$<TARGET_FILE:fake_verbs>;KVXFER_LIBCUDA=$<TARGET_FILE:fake_cuda>")
  add_test(NAME verbs_gpu COMMAND test_verbs_gpu)
  set_tests_properties(verbs_gpu PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake}")
  add_test(NAME verbs_gpu_pushed COMMAND test_verbs_gpu)
  set_tests_properties(verbs_gpu_pushed PROPERTIES TIMEOUT 300 ENVIRONMENT "${on_fake};KVXFER_TEST_VERBS_PUSH=1")
  add_test(NAME verbs_gpu_two_rails COMMAND test_verbs_gpu)
  set_tests_properties(verbs_gpu_two_rails PROPERTIES TIMEOUT 300
                       ENVIRONMENT "${on_fake};KVXFER_FAKE_VERBS=devices=2;KVXFER_TEST_VERBS_PUSH=1")
endif()
