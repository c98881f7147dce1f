// A CUDA driver without a card: checks the calls of exl_loader, and runs launches with the
// emulated kernels. It is as strict as the documentation of the real one (CUDA Driver API
// reference manual; programming guide, "CUDA Graphs"):
//
// - A call that needs a context fails with CUDA_ERROR_INVALID_CONTEXT if the thread has none, or
//   another one than that in which the module, function, stream, graph or memory was created.
// - A primary context without users is destroyed, with everything that was created in it.
// - While a stream of a context is captured, waiting for the context or for that stream spoils
//   the capture, whichever thread waits. So does any call that may wait for the device, made by
//   the capturing thread, unless the capture is relaxed.
// - A graph has the arguments that its launches had when they were captured.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

enum {
    kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotInitialised = 3, kInvalidDevice = 101,
    kInvalidImage = 200, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500,
    kLaunchFailed = 719, kCaptureUnsupported = 900, kCaptureInvalidated = 901,
    kIllegalState = 401, kCaptureWrongThread = 908
};
constexpr int kDevices = 2, kDefaultShared = 48 << 10, kSharedLimit = 99 << 10;
constexpr unsigned kMostThreads = 1024, kGridLimit[3] = {0x7FFFFFFF, 65535, 65535};
constexpr uint64_t kCardBytes = 1 << 30;
enum Mode { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2, kNone = 3 };

struct Context { int device, retained = 0; };
// Base of everything that is created in a context.
struct Made { Context* context; };
struct Module : Made { std::string image; uint64_t nbytes = 0; };
struct Function : Made { Module* module; std::string name; int shared = kDefaultShared; };
struct Node {
    Function* function;
    uint32_t grid[3];
    int block, shared;
    std::vector<std::vector<char>> arguments;
};
struct Graph : Made { std::vector<Node> nodes; };
struct Executable : Graph { uint64_t nbytes; };
struct Stream : Made {
    bool blocking;
    Mode mode = kNone;
    std::thread::id thread;
    bool spoilt = false;
    std::vector<Node> nodes;
};
struct Memory : Made { uint64_t nbytes; };
using Launch = int (*)(const char*, const uint32_t*, int, int, void**, char*, int);
using Signature = const char* (*)(const char*);

std::recursive_mutex mutex;
Context contexts[kDevices] = {{0}, {1}};
thread_local std::vector<Context*> current;
std::set<Module*> modules;
std::set<Function*> functions;
std::set<Stream*> streams;
std::set<Graph*> graphs;
std::set<Executable*> executables;
std::map<uint64_t, Memory> memories;
std::map<void*, Memory> pinned;  // main memory
uint64_t used[kDevices] = {0, 0};
bool initialised = false;
int version = 13000, capability[2] = {9, 0}, captures_to_spoil = 0;
uint64_t last_stream = 0, graph_bytes = 64 << 10, module_bytes = 0, function_bytes = 0;
Launch launch_emulated = nullptr;
Signature signature_of = nullptr;
std::string message;

using Lock = std::lock_guard<std::recursive_mutex>;

Context* in_context() {
    return !current.empty() && current.back()->retained > 0 ? current.back() : nullptr;
}
// True if an object was created in the current context.
template <class Thing>
bool is_at_home(const Thing* thing) {
    return in_context() != nullptr && thing->context == in_context();
}
template <class Thing>
bool exists(const std::set<Thing*>& all, const void* handle) {
    return all.count(static_cast<Thing*>(const_cast<void*>(handle))) > 0;
}

// The stream of a context that is being captured.
Stream* captured(const Context* context) {
    for (Stream* stream : streams) {
        if (stream->context == context && stream->mode != kNone) return stream;
    }
    return nullptr;
}
// Effect of a call that waits for the whole context.
int wait_for(const Context* context) {
    Stream* stream = captured(context);
    if (stream == nullptr) return kOk;
    stream->spoilt = true;
    return kCaptureUnsupported;
}
// Effect of a call by the capturing thread that may wait for the device.
int may_wait() {
    for (Stream* stream : streams) {
        const bool own = stream->thread == std::this_thread::get_id();
        if (stream->mode == kGlobal || (stream->mode == kThreadLocal && own)) {
            stream->spoilt = true;
            return kCaptureUnsupported;
        }
    }
    return kOk;
}

// The size of a cubin, which is an ELF file: its section headers come last.
uint64_t elf_bytes(const char* image) {
    uint64_t offset;
    uint16_t entry_bytes, entries;
    std::memcpy(&offset, image + 40, 8);
    std::memcpy(&entry_bytes, image + 58, 2);
    std::memcpy(&entries, image + 60, 2);
    return offset + uint64_t(entry_bytes) * entries;
}

