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

// `arguments` as cuLaunchKernelEx takes them. Returns what went wrong, or "".
extern "C" const char* emulate(const uint32_t* grid, const uint32_t* block, void* const* arguments,
                               uint32_t resident, uint64_t seed) {
  machine::body = [arguments] { call(KERNEL, arguments); };
  machine::run({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, resident, seed);
  return machine::error.c_str();
}
