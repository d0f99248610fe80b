// Threads, barriers and threadgroup memory. Every GPU thread of one threadgroup is a fiber; fibers switch only at
// barriers and simd operations. Threadgroups run one after another. Works plain, with -fsanitize=address and =thread.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>
#include "types.h"
#if defined(__SANITIZE_ADDRESS__)
#define MSL_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define MSL_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MSL_ASAN 1
#elif __has_feature(thread_sanitizer)
#define MSL_TSAN 1
#endif
#endif
#ifdef MSL_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef MSL_TSAN // the scheduler must not look like accesses of the kernel's threads
#include <sanitizer/tsan_interface.h>
#define MSL_NOSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define MSL_NOSAN
#endif

namespace msl {
constexpr int WIDTH = 32; // threads in a simdgroup
constexpr int SLOT = 64; // bytes of the largest value that one lane may exchange
constexpr size_t STACK = 256 * 1024, ARENA = 128 * 1024, THREADGROUP_LIMIT = 32768;
enum State : uint8_t { RUN, SIMD, BARRIER, DONE };
struct U3 { uint x, y, z; };

struct Fiber {
  void* sp = nullptr; // saved stack pointer
  char* stack = nullptr;
  ucontext_t context;
  void* fake = nullptr; // the address sanitizer's and the thread sanitizer's own handles
  void* tsan = nullptr;
  State state = DONE;
  uint index = 0, lane = 0, simdgroup = 0; // index in the threadgroup, lane in the simdgroup
  U3 position = {0, 0, 0}; // in the threadgroup
  const char* op = ""; // what it waits for: operation, source line, and the value that it brings
  uint line = 0, bytes = 0;
  const void* value = nullptr;
  uint32_t mask = 0; // lanes that took part in its last simd operation
};

struct Memory { int id; char* start; size_t bytes; bool zeroed; }; // a threadgroup variable

struct Group { // the threadgroup that runs now
  Fiber fibers[1024], host, *current = nullptr;
  uint n_threads = 0;
  U3 position, size, full_size, n_groups, grid;
  alignas(64) char brought[32][WIDTH][SLOT]; // [simdgroup][lane]: what each lane brought to the last simd operation
  void** buffers = nullptr;
  void (*entry)(void**) = nullptr;
  const size_t* argument_bytes = nullptr; // of threadgroup arguments
  Memory memory[64];
  uint n_memory = 0;
  size_t memory_bytes = 0;
  char* arena = nullptr;
  int seed = 0;
  uint64_t random = 0;
  bool failed = false;
  char error[512] = "";
  char* sync = nullptr; // for the thread sanitizer: sync[0..31] the simdgroups' barriers, sync[32] the threadgroup's
  char sync_end;
};
static Group G;

MSL_NOSAN inline void copy_bytes(void* to, const void* from, size_t n) {
#if defined(MSL_ASAN) || defined(MSL_TSAN) // not memcpy, which the sanitizers watch
  for (size_t i = 0; i < n; i++) ((volatile char*)to)[i] = ((const volatile char*)from)[i];
#else
  __builtin_memcpy(to, from, n);
#endif
}
MSL_NOSAN inline void fill_bytes(void* to, char value, size_t n) {
  for (size_t i = 0; i < n; i++) ((volatile char*)to)[i] = value;
}

// The first failure of a run is kept; the host reports it.
MSL_NOSAN inline void fail(const char* format, ...) {
  if (G.failed) return;
  G.failed = true;
  char text[sizeof G.error];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  copy_bytes(G.error, text, sizeof text);
}

// ---------------------------------------------------------------- switching
#if defined(__x86_64__) && !defined(MSL_UCONTEXT)
extern "C" void msl_switch(void** save, void* load);
asm(".text\n.type msl_switch,@function\nmsl_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
MSL_NOSAN inline void raw_switch(Fiber* from, Fiber* to) { msl_switch(&from->sp, to->sp); }
MSL_NOSAN inline void raw_make(Fiber* f, void (*function)()) {
  void** top = (void**)(f->stack + STACK) - 3;
  *top = nullptr;
  *--top = (void*)function;
  f->sp = top - 6; // six registers, zero in fresh pages or left from before
}
#else
inline void raw_switch(Fiber* from, Fiber* to) { swapcontext(&from->context, &to->context); }
inline void raw_make(Fiber* f, void (*function)()) {
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = STACK;
  f->context.uc_link = nullptr;
  makecontext(&f->context, function, 0);
}
#endif
MSL_NOSAN inline void switch_to(Fiber* from, Fiber* to, bool ends = false) {
  (void)ends;
#ifdef MSL_ASAN
  __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake, to->stack, STACK);
#endif
#ifdef MSL_TSAN
  __tsan_switch_to_fiber(to->tsan, 1 /* switching orders nothing; barriers do */);
#endif
  raw_switch(from, to);
#ifdef MSL_ASAN
  __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}
MSL_NOSAN inline void block(State state, const char* op, uint line, const void* value = nullptr, uint bytes = 0) {
  Fiber* f = G.current;
  f->state = state, f->op = op, f->line = line, f->value = value, f->bytes = bytes;
  switch_to(f, &G.host);
}
MSL_NOSAN inline void fiber_main() {
#ifdef MSL_ASAN
  __sanitizer_finish_switch_fiber(nullptr, (const void**)&G.host.stack, nullptr);
#endif
  G.entry(G.buffers);
#ifdef MSL_TSAN
  __tsan_release(&G.sync_end);
#endif
  G.current->state = DONE;
  switch_to(G.current, &G.host, true);
  __builtin_trap();
}

// ---------------------------------------------------------------- threadgroup memory
// Allocated by the first thread that reaches the variable and filled with 0xff: NaN for every floating type. So is a
// guard behind each variable, unless the address sanitizer watches.
inline size_t guard_bytes(size_t bytes) { return 64 + -bytes % 64; } // keeps variables at multiples of 64
MSL_NOSAN inline char* threadgroup_memory(int id, size_t bytes) {
  for (uint i = 0; i < G.n_memory; i++)
    if (G.memory[i].id == id && G.memory[i].bytes == bytes) return G.memory[i].start;
  if (G.memory_bytes + bytes > THREADGROUP_LIMIT || G.n_memory == 64) {
    fail("%zu bytes of threadgroup memory; the limit is %zu", G.memory_bytes + bytes, THREADGROUP_LIMIT);
    block(BARRIER, "threadgroup memory", 0);
  }
#ifdef MSL_ASAN // a block of its own, so that its end is watched
  char* start = (char*)::operator new(bytes, std::align_val_t(64));
#else
  char* start = G.arena;
  G.arena += bytes + guard_bytes(bytes);
  fill_bytes(start + bytes, char(0xff), guard_bytes(bytes));
#endif
  G.memory_bytes += bytes;
  G.memory[G.n_memory++] = Memory{id, start, bytes, false};
  fill_bytes(start, char(0xff), bytes);
  return start;
}
MSL_NOSAN inline void check_guards() {
#ifndef MSL_ASAN
  for (uint i = 0; i < G.n_memory; i++)
    for (size_t k = 0, bytes = G.memory[i].bytes; k < guard_bytes(bytes); k++)
      if (((volatile char*)G.memory[i].start)[bytes + k] != char(0xff))
        return fail("a thread wrote outside of a threadgroup variable of %zu bytes", bytes);
#endif
}
template <class T> inline T& threadgroup_variable(int id) { return *(T*)threadgroup_memory(id, sizeof(T)); }
MSL_NOSAN inline void zero_once(void* variable, size_t bytes) { // `= {0}`: by the first thread that comes by
  for (uint i = 0; i < G.n_memory; i++)
    if (G.memory[i].start == variable && !G.memory[i].zeroed) {
      G.memory[i].zeroed = true;
      fill_bytes(variable, 0, bytes);
    }
}

// ---------------------------------------------------------------- scheduling
// seed 0: threads, simdgroups and threadgroups in order; 1: all reversed; 2 and more: threads and simdgroups shuffled
// anew between any two synchronisations, and the threadgroups reversed if the seed is odd.
MSL_NOSAN inline void order(uint* out, uint n) {
  for (uint i = 0; i < n; i++) out[i] = G.seed == 1 ? n - 1 - i : i;
  if (G.seed < 2) return;
  for (uint i = n; i > 1; i--) {
    G.random = G.random * 6364136223846793005ull + 1442695040888963407ull;
    uint k = (G.random >> 33) % i, t = out[i - 1];
    out[i - 1] = out[k], out[k] = t;
  }
}
// A simd operation completes once every lane of the simdgroup is blocked; lanes that wait at the same operation and
// line are one group, the others are inactive in it.
MSL_NOSAN inline bool complete_simd_operations(uint simdgroup, uint lo, uint hi) {
  bool any = false;
  for (uint i = lo; i < hi; i++) {
    Fiber& a = G.fibers[i];
    if (a.state != SIMD) continue;
    any = true;
    uint32_t mask = 0;
    for (uint j = lo; j < hi; j++) {
      Fiber& b = G.fibers[j];
      if (b.state == SIMD && b.line == a.line && b.op == a.op && b.bytes == a.bytes) mask |= 1u << (j - lo);
    }
    for (uint j = lo; j < hi; j++) {
      if (!(mask >> (j - lo) & 1)) continue;
      Fiber& b = G.fibers[j];
      copy_bytes(G.brought[simdgroup][j - lo], b.value, b.bytes);
      b.mask = mask;
      b.state = RUN;
    }
  }
  return any;
}
// Run one simdgroup until every lane is done or waits at a threadgroup barrier; false after a failure.
MSL_NOSAN inline bool run_simdgroup(uint simdgroup) {
  uint lo = simdgroup * WIDTH, hi = lo + WIDTH < G.n_threads ? lo + WIDTH : G.n_threads, lanes[WIDTH];
  do {
    order(lanes, hi - lo);
    for (uint i = 0; i < hi - lo; i++) {
      Fiber* f = &G.fibers[lo + lanes[i]];
      if (f->state != RUN) continue;
      G.current = f;
      switch_to(&G.host, f);
      if (G.failed) return false;
    }
  } while (complete_simd_operations(simdgroup, lo, hi));
  return true;
}
// All threads stand at one and the same barrier, or have all returned; anything else is a failure.
MSL_NOSAN inline bool pass_barrier() {
  uint waiting = 0, done = 0;
  const Fiber* at = nullptr;
  for (uint i = 0; i < G.n_threads; i++) {
    Fiber& f = G.fibers[i];
    if (f.state == DONE) done++;
    if (f.state != BARRIER) continue;
    if (at && at->line != f.line)
      fail("threadgroup_barrier divergence: thread %u waits at line %u, thread %u at line %u", at->index, at->line,
           f.index, f.line);
    at = &f;
    waiting++;
  }
  if (!waiting) return false;
  if (done)
    fail("threadgroup_barrier at line %u: %u of %u threads have already returned", at->line, done, G.n_threads);
  for (uint i = 0; i < G.n_threads; i++) G.fibers[i].state = RUN;
  return !G.failed;
}
MSL_NOSAN inline void run_threadgroup() {
  uint n_simdgroups = (G.n_threads + WIDTH - 1) / WIDTH, simdgroups[32];
  for (uint i = 0; i < G.n_threads; i++) {
    Fiber& f = G.fibers[i];
    f.index = i, f.lane = i % WIDTH, f.simdgroup = i / WIDTH, f.state = RUN;
    f.position = U3{i % G.size.x, i / G.size.x % G.size.y, i / (G.size.x * G.size.y)};
    raw_make(&f, fiber_main);
#ifdef MSL_TSAN // never destroyed: a reused one would pass for the same thread
    f.tsan = __tsan_create_fiber(0);
#endif
  }
  do {
    order(simdgroups, n_simdgroups);
    for (uint k = 0; k < n_simdgroups; k++)
      if (!run_simdgroup(simdgroups[k])) return;
  } while (pass_barrier());
}
inline uint least(uint a, uint b) { return a < b ? a : b; }
MSL_NOSAN inline int dispatch(void (*entry)(void**), void** buffers, const uint* grid, const uint* threadgroup,
                              const size_t* argument_bytes, int seed, char* error, size_t error_bytes) {
  G.entry = entry, G.buffers = buffers, G.argument_bytes = argument_bytes;
  G.failed = false, G.error[0] = 0, G.seed = seed, G.random = seed;
  G.grid = U3{grid[0], grid[1], grid[2]};
  const U3 t = {least(threadgroup[0], grid[0]), least(threadgroup[1], grid[1]), least(threadgroup[2], grid[2])};
  G.full_size = t; // as MLX launches: never larger than the grid
  const uint n = t.x * t.y * t.z;
  if (!n || n > 1024) {
    snprintf(error, error_bytes, "a threadgroup of %u threads; 1 to 1024 are possible", n);
    return 1;
  }
  G.n_groups = U3{(grid[0] + t.x - 1) / t.x, (grid[1] + t.y - 1) / t.y, (grid[2] + t.z - 1) / t.z};
#ifdef MSL_TSAN
  G.host.tsan = __tsan_get_current_fiber();
#endif
  const size_t bytes = n * STACK + ARENA; // one mapping: the stacks, then threadgroup memory
  char* mapped = nullptr;
  const uint total = G.n_groups.x * G.n_groups.y * G.n_groups.z;
  for (uint i = 0; i < total && !G.failed; i++) {
    const uint k = seed & 1 ? total - 1 - i : i;
    const uint x = k % G.n_groups.x, y = k / G.n_groups.x % G.n_groups.y, z = k / (G.n_groups.x * G.n_groups.y);
    if (!mapped)
      mapped = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    G.position = U3{x, y, z}; // the last threadgroup of an axis is smaller where the grid is no multiple
    G.size = U3{least(t.x, grid[0] - x * t.x), least(t.y, grid[1] - y * t.y), least(t.z, grid[2] - z * t.z)};
    G.n_threads = G.size.x * G.size.y * G.size.z;
    G.arena = mapped + n * STACK, G.sync = mapped + bytes - 64, G.n_memory = 0, G.memory_bytes = 0;
    for (uint j = 0; j < G.n_threads; j++) G.fibers[j].stack = mapped + j * STACK;
    run_threadgroup();
    check_guards();
#ifdef MSL_ASAN
    for (uint j = 0; j < G.n_memory; j++) ::operator delete(G.memory[j].start, std::align_val_t(64));
#endif
#ifdef MSL_TSAN // fresh addresses, or threads of two threadgroups would seem to race
    munmap(mapped, bytes);
    mapped = nullptr;
#endif
  }
  if (mapped) munmap(mapped, bytes);
#ifdef MSL_TSAN
  __tsan_acquire(&G.sync_end);
#endif
  if (G.failed)
    snprintf(error, error_bytes, "threadgroup (%u,%u,%u): %s", G.position.x, G.position.y, G.position.z, G.error);
  return G.failed;
}

// ---------------------------------------------------------------- what a kernel is given
struct Pointer { void* p; template <class T> operator T*() const { return (T*)p; } };
struct Reference { void* p; template <class T> operator T&() const { return *(T*)p; } };
struct Attribute { // taken as whatever integer or vector the kernel declares
  uint v[3];
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>> operator I() const { return I(v[0]); }
  template <class I, int N> operator metal::vec<I, N>() const {
    metal::vec<I, N> r(I(0));
    for (int i = 0; i < N; i++) r[i] = I(v[i]);
    return r;
  }
};
inline Attribute attribute(uint x) { return {{x, 0, 0}}; }
inline Attribute attribute(U3 u) { return {{u.x, u.y, u.z}}; }
#define MSL_ATTRIBUTE(name, value)                                                                   \
  MSL_NOSAN inline Attribute name() { Fiber* f = G.current; (void)f; return attribute(value); }
MSL_ATTRIBUTE(thread_position_in_grid,
              (U3{G.position.x * G.full_size.x + f->position.x, G.position.y * G.full_size.y + f->position.y,
                  G.position.z * G.full_size.z + f->position.z}))
MSL_ATTRIBUTE(thread_position_in_threadgroup, f->position)
MSL_ATTRIBUTE(thread_index_in_threadgroup, f->index)
MSL_ATTRIBUTE(thread_index_in_simdgroup, f->lane)
MSL_ATTRIBUTE(thread_index_in_quadgroup, f->index % 4)
MSL_ATTRIBUTE(simdgroup_index_in_threadgroup, f->simdgroup)
MSL_ATTRIBUTE(quadgroup_index_in_threadgroup, f->index / 4)
MSL_ATTRIBUTE(threadgroup_position_in_grid, G.position)
MSL_ATTRIBUTE(threadgroups_per_grid, G.n_groups)
MSL_ATTRIBUTE(threads_per_grid, G.grid)
MSL_ATTRIBUTE(grid_size, G.grid)
MSL_ATTRIBUTE(grid_origin, 0u)
MSL_ATTRIBUTE(threads_per_threadgroup, G.size)
MSL_ATTRIBUTE(dispatch_threads_per_threadgroup, G.full_size)
MSL_ATTRIBUTE(simdgroups_per_threadgroup, (G.n_threads + WIDTH - 1) / WIDTH)
MSL_ATTRIBUTE(quadgroups_per_threadgroup, (G.n_threads + 3) / 4)
MSL_ATTRIBUTE(dispatch_simdgroups_per_threadgroup,
              (G.full_size.x * G.full_size.y * G.full_size.z + WIDTH - 1) / WIDTH)
MSL_ATTRIBUTE(dispatch_quadgroups_per_threadgroup, (G.full_size.x * G.full_size.y * G.full_size.z + 3) / 4)
MSL_ATTRIBUTE(threads_per_simdgroup, uint(WIDTH))
MSL_ATTRIBUTE(thread_execution_width, uint(WIDTH))
} // namespace msl
