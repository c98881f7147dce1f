// A CUDA driver without a card: checks what exl_loader/kernels/cuda/driver.py asks of it, and
// hands launches to the emulated kernels. As strict as the real one where that is documented.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

enum { kOk = 0, kInvalidValue = 1, kInvalidContext = 201, kInvalidImage = 200,
       kNotFound = 500, kLaunchFailed = 719 };
constexpr int kDefaultShared = 48 << 10, kSharedLimit = 99 << 10;

struct Context { int device, retained; };
struct Module { std::string image; };
struct Function { std::string name; int shared = kDefaultShared; };
using Launch = int (*)(const char*, const uint32_t*, int, int, void**, char*, int);

Context contexts[2] = {{0, 0}, {1, 0}};
thread_local std::vector<Context*> current;
bool initialised = false;
int modules_loaded = 0, version = 13000;
int capability[2] = {9, 0};
uint64_t last_stream = 0;
Launch launch_emulated = nullptr;
std::string message;

bool in_context() { return !current.empty() && current.back()->retained > 0; }

// The size of an ELF file, which a cubin is: its section headers come last.
uint64_t elf_bytes(const char* image) {
    uint64_t offset;
    uint16_t entry_bytes, entries;
    std::memcpy(&offset, image + 40, 8);
    std::memcpy(&entry_bytes, image + 58, 2);
    std::memcpy(&entries, image + 60, 2);
    return offset + uint64_t(entry_bytes) * entries;
}

}  // namespace

extern "C" {

void fake_configure(void* launch, int major, int minor, int driver_version) {
    launch_emulated = reinterpret_cast<Launch>(launch);
    capability[0] = major, capability[1] = minor, version = driver_version;
}
int fake_modules() { return modules_loaded; }
int fake_retained(int device) { return contexts[device].retained; }
uint64_t fake_stream() { return last_stream; }
int fake_current() { return current.empty() ? -1 : current.back()->device; }
void fake_push(int device) { current.push_back(&contexts[device]); }

int cuInit(unsigned) { return initialised = true, kOk; }
int cuDriverGetVersion(int* out) { return *out = version, kOk; }
int cuDeviceGet(int* device, int ordinal) {
    if (!initialised || ordinal < 0 || ordinal > 1) return 101;
    return *device = ordinal, kOk;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    const std::map<int, int> values{{16, 4}, {75, capability[0]}, {76, capability[1]},
                                    {97, kSharedLimit}};
    const auto found = values.find(attribute);
    if (found == values.end()) return kInvalidValue;
    return *value = found->second, kOk;
}
int cuDevicePrimaryCtxRetain(Context** context, int device) {
    *context = &contexts[device];
    return contexts[device].retained++, kOk;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return contexts[device].retained--, kOk; }
int cuCtxGetCurrent(Context** context) {
    return *context = current.empty() ? nullptr : current.back(), kOk;
}
int cuCtxPushCurrent_v2(Context* context) { return current.push_back(context), kOk; }
int cuCtxPopCurrent_v2(Context** context) {
    if (current.empty()) return kInvalidContext;
    *context = current.back();
    return current.pop_back(), kOk;
}
int cuModuleLoadData(Module** module, const char* image) {
    if (!in_context()) return kInvalidContext;
    if (std::memcmp(image, "\x7f" "ELF", 4) != 0) return kInvalidImage;
    *module = new Module{std::string(image, elf_bytes(image))};
    return modules_loaded++, kOk;
}
int cuCtxSynchronize() { return in_context() ? kOk : kInvalidContext; }
int cuModuleUnload(Module* module) { return delete module, modules_loaded--, kOk; }
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    const std::string section = std::string(".text.") + name;
    if (module->image.find(section.c_str(), 0, section.size() + 1) == std::string::npos)
        return kNotFound;
    return *function = new Function{name}, kOk;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute != 8 || value > kSharedLimit) return kInvalidValue;
    return function->shared = value, kOk;
}
int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments,
                   void** extra) {
    if (!in_context()) return kInvalidContext;
    if (by != 1 || bz != 1 || extra != nullptr || int(shared) > function->shared)
        return kInvalidValue;
    last_stream = reinterpret_cast<uint64_t>(stream);
    const uint32_t grid[3] = {gx, gy, gz};
    char words[512] = "";
    if (launch_emulated(function->name.c_str(), grid, int(bx), int(shared), arguments, words,
                        sizeof words) == 0)
        return kOk;
    message = words;
    return kLaunchFailed;
}
int cuGetErrorString(int code, const char** text) {
    *text = code == 2 ? "out of memory" : code == kNotFound ? "named symbol not found"
            : code == kInvalidImage ? "device kernel image is invalid"
            : code == kLaunchFailed ? message.c_str() : nullptr;
    return *text == nullptr ? kInvalidValue : kOk;
}
}
