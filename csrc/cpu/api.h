// Marks the functions that the library exports. On Windows a function is exported only if it is
// marked; other systems export every function.
#pragma once

#if defined(_WIN32)
#define EXL_API extern "C" __declspec(dllexport)
#else
#define EXL_API extern "C"
#endif
