# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
pybind11_add_module(_transfer MODULE
  buffer.cpp errors.cpp transfer/bounds.cpp transfer/engine.cpp transfer/handles.cpp transfer/lease.cpp transfer/module.cpp
  transfer/peer.cpp transfer/region.cpp transfer/request.cpp transfer/stats.cpp transfer/transfer.cpp)
target_link_libraries(_transfer PRIVATE kvxfer_engine)
install(TARGETS _transfer LIBRARY DESTINATION kvxfer COMPONENT transfer)