int run(const Node& node) {
    char words[512] = "";
    std::vector<void*> pointers;
    for (const auto& argument : node.arguments) {
        pointers.push_back(const_cast<char*>(argument.data()));
    }
    if (launch_emulated(node.function->name.c_str(), node.grid, node.block, node.shared,
                        pointers.data(), words, sizeof words) == 0)
        return kOk;
    message = words;
    return kLaunchFailed;
}

void forget(Context* context) {
    const auto sweep = [context](auto& all) {
        for (auto it = all.begin(); it != all.end();) {
            it = (*it)->context == context ? all.erase(it) : std::next(it);
        }
    };
    sweep(modules), sweep(functions), sweep(streams), sweep(graphs), sweep(executables);
    for (auto it = memories.begin(); it != memories.end();) {
        it = it->second.context == context ? memories.erase(it) : std::next(it);
    }
    used[context->device] = 0;
}

}  // namespace

extern "C" {

// ---- Settings and counters for tests --------------------------------------------------------

void fake_configure(void* launch, void* signature, int major, int minor, int driver_version) {
    launch_emulated = reinterpret_cast<Launch>(launch);
    signature_of = reinterpret_cast<Signature>(signature);
    capability[0] = major, capability[1] = minor, version = driver_version;
}
int fake_modules() { return int(modules.size()); }
int fake_graphs() { return int(executables.size()); }
int fake_things() {
    return int(streams.size() + graphs.size() + executables.size() + memories.size() +
               pinned.size());
}
int fake_retained(int device) { return contexts[device].retained; }
uint64_t fake_stream() { return last_stream; }
uint64_t fake_used(int device) { return used[device]; }
int fake_current() { return current.empty() ? -1 : current.back()->device; }
void fake_retain(int device) { contexts[device].retained++; }
void fake_push(int device) { current.push_back(&contexts[device]); }
// Sets the number of captures from now on that another library's call spoils.
void fake_spoil(int captures) { captures_to_spoil = captures; }
// Sets the memory of a graph for each of its launches.
void fake_graph_bytes(uint64_t nbytes) { graph_bytes = nbytes; }
// Sets the memory of a module when it is loaded, and of a kernel at its first use.
void fake_module_bytes(uint64_t module, uint64_t function) {
    module_bytes = module, function_bytes = function;
}

// ---- The driver ----------------------------------------------------------------------------

int cuInit(unsigned) { return initialised = true, kOk; }
int cuDriverGetVersion(int* out) { return *out = version, kOk; }
int cuDeviceGet(int* device, int ordinal) {
    if (!initialised) return kNotInitialised;
    if (ordinal < 0 || ordinal >= kDevices) return kInvalidDevice;
    return *device = ordinal, kOk;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    const std::map<int, int> values{
        {1, int(kMostThreads)}, {5, int(kGridLimit[0])}, {6, int(kGridLimit[1])},
        {7, int(kGridLimit[2])}, {16, 4}, {75, capability[0]}, {76, capability[1]},
        {97, kSharedLimit}};
    const auto found = values.find(attribute);
    if (found == values.end()) return kInvalidValue;
    return *value = found->second, kOk;
}
int cuDevicePrimaryCtxRetain(Context** context, int device) {
    const Lock lock(mutex);
    if (!initialised) return kNotInitialised;
    *context = &contexts[device];
    return contexts[device].retained++, kOk;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    const Lock lock(mutex);
    if (contexts[device].retained == 0) return kInvalidContext;
    if (--contexts[device].retained == 0) forget(&contexts[device]);
    return kOk;
}
int cuCtxGetCurrent(Context** context) {
    return *context = current.empty() ? nullptr : current.back(), kOk;
}
int cuCtxPushCurrent_v2(Context* context) {
    if (context == nullptr || context->retained == 0) return kInvalidContext;
    return current.push_back(context), kOk;
}
int cuCtxPopCurrent_v2(Context** context) {
    if (current.empty()) return kInvalidContext;
    *context = current.back();
    return current.pop_back(), kOk;
}
int cuCtxSynchronize() {
    const Lock lock(mutex);
    return in_context() ? wait_for(in_context()) : kInvalidContext;
}

int cuModuleLoadData(Module** module, const char* image) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (const int code = may_wait()) return code;
    if (std::memcmp(image, "\x7f" "ELF", 4) == 0) {
        *module = new Module{{in_context()}, std::string(image, elf_bytes(image)), 0};
    } else if (std::strstr(image, ".version ") != nullptr) {  // PTX, a text
        *module = new Module{{in_context()}, image, 0};
    } else {
        return kInvalidImage;
    }
    (*module)->nbytes = module_bytes;
    used[in_context()->device] += module_bytes;
    return modules.insert(*module), kOk;
}
int cuModuleUnload(Module* module) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(modules, module)) return kInvalidHandle;
    if (!is_at_home(module)) return kInvalidContext;
    if (const int code = may_wait()) return code;
    for (const Executable* graph : executables) {
        for (const Node& node : graph->nodes) {
            // A graph would launch a kernel that is unloaded.
            if (node.function->module == module) std::abort();
        }
    }
    for (auto it = functions.begin(); it != functions.end();) {
        it = (*it)->module == module ? functions.erase(it) : std::next(it);
    }
    used[in_context()->device] -= module->nbytes;
    return modules.erase(module), delete module, kOk;
}
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(modules, module)) return kInvalidHandle;
    if (!is_at_home(module)) return kInvalidContext;
    const std::string section = std::string(".text.") + name, entry = std::string(name) + "(";
    if (module->image.find(section.c_str(), 0, section.size() + 1) == std::string::npos &&
        module->image.find(".entry " + entry) == std::string::npos)
        return kNotFound;
    *function = new Function{{in_context()}, module, name};
    module->nbytes += function_bytes;
    used[in_context()->device] += function_bytes;
    return functions.insert(*function), kOk;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(functions, function)) return kInvalidHandle;
    if (!is_at_home(function)) return kInvalidContext;
    if (attribute != 8 || value > kSharedLimit) return kInvalidValue;
    return function->shared = value, kOk;
}
int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, Stream* stream, void** arguments,
                   void** extra) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(functions, function)) return kInvalidHandle;
    if (!is_at_home(function)) return kInvalidContext;
    const unsigned grid[3] = {gx, gy, gz};
    for (int i = 0; i < 3; ++i) {
        if (grid[i] == 0 || grid[i] > kGridLimit[i]) return kInvalidValue;
    }
    if (bx == 0 || bx > kMostThreads || by != 1 || bz != 1 || extra != nullptr ||
        int(shared) > function->shared)
        return kInvalidValue;
    Node node{function, {gx, gy, gz}, int(bx), int(shared), {}};
    const char* words = signature_of(function->name.c_str());
    for (int i = 0; words != nullptr && *words != 0; ++i) {  // "p8 i4 ..."
        const auto* first = static_cast<const char*>(arguments[i]);
        node.arguments.emplace_back(first, first + std::atoi(words + 1));
        words = std::strchr(words, ' ');
        if (words != nullptr) ++words;
    }
    last_stream = reinterpret_cast<uint64_t>(stream);
    if (!exists(streams, stream)) {  // a number of the tests', PyTorch's stream
        Stream* other = captured(in_context());
        if (stream == nullptr && other != nullptr && other->blocking) {
            other->spoilt = true;
            return kCaptureUnsupported;
        }
        return run(node);
    }
    if (!is_at_home(stream)) return kInvalidContext;
    if (stream->mode == kNone) return run(node);
    if (captures_to_spoil > 0) --captures_to_spoil, stream->spoilt = true;
    if (stream->spoilt) return kCaptureInvalidated;
    return stream->nodes.push_back(node), kOk;
}

