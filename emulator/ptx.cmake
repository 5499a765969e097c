# The tiers ptx_<arch>: what nvcc makes of a kernel for that architecture, translated to C++ by
# emulator/ptx2cpp. The launchers are the .cu file's own, compiled as in the other tiers; a launch
# finds the translated kernel by the name of the one it was given.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/cuda_toolkit.py" nvcc
  OUTPUT_VARIABLE nvcc
  OUTPUT_STRIP_TRAILING_WHITESPACE
  COMMAND_ERROR_IS_FATAL ANY
)
file(
  GLOB translator
  CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/emulator/ptx2cpp/*.py"
  "${PROJECT_SOURCE_DIR}/emulator/ptx2cpp/families/*.py"
)
# The function below is called from other folders too.
set(LESS_NVCC "${nvcc}" CACHE INTERNAL "")
set(LESS_PTX2CPP "${translator}" CACHE INTERNAL "")
set(LESS_PTX2CPP_PYTHON "${Python_EXECUTABLE}" CACHE INTERNAL "")

# Sets `result` to the C++ of a .cu file's PTX, and the file itself for its launchers.
function(less_ptx_sources result target arch file)
  cmake_path(ABSOLUTE_PATH file)
  cmake_path(GET file STEM LAST_ONLY name)
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/${target}")
  file(MAKE_DIRECTORY "${folder}")
  set(ptx "${folder}/${name}.ptx")
  get_target_property(definitions less_flags INTERFACE_COMPILE_DEFINITIONS)
  if(definitions)
    list(TRANSFORM definitions PREPEND -D)
  else()
    set(definitions "")
  endif()
  add_custom_command(
    OUTPUT "${ptx}"
    COMMAND
      "${LESS_NVCC}" -std=c++17 -O3 --expt-relaxed-constexpr -arch=compute_${arch} -lineinfo
      "-I${PROJECT_SOURCE_DIR}/csrc" ${definitions} -ptx "${file}" -o "${ptx}" -MD -MF "${ptx}.d"
      -MT "${ptx}"
    DEPENDS "${file}"
    DEPFILE "${ptx}.d"
    COMMENT "PTX of ${name}.cu for ${arch}"
    VERBATIM
  )
  set(translated "${folder}/${name}.ptx.cpp")
  add_custom_command(
    OUTPUT "${translated}"
    COMMAND
      ${CMAKE_COMMAND} -E env "PYTHONPATH=${PROJECT_SOURCE_DIR}/emulator" "${LESS_PTX2CPP_PYTHON}"
      -m ptx2cpp "${ptx}" -o "${translated}"
    DEPENDS "${ptx}" ${LESS_PTX2CPP}
    COMMENT "C++ of ${name}.ptx for ${arch}"
    VERBATIM
  )
  # Kernels' bodies are dead code in the launchers' file: no time is spent on them.
  set(launchers "${folder}/${name}.cpp")
  file(CONFIGURE OUTPUT "${launchers}" CONTENT "#include \"${file}\"\n")
  set_source_files_properties("${translated}" PROPERTIES COMPILE_OPTIONS "-O1;-g0;-w")
  set_source_files_properties("${launchers}" PROPERTIES COMPILE_OPTIONS "-O0;-g0")
  set(${result} "${launchers}" "${translated}" PARENT_SCOPE)
endfunction()
