# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
pybind11_add_module(_transfer MODULE transfer.cpp buffer.cpp errors.cpp)
target_link_libraries(_transfer PRIVATE kvxfer_engine)
install(TARGETS _transfer LIBRARY DESTINATION kvxfer COMPONENT transfer)
