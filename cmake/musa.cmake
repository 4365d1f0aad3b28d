# The kernels for MUSA GPUs, libmate_musa.so: by mcc, which CMake does not know as a compiler.
set(MATE_MTCC_LEAST 5.1.0)

set(MATE_MUSA_FOLDERS)
foreach(name MUSA_HOME MUSA_PATH)
  if(DEFINED ENV{${name}})
    list(APPEND MATE_MUSA_FOLDERS "$ENV{${name}}/bin")
  endif()
endforeach()
find_program(MATE_MCC mcc HINTS ${MATE_MUSA_FOLDERS} PATHS /usr/local/musa/bin)
if(NOT MATE_MCC)
  message(FATAL_ERROR
    "mate: MATE_BUILD=${MATE_BUILD} asks for the MUSA kernels, but no mcc was found under MUSA_HOME, "
    "MUSA_PATH, PATH or /usr/local/musa. Install the MUSA toolkit with MTCC ${MATE_MTCC_LEAST} or "
    "newer, or set MUSA_HOME to where it is.")
endif()

execute_process(COMMAND "${MATE_MCC}" --version
  OUTPUT_VARIABLE MATE_MCC_SAID ERROR_VARIABLE MATE_MCC_SAID RESULT_VARIABLE MATE_MCC_STATUS)
if(NOT MATE_MCC_STATUS EQUAL 0)
  message(FATAL_ERROR
    "mate: `${MATE_MCC} --version` failed (${MATE_MCC_STATUS}): ${MATE_MCC_SAID} Set MUSA_HOME to a "
    "working MUSA toolkit with MTCC ${MATE_MTCC_LEAST} or newer.")
endif()
# mcc is made from clang, whose version it may name as well.
if(MATE_MCC_SAID MATCHES "[Mm][Tt]?[Cc][Cc][^0-9\n]*([0-9]+\\.[0-9]+(\\.[0-9]+)?)")
  set(MATE_MTCC_VERSION "${CMAKE_MATCH_1}")
  if(MATE_MTCC_VERSION VERSION_LESS MATE_MTCC_LEAST)
    message(FATAL_ERROR
      "mate: the MUSA kernels need MTCC ${MATE_MTCC_LEAST} or newer, but ${MATE_MCC} is "
      "${MATE_MTCC_VERSION}. Install a newer MUSA toolkit, or set MUSA_HOME to one.")
  endif()
  message(STATUS "mate: MUSA kernels by ${MATE_MCC}, MTCC ${MATE_MTCC_VERSION}")
else()
  message(WARNING
    "mate: `${MATE_MCC} --version` names no version of MTCC, of which ${MATE_MTCC_LEAST} or newer is "
    "needed; going on. It said: ${MATE_MCC_SAID}")
endif()

get_filename_component(MATE_MCC_REAL "${MATE_MCC}" REALPATH)
get_filename_component(MATE_MUSA_ROOT "${MATE_MCC_REAL}" DIRECTORY)
get_filename_component(MATE_MUSA_ROOT "${MATE_MUSA_ROOT}" DIRECTORY)
set(MATE_MUSA_PLACES)
if(EXISTS "${MATE_MUSA_ROOT}/include")
  list(APPEND MATE_MUSA_PLACES "-I${MATE_MUSA_ROOT}/include")
endif()
if(EXISTS "${MATE_MUSA_ROOT}/lib")
  list(APPEND MATE_MUSA_PLACES "-L${MATE_MUSA_ROOT}/lib")
endif()

set(MATE_MUSA_LIBRARY "${CMAKE_CURRENT_BINARY_DIR}/libmate_musa.so")
file(GLOB_RECURSE MATE_MUSA_HEADERS CONFIGURE_DEPENDS csrc/gpu/*.h csrc/include/*.h)
add_custom_command(
  OUTPUT "${MATE_MUSA_LIBRARY}"
  # The kernels read what they wrote as other types, through shared memory.
  COMMAND "${MATE_MCC}" -x musa --offload-arch=mp_31 -O2 -std=c++17 -fPIC -shared
    -fvisibility=hidden -fno-strict-aliasing "-I${CMAKE_CURRENT_SOURCE_DIR}/csrc/include"
    ${MATE_MUSA_PLACES} "${CMAKE_CURRENT_SOURCE_DIR}/csrc/gpu/musa.mu"
    -o "${MATE_MUSA_LIBRARY}" -lmusart
  DEPENDS csrc/gpu/musa.mu ${MATE_MUSA_HEADERS}
  COMMENT "Compiling the MUSA kernels"
  VERBATIM)
add_custom_target(mate_musa ALL DEPENDS "${MATE_MUSA_LIBRARY}")
install(FILES "${MATE_MUSA_LIBRARY}" DESTINATION mate/lib)
