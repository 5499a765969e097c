// What the modules use of Python: its limited API, so that one binary serves every Python from 3.10
// on. LESS_LIMITED_API is off for a Python without a global lock, which has no such API.
#pragma once

#define PY_SSIZE_T_CLEAN
#if LESS_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <exception>
#include <stdexcept>

namespace less {

// Runs what may throw; where it does, the result is null and Python has an exception instead.
template <typename Function>
PyObject* guarded(Function function, PyObject* of_runtime_errors = PyExc_RuntimeError) {
  try {
    return function();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(of_runtime_errors, error.what());
  }
  return nullptr;
}

// A module of these functions, without state of its own.
inline PyModuleDef module_of(const char* name, const char* doc, PyMethodDef* functions) {
  return {PyModuleDef_HEAD_INIT, name, doc, -1, functions, nullptr, nullptr, nullptr, nullptr};
}

}  // namespace less
