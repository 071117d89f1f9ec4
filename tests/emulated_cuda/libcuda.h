// A driver without a device: memory is this process's, kernels run as device.h has them, and every call is written down.
// A table of kernels stands in front of this file: struct Kernel { name, call, sizes of its arguments }.
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int Result;
enum { OK = 0, INVALID = 1, NO_DEVICE = 100, NOT_FOUND = 500, ILLEGAL = 700 };
enum { MOST = 4096 };

struct Allocation { char *start; size_t size; char *mapped; size_t whole; bool host; };
struct Step { int kind; const Kernel *kernel; unsigned grid[3], threads, shared; char arguments[512]; void *target; const void *source; size_t size; };
struct Graph { int count; Step *steps; };

static Allocation allocations[MOST];
static Graph *capturing;
// A copy from memory that is not pinned: it is done when its stream, the default one, is waited for.
static struct { void *target; char *content; size_t size; } late[MOST];
static int late_count;
static int alive; // handles that were made and not given back

static void note(const char *format, ...)
{
    const char *file = getenv("QCOMPILE_STUB_LOG");
    FILE *log = file ? fopen(file, "a") : nullptr;
    if (log) {
        va_list words;
        va_start(words, format);
        vfprintf(log, format, words);
        va_end(words);
        fputc('\n', log);
        fclose(log);
    }
}

// Ends at a page that nobody may touch, as far as the alignment of 256 allows.
static void *allocate(size_t size, bool host)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (size + 255) / 256 * 256;
    const size_t whole = (room + page - 1) / page * page + page;
    char *mapped = (char *)mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(mapped + whole - page, page, PROT_NONE);
    char *start = mapped + whole - page - room;
    memset(start, 0x5A, room);
    for (int at = 0; at < MOST; at++) {
        if (!allocations[at].start) {
            allocations[at] = Allocation{start, size, mapped, whole, host};
            return start;
        }
    }
    return nullptr;
}

static bool inside(const void *place, size_t size, bool host)
{
    for (int at = 0; at < MOST; at++) {
        const Allocation &one = allocations[at];
        if (one.start && one.host == host && (const char *)place >= one.start && (const char *)place + size <= one.start + one.size) {
            return true;
        }
    }
    return false;
}

static Result release(void *start, bool host)
{
    for (int at = 0; at < MOST; at++) {
        if (start && allocations[at].start == start && allocations[at].host == host) {
            munmap(allocations[at].mapped, allocations[at].whole);
            allocations[at].start = nullptr;
            return OK;
        }
    }
    return INVALID;
}

static void run_step(const Step &step)
{
    if (step.kind) {
        memcpy(step.target, step.source, step.size);
        return;
    }
    void *pointers[16];
    size_t at = 0;
    for (int argument = 0; step.kernel->sizes[argument]; argument++) {
        pointers[argument] = (void *)(step.arguments + at);
        at += (size_t)(step.kernel->sizes[argument] + 7) / 8 * 8;
    }
    launched_bytes = step.shared;
    run_grid(step.kernel->call, pointers, step.grid[0], step.grid[1], step.grid[2], step.threads);
}

static Result take(const Step &step)
{
    if (!capturing) {
        run_step(step);
        return OK;
    }
    capturing->steps = (Step *)realloc(capturing->steps, sizeof(Step) * (size_t)(capturing->count + 1));
    capturing->steps[capturing->count++] = step;
    return OK;
}

static Result copied(const char *name, void *target, const void *source, size_t size, bool in, bool pinned)
{
    if (!inside(in ? target : source, size, false) || (pinned && !inside(in ? source : target, size, true))) {
        return INVALID;
    }
    note("%s %zu", name, size);
    if (!pinned) {
        late[late_count].target = target, late[late_count].size = size;
        late[late_count].content = (char *)malloc(size + 1);
        memcpy(late[late_count++].content, source, size);
        return OK;
    }
    Step step = {};
    step.kind = 1, step.target = target, step.source = source, step.size = size;
    return take(step);
}

extern "C" {
Result cuInit(unsigned) { return getenv("QCOMPILE_STUB_EMPTY") ? NO_DEVICE : OK; }
Result cuDriverGetVersion(int *version) { return *version = 12040, OK; }
Result cuDeviceGetCount(int *count) { return *count = 1, OK; }
Result cuDeviceGet(int *device, int number) { return *device = number, number ? INVALID : OK; }
Result cuDeviceGetName(char *name, int size, int) { return snprintf(name, (size_t)size, "Emulated Device"), OK; }
Result cuDeviceGetAttribute(int *value, int which, int) { return *value = which == 75 ? 9 : which == 76 ? 0 : which == 97 ? 101376 : 2, OK; }
Result cuDevicePrimaryCtxRetain(void **context, int) { return *context = &alive, alive++, OK; }
Result cuDevicePrimaryCtxRelease_v2(int) { return note("left %d", --alive), OK; }
Result cuCtxSetCurrent(void *context) { return context == &alive ? OK : INVALID; }
Result cuGetErrorString(int code, const char **text)
{
    *text = code == NOT_FOUND ? "named symbol not found" : code == INVALID ? "invalid argument" : "no kernel image is available for execution on the device";
    return OK;
}

Result cuModuleLoadData(void **module, const void *content)
{
    if (getenv("QCOMPILE_STUB_FOREIGN")) {
        return 209;
    }
    unsigned magic;
    memcpy(&magic, content, 4);
    note("cuModuleLoadData %08x", magic);
    return *module = (void *)kernels, alive++, magic == 0xBA55ED50u ? OK : INVALID;
}
Result cuModuleUnload(void *module) { return alive--, module == (void *)kernels ? OK : INVALID; }
Result cuModuleGetFunction(void **function, void *module, const char *name)
{
    for (const Kernel *kernel = (const Kernel *)module; kernel->name; kernel++) {
        if (!strcmp(kernel->name, name)) {
            return *function = (void *)kernel, OK;
        }
    }
    return NOT_FOUND;
}

Result cuMemAlloc_v2(uint64_t *address, size_t size)
{
    note("cuMemAlloc %zu", size);
    return *address = (uint64_t)allocate(size, false), alive++, OK;
}
Result cuMemFree_v2(uint64_t address) { return alive--, release((void *)address, false); }
Result cuMemAllocHost_v2(void **address, size_t size) { return *address = allocate(size, true), alive++, OK; }
Result cuMemFreeHost(void *address) { return alive--, release(address, true); }
Result cuMemcpyHtoD_v2(uint64_t target, const void *source, size_t size) { return copied("cuMemcpyHtoD", (void *)target, source, size, true, false); }
Result cuMemcpyHtoDAsync_v2(uint64_t target, const void *source, size_t size, void *) { return copied("cuMemcpyHtoDAsync", (void *)target, source, size, true, true); }
Result cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t size, void *) { return copied("cuMemcpyDtoHAsync", target, (const void *)source, size, false, true); }

