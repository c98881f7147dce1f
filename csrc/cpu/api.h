// What the library exports. Other systems export every function; Windows only what says so.
#pragma once

#if defined(_WIN32)
#define EXL_API extern "C" __declspec(dllexport)
#else
#define EXL_API extern "C"
#endif
