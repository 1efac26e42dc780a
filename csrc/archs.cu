// What this library was compiled for, so that Python can tell before a launch that a GPU or a driver cannot run it.

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* vimpac_cuda_archs() { return VIMPAC_CUDA_ARCHS; }

// Of the CUDA runtime, which is linked statically, and of the nvcc that made the PTX: 1000 · major + 10 · minor.
EXPORTED int vimpac_cuda_runtime() { return CUDART_VERSION; }