int cuMemAlloc_v2(uint64_t* address, size_t nbytes) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (nbytes == 0) return kInvalidValue;
    if (const int code = may_wait()) return code;
    if (used[in_context()->device] + nbytes > kCardBytes) return kOutOfMemory;
    used[in_context()->device] += nbytes;
    *address = reinterpret_cast<uint64_t>(std::malloc(nbytes));
    return memories[*address] = Memory{{in_context()}, nbytes}, kOk;
}
int cuMemFree_v2(uint64_t address) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    const auto found = memories.find(address);
    if (found == memories.end()) return kInvalidValue;
    if (!is_at_home(&found->second)) return kInvalidContext;
    if (const int code = may_wait()) return code;
    used[in_context()->device] -= found->second.nbytes;
    std::free(reinterpret_cast<void*>(address));
    return memories.erase(found), kOk;
}
int cuMemHostAlloc(void** address, size_t nbytes, unsigned flags) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (nbytes == 0 || flags != 3) return kInvalidValue;
    if (const int code = may_wait()) return code;
    if (nbytes > kCardBytes) return kOutOfMemory;
    *address = std::malloc(nbytes);
    return pinned[*address] = Memory{{in_context()}, nbytes}, kOk;
}
int cuMemFreeHost(void* address) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    const auto found = pinned.find(address);
    if (found == pinned.end()) return kInvalidValue;
    if (!is_at_home(&found->second)) return kInvalidContext;
    if (const int code = may_wait()) return code;
    std::free(address);
    return pinned.erase(found), kOk;
}
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    *free = kCardBytes - used[in_context()->device], *total = kCardBytes;
    return kOk;
}

