/*
 * A CUDA that has one device and computes nothing.
 *
 * ONNX Runtime's CUDA provider loads, registers its kernels, transforms and partitions a graph and copies its
 * initializers on these answers. Launching a kernel succeeds and does nothing: placement can be read off a session,
 * numerics and speed cannot. build.py links this file into every stand-in library behind a linker map, and puts a stub
 * that returns 0 (success in every one of these libraries) in place of each symbol that is asked for and not here.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NO_MEMORY = 2 }; /* cudaSuccess, cudaErrorMemoryAllocation */

static const int COMPUTE_MAJOR = 8, COMPUTE_MINOR = 0;
static const size_t DEVICE_MEMORY = (size_t)64 << 30;
static const int SHARED_MEMORY = 48 << 10, SHARED_MEMORY_MOST = 99 << 10; /* what every device from 8.0 on offers */
static const int PROCESSORS = 108, WARP = 32, THREADS = 1024;

/* Every handle is the same address: nothing ever looks behind one. */
static char token[64];

static int give_handle(void **handle) {
    *handle = token;
    return SUCCESS;
}

static int give_memory(void **memory, size_t size) {
    /* Zeros, and aligned as device memory is: kernel pickers look at the alignment. */
    size_t rounded = (size + 255) / 256 * 256;
    *memory = rounded ? aligned_alloc(256, rounded) : NULL;
    if (*memory) memset(*memory, 0, rounded);
    return rounded && !*memory ? NO_MEMORY : SUCCESS;
}

static int take_memory(void *memory) {
    free(memory);
    return SUCCESS;
}

/* Adds a line to the file that STAND_IN_LAUNCHES names: the name of a kernel that would run, or after "# " an event. */
static int note(const char *what) {
    const char *path = getenv("STAND_IN_LAUNCHES");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return SUCCESS;
    fprintf(file, "%s\n", what);
    fclose(file);
    return SUCCESS;
}

/* ---- device queries -------------------------------------------------------------------------------------------- */

int cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = DEVICE_MEMORY; return SUCCESS; }

/* The fields of CUDA 13's cudaDeviceProp that the provider reads, at their offsets; the rest stays 0. */
int cudaGetDeviceProperties(void *properties, int device) {
    char *at = properties;
    (void)device;
    memset(at, 0, 1008);
    strcpy(at, "stand-in");
    *(size_t *)(at + 288) = DEVICE_MEMORY;
    *(size_t *)(at + 296) = (size_t)SHARED_MEMORY;
    *(int *)(at + 304) = 65536;                          /* regsPerBlock */
    *(int *)(at + 308) = WARP;
    *(int *)(at + 320) = THREADS;                        /* maxThreadsPerBlock */
    for (int axis = 0; axis < 3; axis++) {
        *(int *)(at + 324 + 4 * axis) = axis < 2 ? THREADS : 64;            /* maxThreadsDim */
        *(int *)(at + 336 + 4 * axis) = axis < 1 ? 2147483647 : 65535;      /* maxGridSize */
    }
    *(int *)(at + 360) = COMPUTE_MAJOR;
    *(int *)(at + 364) = COMPUTE_MINOR;
    *(int *)(at + 384) = PROCESSORS;
    *(int *)(at + 596) = 40 << 20;                       /* l2CacheSize */
    *(int *)(at + 604) = 2 * THREADS;                    /* maxThreadsPerMultiProcessor */
    *(size_t *)(at + 624) = (size_t)SHARED_MEMORY_MOST;  /* sharedMemPerMultiprocessor */
    *(int *)(at + 632) = 65536;                          /* regsPerMultiprocessor */
    *(size_t *)(at + 672) = (size_t)SHARED_MEMORY_MOST;  /* sharedMemPerBlockOptin */
    *(int *)(at + 688) = 32;                             /* maxBlocksPerMultiProcessor */
    return SUCCESS;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
        case 1: *value = THREADS; break;                 /* maxThreadsPerBlock */
        case 8: *value = SHARED_MEMORY; break;           /* maxSharedMemoryPerBlock */
        case 10: *value = WARP; break;                   /* warpSize */
        case 16: *value = PROCESSORS; break;             /* multiProcessorCount */
        case 39: *value = 2 * THREADS; break;            /* maxThreadsPerMultiProcessor */
        case 75: *value = COMPUTE_MAJOR; break;
        case 76: *value = COMPUTE_MINOR; break;
        case 81: case 97: *value = SHARED_MEMORY_MOST; break; /* per multiprocessor, per block by opting in */
        default: *value = 0;
    }
    return SUCCESS;
}

/* 0 would divide the work by zero. */
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads, size_t shared) {
    (void)kernel, (void)threads, (void)shared;
    *blocks = 1;
    return SUCCESS;
}

const char *cudaGetErrorName(int error) { return error ? "cudaErrorStandIn" : "cudaSuccess"; }
const char *cudaGetErrorString(int error) { return error ? "the stand-in for CUDA failed" : "no error"; }
const char *cublasGetStatusName(int status) { return cudaGetErrorName(status); }
const char *cublasGetStatusString(int status) { return cudaGetErrorString(status); }
const char *cudnnGetErrorString(int status) { return cudaGetErrorString(status); }
size_t cudnnGetVersion(void) { return 91200; }

