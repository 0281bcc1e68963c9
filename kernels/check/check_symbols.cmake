# Stops the build where an object of one instruction set defines a symbol that another object may define as well: the linker
# keeps one copy for all, and a processor would meet instructions that it lacks.
#
#     cmake -DNM=nm -DISA=avx2 -DOBJECT=table.cpp.o -P check_symbols.cmake
execute_process(COMMAND "${NM}" --defined-only "${OBJECT}" OUTPUT_VARIABLE SYMBOLS COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" LINES "${SYMBOLS}")
string(LENGTH "${ISA}" LENGTH)
set(FOUND "")
foreach(LINE IN LISTS LINES)
  # letters of what is global or weak
  if(NOT LINE MATCHES " [A-TV-Zuvw] (.+)$")
    continue()
  endif()
  set(SYMBOL "${CMAKE_MATCH_1}")
  # lensc::<isa>:: in a mangled name, lengths first; references to the runtime's handler of exceptions
  if(NOT SYMBOL MATCHES "5lensc${LENGTH}${ISA}" AND NOT SYMBOL MATCHES "^DW\\.ref\\.")
    list(APPEND FOUND "${SYMBOL}")
  endif()
endforeach()
if(FOUND)
  list(JOIN FOUND "\n  " FOUND)
  message(FATAL_ERROR "${ISA}: symbols outside of lensc::${ISA}, which every instruction set would share:\n  ${FOUND}\n"
                      "Declare functions of shared headers LENSC_INLINE, and call none of the standard library's that is not.")
endif()
