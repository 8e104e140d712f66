# Read by CMake while llama-cpp-python is compiled (CMAKE_PROJECT_INCLUDE, see setup.sh).
# Leaves out what only llama.cpp's own programs use and compiles small files together: half of the
# time. llama-common and cpp-httplib stay as names, since llama.cpp installs or links them.
function(llava_ray_keep_sources target pattern)
    if(TARGET ${target})
        get_target_property(sources ${target} SOURCES)
        list(FILTER sources INCLUDE REGEX "${pattern}")
        set_property(TARGET ${target} PROPERTY SOURCES ${sources})
    endif()
endfunction()

function(llava_ray_compile_less)
    llava_ray_keep_sources(llama-common "trie\\.cpp$")
    if(TARGET llama-common)
        set_property(TARGET llama-common PROPERTY LINK_LIBRARIES llama-common-base)
    endif()
    if(TARGET cpp-httplib)
        set_property(TARGET cpp-httplib PROPERTY EXCLUDE_FROM_ALL TRUE)
    endif()
    # What these two do a token costs microseconds; the arithmetic is ggml's, which keeps -O3.
    foreach(target llama mtmd)
        if(TARGET ${target} AND NOT MSVC)
            target_compile_options(${target} PRIVATE -O1)
        endif()
    endforeach()
    if(TARGET mtmd)
        get_target_property(sources mtmd SOURCES)
        list(FILTER sources EXCLUDE REGEX "models/")
        get_target_property(folder mtmd SOURCE_DIR)
        list(TRANSFORM sources PREPEND "${folder}/")
        set_source_files_properties(
            ${sources} TARGET_DIRECTORY mtmd PROPERTIES SKIP_UNITY_BUILD_INCLUSION TRUE
        )
        set_property(TARGET mtmd PROPERTY UNITY_BUILD TRUE)
        set_property(TARGET mtmd PROPERTY UNITY_BUILD_BATCH_SIZE 16)
    endif()
endfunction()

if(CMAKE_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR)
    cmake_language(DEFER CALL llava_ray_compile_less)
endif()
