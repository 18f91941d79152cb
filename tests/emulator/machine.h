// Thread blocks of a GPU on one CPU thread, for running the kernels of cuda_src without a GPU.
//
// Every CUDA thread is a coroutine. It runs until it has to wait for another one, and which goes on
// is drawn at random, so that a missing barrier shows as a wrong result for some seed. Now and then
// a warp or a warpgroup is left behind: it goes on only when nothing else can, so that the others
// get as far ahead as the barriers let them. What the GPU does asynchronously (bulk copies, wgmma)
// waits in a queue and happens at a random time before it is waited for. When nothing can go on,
// that is a deadlock, reported with what the threads wait for.
//
// Kernels follow one another as programmatic dependent launch permits at worst. Up to
// griddepcontrol.wait a kernel finds memory as it was before the kernel ahead began; or, for other
// seeds, as it is when all blocks of that kernel have triggered, of whose threads some may go on.
//
// A thread block's stores to global memory (st.global) wait in a queue of the block. Other blocks see
// each of them at a random time before the block's next fence of GPU scope. An asynchronous access to
// global memory needs fence.proxy.async on both sides: by the block that wrote, after it wrote, and by
// the thread that copies, after its block has acquired (ld.acquire). That is more than "PTX ISA"
// demands, where one on the way is enough.
//
// Also reported: an asynchronous access to shared or global memory without such a fence, more arrivals
// than an mbarrier expects, threads of a warpgroup that do not agree on a wgmma, an access to shared
// memory beyond what the launch gives a block, and one to an unmapped address (device.guarded() puts
// arrays next to one).
//
// Not modelled: the memory model of loads, and of stores but those; time; registers.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, gridDim, blockDim;
// Where number i lies in a grid or a block.
inline dim3 place(uint64_t i, dim3 of) {
  return {(uint32_t)(i % of.x), (uint32_t)(i / of.x % of.y), (uint32_t)(i / of.x / of.y)};
}

// Every __shared__ variable lies in one section of the library, which is exchanged when another
// thread block goes on.
#define __shared__ __attribute__((section("device_shared")))
constexpr int DYNAMIC_SHARED_BYTES = 232448;
extern "C" uint8_t __start_device_shared[], __stop_device_shared[];
__shared__ __attribute__((aligned(1024))) uint8_t shared[DYNAMIC_SHARED_BYTES];