/* ---- memory: the host's --------------------------------------------------------------------------------------- */

int cudaMalloc(void **memory, size_t size) { return give_memory(memory, size); }
int cudaMallocHost(void **memory, size_t size) { return give_memory(memory, size); }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { (void)flags; return give_memory(memory, size); }
int cudaMallocFromPoolAsync(void **memory, size_t size, void *pool, void *stream) {
    (void)pool, (void)stream;
    return give_memory(memory, size);
}
int cudaFree(void *memory) { return take_memory(memory); }
int cudaFreeHost(void *memory) { return take_memory(memory); }
int cudaFreeAsync(void *memory, void *stream) { (void)stream; return take_memory(memory); }

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    if (kind != 3) note("# copies to or from the host"); /* 3: within the device */
    if (size) memmove(to, from, size);
    return SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    (void)stream;
    return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *to, int value, size_t size) { if (size) memset(to, value, size); return SUCCESS; }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { (void)stream; return cudaMemset(to, value, size); }

/* type, device, devicePointer, hostPointer: all memory here is the device's (cudaMemoryTypeDevice is 2). */
int cudaPointerGetAttributes(void *attributes, const void *memory) {
    *(int *)attributes = 2;
    ((int *)attributes)[1] = 0;
    ((const void **)attributes)[1] = ((const void **)attributes)[2] = memory;
    return SUCCESS;
}
int cudaMemPoolGetAttribute(void *pool, int attribute, void *value) {
    (void)pool, (void)attribute;
    *(uint64_t *)value = 0;
    return SUCCESS;
}

/* ---- handles --------------------------------------------------------------------------------------------------- */

void **__cudaRegisterFatBinary(void *binary) { (void)binary; return (void **)token; }

/* ---- launches: nothing runs, but it is noted -------------------------------------------------------------------- */

static struct { const void *wrapper; const char *name; } *kernels;
static int kernels_known, kernels_room;

void __cudaRegisterFunction(void **binary, const void *wrapper, const void *symbol, const char *name) {
    (void)binary, (void)symbol;
    if (kernels_known == kernels_room) {
        kernels_room = kernels_room ? 2 * kernels_room : 4096;
        kernels = realloc(kernels, kernels_room * sizeof *kernels);
    }
    kernels[kernels_known].wrapper = wrapper;
    kernels[kernels_known++].name = name;
}

static int launch(const void *wrapper) {
    int i = 0;
    while (i < kernels_known && kernels[i].wrapper != wrapper) i++;
    return note(i < kernels_known ? kernels[i].name : "unknown");
}

int __cudaGetKernel(void **handle, const void *wrapper) { *handle = (void *)wrapper; return SUCCESS; }
int __cudaLaunchKernel(const void *kernel) { return launch(kernel); }
int cudaLaunchKernel(const void *kernel) { return launch(kernel); }
int cudaLaunchKernelExC(const void *configuration, const void *kernel) { (void)configuration; return launch(kernel); }
int cudaLaunchCooperativeKernel(const void *kernel) { return launch(kernel); }

/* A CUDA graph holds the kernels that are launched between its beginning and its end. */
int cudaStreamBeginCapture(void *stream) { (void)stream; return note("# graph begins"); }
int cudaStreamEndCapture(void *stream, void **graph) { (void)stream; note("# graph ends"); return give_handle(graph); }
int cudaGraphInstantiate(void **graph) { return give_handle(graph); }
int cudaGraphLaunch(void *graph) { (void)graph; return note("# graph runs"); }
int cudaStreamSynchronize(void *stream) { (void)stream; return note("# waits"); }

int cudaEventCreate(void **handle) { return give_handle(handle); }
int cudaEventCreateWithFlags(void **handle) { return give_handle(handle); }
int cudaStreamCreate(void **handle) { return give_handle(handle); }
int cudaStreamCreateWithFlags(void **handle) { return give_handle(handle); }
int cudaMemPoolCreate(void **handle) { return give_handle(handle); }
int cudaLibraryLoadData(void **handle) { return give_handle(handle); }
int cudaLibraryGetKernel(void **handle) { return give_handle(handle); }
int cublasCreate_v2(void **handle) { return give_handle(handle); }
int cublasLtCreate(void **handle) { return give_handle(handle); }
int cublasLtMatmulDescCreate(void **handle) { return give_handle(handle); }
int cublasLtMatmulPreferenceCreate(void **handle) { return give_handle(handle); }
int cublasLtMatrixLayoutCreate(void **handle) { return give_handle(handle); }
int cublasLtMatrixTransformDescCreate(void **handle) { return give_handle(handle); }
int cudnnCreate(void **handle) { return give_handle(handle); }
int cudnnCreateTensorDescriptor(void **handle) { return give_handle(handle); }
int cudnnCreateReduceTensorDescriptor(void **handle) { return give_handle(handle); }

int cublasGetMathMode(void *handle, int *mode) { (void)handle; *mode = 0; return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *capturing) { (void)stream; *capturing = 0; return SUCCESS; }
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1.0f; return SUCCESS; }

static int succeed(void) { return SUCCESS; }
int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, uint64_t flags, int *found) {
    (void)symbol, (void)version, (void)flags;
    *function = (void *)succeed;
    if (found) *found = 0;
    return SUCCESS;
}