Result cuStreamCreate(void **stream, unsigned) { return *stream = &capturing, alive++, OK; }
Result cuStreamDestroy_v2(void *) { return alive--, OK; }
Result cuStreamSynchronize(void *stream)
{
    for (; !stream && late_count; late_count--) {
        memcpy(late[late_count - 1].target, late[late_count - 1].content, late[late_count - 1].size);
        free(late[late_count - 1].content);
    }
    return capturing ? INVALID : OK;
}
Result cuStreamBeginCapture_v2(void *stream, int)
{
    note("cuStreamBeginCapture");
    return capturing = (Graph *)calloc(1, sizeof(Graph)), stream == &capturing ? OK : INVALID;
}
Result cuStreamEndCapture(void *, void **graph)
{
    note("cuStreamEndCapture");
    return *graph = capturing, capturing = nullptr, alive++, OK;
}
Result cuGraphInstantiateWithFlags(void **made, void *graph, unsigned long long)
{
    Graph *copy = (Graph *)malloc(sizeof(Graph));
    copy->count = ((Graph *)graph)->count, copy->steps = (Step *)malloc(sizeof(Step) * (size_t)(copy->count + 1));
    memcpy(copy->steps, ((Graph *)graph)->steps, sizeof(Step) * (size_t)copy->count);
    return *made = copy, alive++, OK;
}
static Result drop(void *graph) { return free(((Graph *)graph)->steps), free(graph), alive--, OK; }
Result cuGraphDestroy(void *graph) { return drop(graph); }
Result cuGraphExecDestroy(void *graph) { return drop(graph); }
Result cuGraphLaunch(void *graph, void *)
{
    note("cuGraphLaunch");
    for (int at = 0; at < ((Graph *)graph)->count; at++) {
        run_step(((Graph *)graph)->steps[at]);
    }
    return OK;
}

static const Kernel *permitted[64]; // kernels that may be given more shared memory, and how much
static int permitted_bytes[64], permitted_count;
Result cuFuncSetAttribute(void *function, int which, int value)
{
    if (which != 8 || value < 0 || value > 101376 || permitted_count == 64) {
        return INVALID;
    }
    note("cuFuncSetAttribute %s %d", ((const Kernel *)function)->name, value);
    permitted[permitted_count] = (const Kernel *)function, permitted_bytes[permitted_count++] = value;
    return OK;
}

static bool permits(const Kernel *kernel, unsigned shared)
{
    for (int at = permitted_count - 1; at >= 0; at--) {
        if (permitted[at] == kernel) {
            return (int)shared <= permitted_bytes[at];
        }
    }
    return shared <= 49152;
}

Result cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y, unsigned threads_z, unsigned shared, void *, void **parameters, void **extra)
{
    const Kernel *kernel = (const Kernel *)function;
    if (!x || !y || !z || y > 65535 || z > 65535 || threads_y != 1 || threads_z != 1 || !permits(kernel, shared) || extra) {
        return INVALID;
    }
    note("cuLaunchKernel %s %u %u %u %u", kernel->name, x, y, z, threads_x);
    Step step = {};
    step.kernel = kernel, step.grid[0] = x, step.grid[1] = y, step.grid[2] = z, step.threads = threads_x, step.shared = shared;
    size_t at = 0;
    for (int argument = 0; kernel->sizes[argument]; argument++) {
        memcpy(step.arguments + at, parameters[argument], (size_t)kernel->sizes[argument]);
        if (kernel->pointers[argument] && !inside(*(void **)parameters[argument], 1, false)) {
            return ILLEGAL;
        }
        at += (size_t)(kernel->sizes[argument] + 7) / 8 * 8;
    }
    return take(step);
}

Result cuEventCreate(void **event, unsigned) { return *event = &alive, alive++, OK; }
Result cuEventDestroy_v2(void *) { return alive--, OK; }
Result cuEventRecord(void *, void *) { return OK; }
Result cuEventSynchronize(void *) { return OK; }
Result cuEventElapsedTime(float *taken, void *, void *) { return *taken = 1.0f, OK; }
}