namespace machine {

constexpr int STACK_BYTES = 64 << 10, WARP = 32, WARPGROUP = 128, CHUNK = 16;
constexpr uint64_t MAX_TURNS = 1 << 22;

struct Thread {
  using Condition = bool (*)(const Thread&);
  uint32_t index = 0;
  bool started = false, ended = false;
  Condition ready = nullptr;  // nullptr: it can go on
  const void* subject = nullptr;
  uint64_t value = 0;
  const char* waits_for = "";
  uint64_t products = 0;           // wgmmas issued
  std::deque<uint64_t> product_groups;  // committed: how many were issued by then
  std::shared_ptr<int> copies;     // how many are open of the cp.async that are not committed
  std::deque<std::shared_ptr<int>> copy_groups;  // committed, the oldest first
  std::vector<uint32_t> unfenced;  // chunks of shared memory written since the last proxy fence
  uint32_t fenced_acquires = 0;    // acquires of its block that a proxy fence of its own follows
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf context;
};

// wgmma: D += A B, one operation of the four warps together, so it begins when all 128 threads have
// issued it and is complete for all of them at once.
struct Product {
  int columns = 0, issued = 0;
  bool accumulate = true, a_in_registers = false, b_mn_major = false;
  uint64_t a = 0, b = 0;  // descriptors
  void* code = nullptr;   // that issues it: the four warps must execute the same instruction
  float (*to_float)(uint16_t) = nullptr;  // of the type of A and B
  float (*of_bytes)(uint8_t) = nullptr;   // of 8-bit types, of which a product takes 32 for 16
  // Where the threads have A, if it is in registers: what is there when the product is computed counts,
  // so one that is overwritten too early is wrong.
  std::array<const uint32_t*, WARPGROUP> a_registers;
  std::array<float*, WARPGROUP> d;
};
struct Warpgroup {
  std::deque<Product> products;
  uint64_t done = 0;
};

struct Warp {
  uint64_t values[2][WARP];
  uint32_t arrived = 0, generation = 0;
};

struct Barrier {  // bar.sync
  uint32_t arrived = 0, generation = 0, threads = 0;
  int sum = 0, result = 0;
};

// Bytes on their way to global memory.
struct Store {
  uint8_t* to;
  uint32_t bytes;
  std::array<uint8_t, 16> data;
};

struct Block {
  dim3 index;
  uint64_t number;  // in the grid, from 1 on
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::array<Barrier, 16> barriers;
  std::vector<std::function<void()>> copies;
  std::vector<uint8_t> image;            // of shared memory, while another block goes on
  std::vector<uint16_t> unfenced_by;     // thread + 1 for each chunk of dynamic shared memory
  std::deque<Store> stores;              // that other blocks do not see yet
  std::vector<uint64_t> unfenced_global;  // chunks of global memory written since a proxy fence
  uint32_t acquires = 0;
  bool triggered = false;  // griddepcontrol.launch_dependents
  uint32_t alive = 0;
  bool copies_are_slow = false;
  uint32_t first_slow = 0, last_slow = 0;  // warps that are left behind: [first, last)
};

// A kernel under way.
struct Grid {
  dim3 size, block_size;
  uint32_t shared_bytes;  // dynamic ones of a block, as it was launched
  uint32_t resident;
  uint64_t next = 0, triggered = 0;  // blocks: begun; that have triggered or ended
  bool released = false;             // the kernels ahead have ended
  bool pauses = false;               // when all blocks have triggered
  uint64_t turns_left = MAX_TURNS;
  std::vector<std::unique_ptr<Block>> blocks;  // that are resident
  std::deque<Store> stores;                    // of blocks that have ended
  std::unordered_map<uint64_t, uint64_t> unfenced_by;  // block for each chunk of global memory
  uint64_t total() const { return (uint64_t)size.x * size.y * size.z; }
  bool is_pausing() const { return pauses && triggered == total(); }
};

inline std::mt19937_64 random_numbers;
inline std::unique_ptr<Grid> grid;
inline Block* block;
inline Thread* thread;
inline jmp_buf scheduler, grid_runner;  // where a thread returns to; a failure without a thread
inline std::string error;
inline std::function<void()> body;  // the kernel with its arguments

inline uint32_t draw(uint32_t below) { return random_numbers() % below; }

// ---- coroutines -----------------------------------------------------------------------------

[[noreturn]] inline void fail(const std::string& message) {
  if (error.empty()) {
    error = message;
    if (thread) {
      error += " (thread block " + std::to_string(block->index.x) + ", " +
               std::to_string(block->index.y) + ", " + std::to_string(block->index.z) +
               ", thread " + std::to_string(thread->index) + ")";
    }
  }
  _longjmp(thread ? scheduler : grid_runner, 1);
}

__attribute__((noinline)) inline void suspend() {
  if (!_setjmp(thread->context)) _longjmp(scheduler, 1);
}
// Lets others go first, sometimes.
inline void maybe_yield() {
  thread->ready = nullptr;
  if (draw(4) == 0) suspend();
}
inline void wait_until(Thread::Condition ready, const void* subject, uint64_t value,
                       const char* what) {
  Thread& t = *thread;
  t.subject = subject, t.value = value, t.waits_for = what;
  if (ready(t)) return maybe_yield();
  t.ready = ready;
  suspend();
  t.ready = nullptr;
}

inline void release_if_complete(Barrier& barrier) {
  if (barrier.threads && barrier.arrived == barrier.threads) {
    barrier.result = barrier.sum;
    barrier.arrived = barrier.sum = barrier.threads = 0;
    ++barrier.generation;
  }
}

inline void run_thread() {
  body();
  Thread& t = *thread;
  t.ended = true;
  --block->alive;
  if (block->warps[t.index / WARP].arrived) fail("a thread ended while its warp waits for it");
  Barrier& all = block->barriers[0];
  if (all.threads) --all.threads;  // ended threads count as arrived at __syncthreads
  release_if_complete(all);
  _longjmp(scheduler, 1);
}

inline void resume(Thread& t) {
  thread = &t;
  threadIdx = place(t.index, blockDim);
  if (!_setjmp(scheduler)) {
    if (t.started) _longjmp(t.context, 1);
    t.started = true;
    t.stack.reset(new char[STACK_BYTES]);
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack.get();
    t.start.uc_stack.ss_size = STACK_BYTES;
    t.start.uc_link = nullptr;
    makecontext(&t.start, run_thread, 0);
    setcontext(&t.start);
  }
  thread = nullptr;
}

// ---- kernels one after another --------------------------------------------------------------

inline void wait_for_kernels_ahead() {
  wait_until([](const Thread&) { return grid->released; }, nullptr, 0, "griddepcontrol.wait");
}
inline void trigger(Block& of) {
  if (!of.triggered) ++grid->triggered;
  of.triggered = true;
}

// ---- global memory --------------------------------------------------------------------------

inline void store(void* to, const void* from, uint32_t bytes) {
  Store made = {(uint8_t*)to, bytes, {}};
  memcpy(made.data.data(), from, bytes);
  block->stores.push_back(made);
  const uint64_t chunk = (uint64_t)to / CHUNK;
  uint64_t& by = grid->unfenced_by[chunk];
  if (by != block->number) block->unfenced_global.push_back(chunk);
  by = block->number;
}
// The first of the stores arrive.
inline void drain(std::deque<Store>& stores, size_t count) {
  for (; count && !stores.empty(); --count) {
    const Store arriving = stores.front();
    stores.pop_front();
    memcpy(arriving.to, arriving.data.data(), arriving.bytes);
  }
}
inline void fence_gpu() { drain(block->stores, SIZE_MAX); }
inline void acquired() { ++block->acquires; }
inline void fence_global_proxy() {
  for (const uint64_t chunk : block->unfenced_global) {
    const auto found = grid->unfenced_by.find(chunk);
    if (found != grid->unfenced_by.end() && found->second == block->number) {
      grid->unfenced_by.erase(found);
    }
  }
  block->unfenced_global.clear();
  thread->fenced_acquires = block->acquires;
}
// Before an asynchronous read by this thread.
inline void require_global_fences(const void* from, uint32_t bytes) {
  if (thread->fenced_acquires != block->acquires) {
    fail("bulk copy of global memory without fence.proxy.async since its block acquired");
  }
  for (uint64_t chunk = (uint64_t)from / CHUNK; chunk * CHUNK < (uint64_t)from + bytes; ++chunk) {
    const auto found = grid->unfenced_by.find(chunk);
    if (found != grid->unfenced_by.end()) {
      fail("bulk copy of global memory, which block " + std::to_string(found->second - 1) +
           " wrote without fence.proxy.async since");
    }
  }
}

// ---- what threads do together ---------------------------------------------------------------

// The values of all lanes of the warp, once all of them have come here.
inline const uint64_t* exchange(uint64_t value, const char* what) {
  Warp& w = block->warps[thread->index / WARP];
  const uint32_t generation = w.generation;
  uint64_t* values = w.values[generation & 1];
  values[thread->index % WARP] = value;
  if (++w.arrived == WARP) {
    w.arrived = 0;
    ++w.generation;
    maybe_yield();
  } else {
    wait_until([](const Thread& t) { return ((const Warp*)t.subject)->generation != t.value; },
               &w, generation, what);
  }
  return values;
}

inline int barrier_arrive(int number, uint32_t threads, bool wait, int summand = 0) {
  Barrier& barrier = block->barriers[number];
  const uint32_t generation = barrier.generation;
  if (barrier.threads && barrier.threads != threads) fail("bar.sync with another count of threads");
  barrier.threads = threads;
  ++barrier.arrived;
  barrier.sum += summand;
  release_if_complete(barrier);
  if (!wait) return 0;
  wait_until([](const Thread& t) { return ((const Barrier*)t.subject)->generation != t.value; },
             &barrier, generation, "bar.sync");
  return barrier.result;
}

// ---- shared memory and the asynchronous proxy -----------------------------------------------

inline uint8_t* at(uint32_t address, uint32_t bytes) {
  if (address % bytes || address + bytes > grid->shared_bytes) {
    fail("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(address));
  }
  return shared + address;
}
inline void wrote(uint32_t address) {
  uint16_t& by = block->unfenced_by[address / CHUNK];
  if (by != thread->index + 1) thread->unfenced.push_back(address / CHUNK);
  by = thread->index + 1;
}
inline void fence() {
  for (const uint32_t chunk : thread->unfenced) {
    uint16_t& by = block->unfenced_by[chunk];
    if (by == thread->index + 1) by = 0;
  }
  thread->unfenced.clear();
}
// For what all threads wrote; whether this thread has met them, it does not see.
inline void fence_all() {
  Thread* const own = thread;
  for (Thread& t : block->threads) {
    thread = &t;
    fence();
  }
  thread = own;
}
// cp.async: an ordinary write to shared memory, but at some time before the thread waits for it.
inline void copy_later(std::function<void()> copy, uint32_t to) {
  Thread* const owner = thread;
  if (!owner->copies) owner->copies = std::make_shared<int>(0);
  ++*owner->copies;
  block->copies.push_back([copy = std::move(copy), open = owner->copies, owner, to] {
    copy();
    block->unfenced_by[to / CHUNK] = owner->index + 1;
    owner->unfenced.push_back(to / CHUNK);
    --*open;
  });
}
inline void commit_copies() {
  thread->copy_groups.push_back(thread->copies ? thread->copies : std::make_shared<int>(0));
  thread->copies = nullptr;
}
// For all groups but the newest `newest`.
inline void wait_for_copies(uint64_t newest) {
  wait_until(
      [](const Thread& t) {
        for (size_t i = 0; i + t.value < t.copy_groups.size(); ++i) {
          if (*t.copy_groups[i]) return false;
        }
        return true;
      },
      nullptr, newest, "cp.async.wait_group");
  while (thread->copy_groups.size() > newest) thread->copy_groups.pop_front();
}
// For an asynchronous access.
inline uint8_t* at_async(uint32_t address, uint32_t bytes) {
  const uint16_t by = block->unfenced_by[address / CHUNK];
  if (by) {
    fail("asynchronous access to byte " + std::to_string(address) + " of shared memory, which" +
         " thread " + std::to_string(by - 1) + " wrote without fence.proxy.async since");
  }
  return at(address, bytes);
}
inline uint32_t swizzle_128b(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---- mbarrier -------------------------------------------------------------------------------

struct Mbarrier {
  uint64_t phase : 1, count : 15, pending : 16;
  int64_t bytes : 32;
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier(uint32_t address) { return *(Mbarrier*)at(address, 8); }
inline void complete_phase(Mbarrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.count;
  }
}
inline void arrive(uint32_t address, uint32_t count, uint32_t bytes = 0) {
  Mbarrier& b = mbarrier(address);
  if (b.pending < count) fail("more arrivals at an mbarrier than it expects");
  b.bytes += bytes;
  b.pending -= count;
  complete_phase(b);
}
inline void complete_bytes(uint32_t address, uint32_t bytes) {
  Mbarrier& b = mbarrier(address);
  b.bytes -= bytes;
  complete_phase(b);
}
inline void wait_for_phase(uint32_t address, uint32_t parity, const char* what) {
  wait_until([](const Thread& t) { return ((const Mbarrier*)t.subject)->phase != t.value; },
             &mbarrier(address), parity, what);
}

// ---- wgmma ----------------------------------------------------------------------------------

inline float to_float(uint16_t x);  // the kernel's 16-bit type

inline uint32_t field(uint64_t descriptor, int from) { return (descriptor >> from & 0x3fff) << 4; }
// Element `k` of row `i` of a K-major operand.
inline uint16_t k_major(uint64_t descriptor, int i, int k) {
  const uint32_t start = field(descriptor, 0), leading = field(descriptor, 16);
  const uint32_t stride = field(descriptor, 32);
  const bool swizzled = descriptor >> 62 == 1;
  const uint32_t group = start + i / 8 * stride;  // of 8 rows
  const uint32_t address = swizzled ? swizzle_128b(group + i % 8 * 128 + k * 2)
                                    : group + i % 8 * 16 + k / 8 * leading + k % 8 * 2;
  return *(uint16_t*)at_async(address, 2);
}
// Element `k` of column `n` of an MN-major operand, 128-byte swizzle.
inline uint16_t mn_major(uint64_t descriptor, int n, int k) {
  const uint32_t address = field(descriptor, 0) + n / 64 * field(descriptor, 16) +
                           k / 8 * field(descriptor, 32) + k % 8 * 128 + n % 64 * 2;
  return *(uint16_t*)at_async(swizzle_128b(address), 2);
}

inline void execute(const Product& product) {
  static float a[64][32], b[32][256];
  const int of_register = product.of_bytes ? 4 : 2, of_half = of_register / 2, depth = 8 * of_register;
  auto element = [&](uint32_t x, int i) {
    return product.of_bytes ? product.of_bytes(x >> 8 * i & 0xff)
                            : product.to_float(x >> 16 * i & 0xffff);
  };
  for (int t = 0; t < WARPGROUP && product.a_in_registers; ++t) {
    const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * of_register;
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < of_register; ++i) {
        a[row + r % 2 * 8][column + r / 2 * 4 * of_register + i] =
            element(product.a_registers[t][r], i);
      }
    }
  }
  for (int row = 0; row < 64 && !product.a_in_registers; ++row) {
    for (int k = 0; k < depth; ++k) {
      a[row][k] = element(k_major(product.a, row, k / of_half), k % of_half);
    }
  }
  for (int n = 0; n < product.columns; ++n) {
    for (int k = 0; k < depth; ++k) {
      const int half = k / of_half;
      b[k][n] = element(product.b_mn_major ? mn_major(product.b, n, half)
                                           : k_major(product.b, n, half), k % of_half);
    }
  }
  for (int row = 0; row < 64; ++row) {
    float sum[256] = {};
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < product.columns; ++n) sum[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < product.columns; ++n) {
      const int t = row / 16 * 32 + row % 8 * 4 + n % 8 / 2;
      float& d = product.d[t][n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
      d = product.accumulate ? d + sum[n] : sum[n];
    }
  }
}

inline Warpgroup& warpgroup() { return block->warpgroups[thread->index / WARPGROUP]; }
__attribute__((noinline)) inline void issue(Product mine, const uint32_t* a_registers, float* d) {
  mine.code = __builtin_return_address(0);
  Warpgroup& group = warpgroup();
  const uint64_t place = thread->products++ - group.done;
  if (place == group.products.size()) group.products.push_back(mine);
  Product& product = group.products[place];
  if (product.a != mine.a || product.b != mine.b || product.columns != mine.columns ||
      product.accumulate != mine.accumulate || product.code != mine.code) {
    fail("the threads of a warpgroup do not agree on a wgmma");
  }
  const uint32_t t = thread->index % WARPGROUP;
  product.a_registers[t] = a_registers;
  product.d[t] = d;
  ++product.issued;
  maybe_yield();
}
inline void commit_products() { thread->product_groups.push_back(thread->products); }
// For all groups but the newest `newest`.
inline void wait_for_products(size_t newest = 0) {
  auto& groups = thread->product_groups;
  if (groups.size() <= newest) return;
  wait_until([](const Thread& t) { return ((const Warpgroup*)t.subject)->done >= t.value; },
             &warpgroup(), groups[groups.size() - 1 - newest], "wgmma.wait_group");
  while (groups.size() > newest) groups.pop_front();
}

// ---- the scheduler --------------------------------------------------------------------------

inline bool copy_something() {
  if (block->copies.empty()) return false;
  std::swap(block->copies[draw(block->copies.size())], block->copies.back());
  const auto copy = std::move(block->copies.back());
  block->copies.pop_back();
  copy();
  return true;
}
inline bool multiply_something() {
  const uint32_t first = draw(block->warpgroups.size() + 1);
  for (size_t i = 0; i < block->warpgroups.size(); ++i) {
    Warpgroup& group = block->warpgroups[(first + i) % block->warpgroups.size()];
    if (group.products.empty() || group.products.front().issued < WARPGROUP) continue;
    execute(group.products.front());
    group.products.pop_front();
    ++group.done;
    return true;
  }
  return false;
}
// One of the block's asynchronous operations, if it has any. For a while wgmma is slow, and then
// copies are: they happen only when no thread can go on.
inline bool work_asynchronously(bool idle) {
  if (draw(256) == 0) block->copies_are_slow = draw(2);
  if (draw(64) == 0) drain(block->stores, draw(64));
  if (!block->copies_are_slow) return copy_something() || multiply_something();
  return multiply_something() || (idle && copy_something());
}

// For a while nobody, a warp or a warpgroup is slow.
inline void leave_behind() {
  const uint32_t warps = block->warps.size(), groups = block->warpgroups.size();
  block->first_slow = draw(2) ? draw(warps) : draw(groups) * (WARPGROUP / WARP);
  block->last_slow = block->first_slow + draw(2) * (draw(2) ? 1 : WARPGROUP / WARP);
}

// Gives most of the threads that can go on a turn, in some order; false if there were none. Either
// the slow ones or the others.
inline bool sweep(bool slow) {
  static constexpr uint32_t STRIDES[] = {1, 7, 19, 61, 257, 701};  // prime to any count of threads
  const uint32_t count = block->threads.size();
  const uint32_t stride = STRIDES[draw(6)];
  uint32_t i = draw(count);
  bool any = false;
  for (uint32_t n = 0; n < count; ++n, i = (i + stride) % count) {
    Thread& t = block->threads[i];
    if (t.ended || (t.ready && !t.ready(t))) continue;
    const uint32_t warp = i / WARP;
    if ((warp >= block->first_slow && warp < block->last_slow) != slow) continue;
    any = true;
    if (draw(8) == 0) continue;
    resume(t);
    if (!error.empty()) return false;
    if (grid->is_pausing()) return true;
    if (draw(64) == 0) work_asynchronously(false);
  }
  return any;
}

inline void activate(Block& next) {
  const size_t bytes = __stop_device_shared - __start_device_shared;
  if (block == &next) return;
  if (block) memcpy(block->image.data(), __start_device_shared, bytes);
  memcpy(__start_device_shared, next.image.data(), bytes);
  block = &next;
  blockIdx = next.index;
}

inline std::unique_ptr<Block> make_block(uint64_t number) {
  const uint32_t threads = blockDim.x * blockDim.y * blockDim.z;
  auto made = std::make_unique<Block>();
  made->index = place(number, gridDim);
  made->number = number + 1;
  made->threads = std::vector<Thread>(threads);
  for (uint32_t i = 0; i < threads; ++i) made->threads[i].index = i;
  made->warps.resize(threads / WARP);
  made->warpgroups.resize(threads / WARPGROUP);
  made->image.resize(__stop_device_shared - __start_device_shared);
  for (auto& byte : made->image) byte = random_numbers();  // shared memory comes as it is
  made->unfenced_by.resize(DYNAMIC_SHARED_BYTES / CHUNK);
  made->alive = threads;
  made->copies_are_slow = draw(2);
  return made;
}

inline void end_block(size_t chosen) {
  auto& blocks = grid->blocks;
  if (!block->copies.empty()) fail("a thread block ended before its bulk copies did");
  trigger(*block);
  grid->stores.insert(grid->stores.end(), block->stores.begin(), block->stores.end());
  block = nullptr;
  blocks.erase(blocks.begin() + chosen);
}

inline void report_deadlock() {
  std::map<std::string, int> counts;
  for (const auto& b : grid->blocks) {
    for (const Thread& t : b->threads) {
      if (!t.ended) ++counts["warp " + std::to_string(t.index / WARP) + " in " + t.waits_for];
    }
  }
  error = "deadlock:";
  for (const auto& [what, count] : counts) {
    error += " " + std::to_string(count) + " of " + what + ",";
  }
  error.pop_back();
}

// Lets the thread blocks go on, `resident` at a time, until all have ended, or the grid pauses, or
// nothing can go on. That is a deadlock, unless the kernels ahead are yet to end.
inline void go_on() {
  auto& blocks = grid->blocks;
  uint32_t stuck = 0;  // turns since something went on
  if (_setjmp(grid_runner)) return;
  while (error.empty()) {
    while (blocks.size() < grid->resident && grid->next < grid->total()) {
      blocks.push_back(make_block(grid->next++));
    }
    if (blocks.empty()) break;
    if (grid->is_pausing()) return;
    const size_t chosen = draw(blocks.size());
    activate(*blocks[chosen]);
    bool any = false;
    for (uint32_t turns = draw(200) + 1; turns && error.empty() && !grid->is_pausing(); --turns) {
      if (--grid->turns_left == 0) error = "no end in sight";
      if (draw(1024) == 0) leave_behind();
      const bool went_on = sweep(false);
      if (!error.empty() || !(went_on || work_asynchronously(true) || sweep(true))) break;
      any = true;
    }
    if (error.empty() && block->alive == 0) {
      end_block(chosen);
      any = true;
    }
    stuck = any ? 0 : stuck + 1;
    if (stuck > 64 + 16 * blocks.size()) {
      if (!grid->released) return;
      report_deadlock();
    }
  }
  drain(grid->stores, SIZE_MAX);
}

// ---- from outside ---------------------------------------------------------------------------

inline void on_fault(int, siginfo_t* info, void*) {
  char address[32];
  snprintf(address, sizeof(address), "%p", info->si_addr);
  fail(std::string("access to memory where no array is, at ") + address);
}
// The same, with faults as failures.
inline void go_on_guarded() {
  struct sigaction ours = {}, before;
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;  // a failure leaves the handler by a jump
  sigaction(SIGSEGV, &ours, &before);
  gridDim = grid->size, blockDim = grid->block_size;
  go_on();
  thread = nullptr;
  sigaction(SIGSEGV, &before, nullptr);
}
// A kernel up to griddepcontrol.wait.
inline void begin(dim3 size, dim3 block_size, uint32_t shared_bytes, uint32_t resident,
                  uint64_t seed) {
  random_numbers.seed(seed);
  error.clear();
  block = nullptr, thread = nullptr;
  grid = std::make_unique<Grid>();
  grid->size = size, grid->block_size = block_size, grid->resident = resident;
  grid->shared_bytes = shared_bytes;
  if (shared_bytes > DYNAMIC_SHARED_BYTES) {
    error = "more shared memory than a block can have";
    return;
  }
  go_on_guarded();
}
// From there until all blocks have triggered, and to its end.
inline void release() {
  grid->released = grid->pauses = true;
  if (error.empty()) go_on_guarded();
}
inline void finish() {
  grid->released = true, grid->pauses = false;
  if (error.empty()) go_on_guarded();
}

}  // namespace machine
