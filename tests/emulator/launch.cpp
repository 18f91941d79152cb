// One kernel as a shared library: compiled with -DSOURCE=<file> -DKERNEL=<function>.
#include SOURCE

#include <utility>

template <class... Parameters, size_t... I>
static void call(void (*kernel)(Parameters...), void* const* arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_cv_t<Parameters>*)arguments[I]...);
}
template <class... Parameters>
static void call(void (*kernel)(Parameters...), void* const* arguments) {
  call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Runs the kernel up to griddepcontrol.wait. `arguments` as cuLaunchKernelEx takes them, to be kept
// until it ends. Returns what went wrong, or "".
EXPORTED const char* begin(const uint32_t* grid, const uint32_t* block, void* const* arguments,
                           uint32_t shared_bytes, uint32_t resident, uint64_t seed) {
  machine::body = [arguments] { call(KERNEL, arguments); };
  machine::begin({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes,
                 resident, seed);
  return machine::error.c_str();
}
// Whether all of its thread blocks have let dependent kernels begin.
EXPORTED int has_triggered() { return machine::grid->triggered == machine::grid->total(); }
// The kernels ahead have ended: runs it until all blocks have triggered, and to its end.
EXPORTED const char* release() {
  machine::release();
  return machine::error.c_str();
}
EXPORTED const char* finish() {
  machine::finish();
  return machine::error.c_str();
}