int cuStreamCreate(Stream** stream, unsigned flags) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    *stream = new Stream{{in_context()}, flags != 1, kNone, {}, false, {}};
    return streams.insert(*stream), kOk;
}
int cuStreamDestroy_v2(Stream* stream) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(streams, stream)) return kInvalidHandle;
    if (!is_at_home(stream)) return kInvalidContext;
    return streams.erase(stream), delete stream, kOk;
}
int cuStreamSynchronize(Stream* stream) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(streams, stream)) return kInvalidHandle;
    if (!is_at_home(stream)) return kInvalidContext;
    if (stream->mode == kNone) return kOk;
    return stream->spoilt = true, kCaptureUnsupported;
}
int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(streams, stream)) return kCaptureUnsupported;  // the default stream
    if (!is_at_home(stream)) return kInvalidContext;
    if (mode < kGlobal || mode > kRelaxed) return kInvalidValue;
    if (stream->mode != kNone) return kIllegalState;
    stream->mode = Mode(mode), stream->spoilt = false, stream->nodes.clear();
    return stream->thread = std::this_thread::get_id(), kOk;
}
int cuStreamEndCapture(Stream* stream, Graph** graph) {
    const Lock lock(mutex);
    *graph = nullptr;
    if (!in_context()) return kInvalidContext;
    if (!exists(streams, stream)) return kInvalidHandle;
    if (!is_at_home(stream)) return kInvalidContext;
    if (stream->mode == kNone) return kIllegalState;
    if (stream->mode != kRelaxed && stream->thread != std::this_thread::get_id())
        return kCaptureWrongThread;
    stream->mode = kNone;
    if (stream->spoilt) return kCaptureInvalidated;
    *graph = new Graph{{in_context()}, stream->nodes};
    return graphs.insert(*graph), kOk;
}
int cuGraphDestroy(Graph* graph) {
    const Lock lock(mutex);
    if (!exists(graphs, graph)) return kInvalidValue;
    return graphs.erase(graph), delete graph, kOk;
}
int cuGraphInstantiateWithFlags(Executable** out, Graph* graph, unsigned long long flags) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(graphs, graph) || flags != 0) return kInvalidValue;
    if (!is_at_home(graph)) return kInvalidContext;
    const uint64_t nbytes = graph_bytes * graph->nodes.size();
    uint64_t& taken = used[in_context()->device];
    if (taken + nbytes > kCardBytes) return kOutOfMemory;
    // Half of the memory now, the rest at the upload.
    taken += nbytes / 2;
    *out = new Executable{{{in_context()}, graph->nodes}, nbytes / 2};
    return executables.insert(*out), kOk;
}
int cuGraphUpload(Executable* graph, Stream* stream) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(executables, graph) || !exists(streams, stream)) return kInvalidHandle;
    if (!is_at_home(graph) || !is_at_home(stream)) return kInvalidContext;
    const uint64_t nbytes = graph_bytes * graph->nodes.size();
    used[in_context()->device] += nbytes - graph->nbytes;
    return graph->nbytes = nbytes, kOk;
}
int cuGraphLaunch(Executable* graph, Stream* stream) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(executables, graph)) return kInvalidHandle;
    if (!is_at_home(graph)) return kInvalidContext;
    last_stream = reinterpret_cast<uint64_t>(stream);
    for (const Node& node : graph->nodes) {
        if (!exists(functions, node.function)) return kInvalidHandle;
        if (const int code = run(node)) return code;
    }
    return kOk;
}
int cuGraphExecDestroy(Executable* graph) {
    const Lock lock(mutex);
    if (!in_context()) return kInvalidContext;
    if (!exists(executables, graph)) return kInvalidHandle;
    if (!is_at_home(graph)) return kInvalidContext;
    used[in_context()->device] -= graph->nbytes;
    return executables.erase(graph), delete graph, kOk;
}

int cuGetErrorString(int code, const char** text) {
    *text = code == kOutOfMemory          ? "out of memory"
            : code == kInvalidContext     ? "invalid device context"
            : code == kNotFound           ? "named symbol not found"
            : code == kInvalidImage       ? "device kernel image is invalid"
            : code == kInvalidHandle      ? "invalid resource handle"
            : code == kCaptureUnsupported ? "operation not permitted when stream is capturing"
            : code == kCaptureInvalidated
                ? "operation failed due to a previous error during capture"
            : code == kLaunchFailed ? message.c_str()
                                    : nullptr;
    return *text == nullptr ? kInvalidValue : kOk;
}
}
