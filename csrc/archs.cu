// The GPUs that this library was compiled for: Python says before a launch if it has no code for the GPU at hand.

extern "C" __attribute__((visibility("default"))) const char* vimpac_cuda_archs() { return VIMPAC_CUDA_ARCHS; }
