// What a trip between host and device costs, by each way that a small batch could take. The path
// of the engine (kernels/cuda/fetch.cu, server/engine_cuda_lane.c) is what was fastest here.
//
//     readers   thread blocks that read a word of host memory at once: all the same word, some the
//               same sector of 32 bytes, or each its own
//     ways      launch ... kernel writes a word of host memory -> host sees it
//
// Medians, in us; "rested": each launch after 2 ms in which host and device had nothing to do.
// Needs nothing else of this project:
//
//     nvcc -O3 -std=c++17 -arch=native -o bus tests/gpu/bus.cu && ./bus
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <vector>

#define CHECK(call)                                                                                \
    do {                                                                                           \
        cudaError_t error_ = (call);                                                               \
        if (error_ != cudaSuccess) {                                                               \
            fprintf(stderr, "bus: line %d: %s\n", __LINE__, cudaGetErrorString(error_));           \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

enum {
    BUSY = 400,
    RESTED = 80,
    WARM_UP = 30,
    REST_NS = 2000000,
    PAUSE_NS = 5000,
    STUCK_NS = 2000000000,
    READERS_MAX = 132,
    FETCH_BLOCKS = 32,
    FETCH_THREADS = 256,
    IN_FLIGHT = 4,
    PINNED_BYTES = 1 << 20,
    ORDER_BYTES = 64,
};

struct order {
    const uint4 *from;
    uint4 *to;
    uint64_t n; // pieces of 16 bytes
};

__device__ inline uint64_t device_time_ns()
{
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

__global__ void readers_kernel(const unsigned char *host, uint64_t stride_bytes, uint64_t *times)
{
    uint64_t begun_ns = device_time_ns();
    uint64_t word = __ldcv((const unsigned long long *)(host + blockIdx.x * stride_bytes));
    if (word) // has to be waited for; never
        __trap();
    times[2 * blockIdx.x] = begun_ns;
    times[2 * blockIdx.x + 1] = device_time_ns();
}

__global__ void empty_kernel()
{
}

// The sequence counts launches, on both sides.
__global__ void report_kernel(uint64_t *sequence, volatile uint64_t *host)
{
    *sequence += 1;
    __threadfence_system();
    *host = *sequence;
}

__global__ void fetch_kernel(const unsigned char *orders, uint64_t stride_bytes)
{
    __shared__ order own;
    if (threadIdx.x < sizeof own / 8)
        ((unsigned long long *)&own)[threadIdx.x] =
            __ldcv((const unsigned long long *)(orders + blockIdx.x * stride_bytes) + threadIdx.x);
    __syncthreads();
    uint32_t threads = gridDim.x * blockDim.x;
    for (uint32_t first = blockIdx.x * blockDim.x + threadIdx.x; first < own.n;
         first += threads * IN_FLIGHT) {
        uint4 held[IN_FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++)
            if (first + i * threads < own.n)
                held[i] = __ldcv(own.from + first + i * threads);
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++)
            if (first + i * threads < own.n)
                own.to[first + i * threads] = held[i];
    }
}

// ---- host

static cudaStream_t stream;
static unsigned char *pinned, *pinned_device; // orders lie in the last quarter
static volatile uint64_t *report;
static uint64_t *report_device, *sequence_device;
static uint4 *to_device;
static uint64_t launches;

static uint64_t now_ns()
{
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double median(std::vector<double> &values)
{
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

static void open_all()
{
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaHostAlloc((void **)&pinned, PINNED_BYTES, cudaHostAllocMapped));
    CHECK(cudaHostAlloc((void **)&report, 4096, cudaHostAllocMapped));
    memset(pinned, 0, PINNED_BYTES);
    *report = 0;
    CHECK(cudaHostGetDevicePointer((void **)&pinned_device, pinned, 0));
    CHECK(cudaHostGetDevicePointer((void **)&report_device, (void *)report, 0));
    CHECK(cudaMalloc(&sequence_device, sizeof *sequence_device));
    CHECK(cudaMemset(sequence_device, 0, sizeof *sequence_device));
    CHECK(cudaMalloc(&to_device, PINNED_BYTES));
}

static void readers(uint64_t stride_bytes)
{
    uint64_t *times_device, times[2 * READERS_MAX];
    CHECK(cudaMalloc(&times_device, sizeof times));
    printf("%4llu bytes apart |", (unsigned long long)stride_bytes);
    for (int blocks : {1, 2, 4, 8, 16, 32, (int)READERS_MAX}) {
        std::vector<double> taken_us;
        for (int i = 0; i < 100; i++) {
            readers_kernel<<<blocks, 1, 0, stream>>>(pinned_device, stride_bytes, times_device);
            CHECK(cudaStreamSynchronize(stream));
            CHECK(cudaMemcpy(times, times_device, sizeof times, cudaMemcpyDeviceToHost));
            uint64_t begun_ns = UINT64_MAX, ended_ns = 0;
            for (int block = 0; block < blocks; block++) {
                begun_ns = std::min(begun_ns, times[2 * block]);
                ended_ns = std::max(ended_ns, times[2 * block + 1]);
            }
            taken_us.push_back((double)(ended_ns - begun_ns) / 1e3);
        }
        printf(" %6.1f", median(taken_us));
    }
    printf("\n");
    CHECK(cudaFree(times_device));
}

// `go` ends in one report.
static void way(const char *name, const std::function<void()> &go)
{
    std::vector<double> called[2], seen[2];
    for (int i = -WARM_UP; i < BUSY + RESTED; i++) {
        bool rested = i >= BUSY;
        timespec rest = {0, REST_NS};
        if (rested)
            nanosleep(&rest, nullptr);
        for (uint64_t until_ns = now_ns() + PAUSE_NS; now_ns() < until_ns;)
            ;
        launches++;
        uint64_t begun_ns = now_ns();
        go();
        uint64_t called_ns = now_ns();
        while (*report != launches)
            if (now_ns() - begun_ns > STUCK_NS) {
                fprintf(stderr, "bus: no report of \"%s\"\n", name);
                exit(1);
            }
        if (i >= 0) {
            seen[rested].push_back((double)(now_ns() - begun_ns) / 1e3);
            called[rested].push_back((double)(called_ns - begun_ns) / 1e3);
        }
    }
    CHECK(cudaStreamSynchronize(stream));
    printf("%-60s | %5.1f %5.1f | %5.1f %5.1f\n", name, median(called[0]), median(seen[0]),
           median(called[1]), median(seen[1]));
    fflush(stdout);
}

static void launch_report()
{
    report_kernel<<<1, 1, 0, stream>>>(sequence_device, report_device);
}

static cudaGraphExec_t graph_of(const std::function<void()> &launch)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphUpload(exec, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaGraphDestroy(graph));
    return exec;
}

static void graph_way(const char *name, const std::function<void()> &launch)
{
    cudaGraphExec_t exec = graph_of(launch);
    way(name, [&] { CHECK(cudaGraphLaunch(exec, stream)); });
    CHECK(cudaGraphExecDestroy(exec));
}

static void copy(uint64_t bytes)
{
    CHECK(cudaMemcpyAsync(to_device, pinned, bytes, cudaMemcpyHostToDevice, stream));
}

// By blocks whose orders lie `stride_bytes` apart; 0: one order for all.
static void launch_fetch(uint64_t bytes, uint64_t stride_bytes)
{
    unsigned char *orders = pinned + PINNED_BYTES / 4 * 3;
    order one = {(const uint4 *)pinned_device, to_device, bytes / 16};
    for (int i = 0; i < FETCH_BLOCKS; i++)
        memcpy(orders + (uint64_t)i * stride_bytes, &one, sizeof one);
    fetch_kernel<<<FETCH_BLOCKS, FETCH_THREADS, 0, stream>>>(pinned_device + (orders - pinned),
                                                             stride_bytes);
}

static void ways(uint64_t bytes)
{
    char name[100];
    auto named = [&](const char *format) {
        snprintf(name, sizeof name, format, (unsigned long long)bytes);
        return name;
    };
    cudaGraphExec_t report_graph = graph_of(launch_report);
    way(named("copy of %llu bytes, graph [report]"), [&] {
        copy(bytes);
        CHECK(cudaGraphLaunch(report_graph, stream));
    });
    CHECK(cudaGraphExecDestroy(report_graph));
    graph_way(named("graph [copy of %llu bytes, report]"), [&] {
        copy(bytes);
        launch_report();
    });
    graph_way(named("graph [fetch of %llu bytes by one order, report]"), [&] {
        launch_fetch(bytes, 0);
        launch_report();
    });
    graph_way(named("graph [fetch of %llu bytes, each block its order, report]"), [&] {
        launch_fetch(bytes, ORDER_BYTES);
        launch_report();
    });
}

int main()
{
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    printf("%s, SM %d.%d\n\n", device.name, device.major, device.minor);
    open_all();
    printf("blocks that read      1      2      4      8     16     32    %d\n", READERS_MAX);
    for (uint64_t stride_bytes : {0, 8, 32, 64, 128, 4096})
        readers(stride_bytes);
    printf("\n%-58s | calls  seen | rested\n", "way");
    way("kernel [report]", launch_report);
    for (int kernels = 1; kernels <= 4; kernels++) {
        char name[64];
        snprintf(name, sizeof name, "graph of %d, the last one [report]", kernels);
        graph_way(name, [&] {
            for (int i = 1; i < kernels; i++)
                empty_kernel<<<READERS_MAX, 128, 0, stream>>>();
            launch_report();
        });
    }
    for (uint64_t bytes : {256, 4096, 33792, 270336})
        ways(bytes);
    CHECK(cudaGetLastError());
    return 0;
}
