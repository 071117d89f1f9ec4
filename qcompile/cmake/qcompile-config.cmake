# qcompile in a CMake project: models are compiled when the project is built, and again when what they were made from changed.
#
#   execute_process(COMMAND qcompile --cmake-dir OUTPUT_VARIABLE qcompile_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
#   find_package(qcompile REQUIRED)
#   qcompile_add_model(TARGET keywords MODEL keywords.onnx QTARGET cortex-m4 DATA calib.npz)
#   target_link_libraries(firmware PRIVATE keywords)      # then: #include "keywords/model.h"
#
# QCOMPILE_COMMAND is the command that runs; set it where qcompile is not on the PATH.

find_program(QCOMPILE_COMMAND qcompile REQUIRED)

# qcompile_add_model(TARGET name MODEL file QTARGET target [DATA data] [EVAL data] [RECIPE file] [OPTIONS option...])
#
# For a microcontroller, TARGET becomes a static library whose header is "name/model.h", and name_selftest a test of it
# wherever the build runs what it builds. For other targets it is a custom target that is part of `all`. The artifact's
# folder is the property QCOMPILE_OUTPUT of TARGET. Paths are relative to the current source folder.
function(qcompile_add_model)
  cmake_parse_arguments(PARSE_ARGV 0 model "" "TARGET;MODEL;QTARGET;DATA;EVAL;RECIPE" "OPTIONS")
  foreach(needed TARGET MODEL QTARGET)
    if(NOT model_${needed})
      message(FATAL_ERROR "qcompile_add_model: ${needed} is missing")
    endif()
  endforeach()
  if(model_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "qcompile_add_model: '${model_UNPARSED_ARGUMENTS}' is no argument; give options behind OPTIONS")
  endif()

  set(place "${CMAKE_CURRENT_BINARY_DIR}/qcompile")
  set(output "${place}/${model_TARGET}")
  set(made "${output}/manifest.json")
  if(model_QTARGET MATCHES "^(cortex-m|riscv)")
    list(APPEND made "${output}/model.c" "${output}/model.h" "${output}/selftest.c")
  endif()
  set(words "")
  foreach(given MODEL DATA EVAL RECIPE)
    if(model_${given})
      get_filename_component(path "${model_${given}}" ABSOLUTE)
      if(NOT EXISTS "${path}") # a function that yields samples
        set(path "${model_${given}}")
      endif()
      string(TOLOWER "${given}" option)
      list(APPEND words "--${option}" "${path}")
    endif()
  endforeach()
  list(REMOVE_AT words 0) # the model itself needs no flag

  # Files of the artifact that did not change are new all the same, so make and ninja see that the work was done.
  add_custom_command(
    OUTPUT ${made}
    COMMAND "${QCOMPILE_COMMAND}" compile ${words} --target "${model_QTARGET}" ${model_OPTIONS} --output "${output}"
            --depfile "${place}/${model_TARGET}.d" --quiet
    DEPFILE "${place}/${model_TARGET}.d"
    DEPENDS "${QCOMPILE_COMMAND}"
    WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
    COMMENT "Compiling ${model_MODEL} for ${model_QTARGET}"
    VERBATIM)

  if(model_QTARGET MATCHES "^(cortex-m|riscv)")
    add_library(${model_TARGET} STATIC "${output}/model.c" "${output}/manifest.json")
    target_include_directories(${model_TARGET} PUBLIC "${place}")
    set_target_properties(${model_TARGET} PROPERTIES C_STANDARD 99 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF)
    if(CMAKE_C_COMPILER_ID MATCHES "GNU|Clang")
      target_compile_options(${model_TARGET} PRIVATE -O2)
    endif()
    if(NOT CMAKE_CROSSCOMPILING)
      add_executable(${model_TARGET}_selftest "${output}/selftest.c")
      target_link_libraries(${model_TARGET}_selftest PRIVATE ${model_TARGET})
      add_test(NAME ${model_TARGET}_selftest COMMAND ${model_TARGET}_selftest)
    endif()
  else()
    add_custom_target(${model_TARGET} ALL DEPENDS ${made})
  endif()
  set_target_properties(${model_TARGET} PROPERTIES QCOMPILE_OUTPUT "${output}")
endfunction()
