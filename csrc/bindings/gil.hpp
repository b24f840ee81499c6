// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Python.h>
#include <unistd.h>

namespace kvxfer::bindings {

// Without the GIL until the end of its scope. Unlike pybind11's, also in a daemon thread that comes
// back when the interpreter is going down: Python then ends the thread by an unwinding that no
// destructor of C++ lets through, and the process would abort. It sleeps instead until the process
// has ended, as all such threads do from Python 3.14 on.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { take_back(); }

  // Lets Python's signal handlers run. True: one of them raised, and its exception is set, to be
  // thrown when the scope has ended.
  bool interrupted() {
    take_back();
    const bool raised = PyErr_CheckSignals() != 0;
    state_ = PyEval_SaveThread();
    return raised;
  }

  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  void take_back() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // must not be left
      for (;;) ::pause();
    }
  }

  PyThreadState* state_;
};

}  // namespace kvxfer::bindings
