// What this library was compiled for, so that a GPU without code in it can be told in Python, before a launch.

extern "C" __attribute__((visibility("default"))) const char* vimpac_cuda_archs() { return VIMPAC_CUDA_ARCHS; }
