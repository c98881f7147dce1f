// Calls of exported functions with prepared arguments.
//
// Purpose: a decode step is some 330 calls. A call from Python costs about 6 us, a twelfth of a
// step of a small model in all, and meanwhile no thread computes. Python therefore prepares the
// arguments of consecutive calls once, and exl_replay makes them all.
//
// Layout: ExlCall and ExlArgument, of which Python has the same structs. A function has a twin
// that unpacks its arguments, exl_replay_<name>; EXL_REPLAYED defines it from the function's own
// parameters, so that the two cannot differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "api.h"

extern "C" {

// Python writes the member of the parameter's kind.
union ExlArgument {
    int64_t integer;
    float real;
    void* pointer;
};

struct ExlCall {
    int (*function)(const ExlArgument* arguments);  // an exl_replay_<name>
    const ExlArgument* arguments;
};
}

namespace exl {

template <class Parameter>
Parameter unpack_argument(const ExlArgument& argument) {
    if constexpr (std::is_pointer_v<Parameter>) {
        return static_cast<Parameter>(argument.pointer);
    } else if constexpr (std::is_floating_point_v<Parameter>) {
        return argument.real;
    } else {
        return static_cast<Parameter>(argument.integer);
    }
}

// Returns the function's result, or 0 if it has none.
template <class Result, class... Parameters, std::size_t... I>
int invoke(Result (*function)(Parameters...), const ExlArgument* arguments,
           std::index_sequence<I...>) {
    if constexpr (std::is_void_v<Result>) {
        function(unpack_argument<Parameters>(arguments[I])...);
        return 0;
    } else {
        return function(unpack_argument<Parameters>(arguments[I])...);
    }
}

template <class Result, class... Parameters>
int invoke(Result (*function)(Parameters...), const ExlArgument* arguments) {
    return invoke(function, arguments, std::index_sequence_for<Parameters...>());
}

}  // namespace exl

// Follows the definition of exl_<name>.
#define EXL_REPLAYED(name)                                              \
    EXL_API int exl_replay_##name(const ExlArgument* arguments) {       \
        return exl::invoke(exl_##name, arguments);                      \
    }
