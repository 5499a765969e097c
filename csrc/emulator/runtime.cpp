// The runtime: fibers, barriers, warps, copies, fragments, checks.
#include "emulator/runtime.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "emulator/control.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_leaks=0";
}  // kernels that end early leave theirs
#else
#define ASAN 0
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)0)
#endif

namespace less::emulator {
Context* current = nullptr;
dim3 block_dim, grid_dim;
uint32_t cluster_size = 1;
bool tracking = false;
static bool use_ptx = getenv("LESS_EMULATOR_PTX") != nullptr;
enum class Sched { InOrder, Reverse, Random, WarpAhead };
enum class Async { Late, Early, Random };  // when a cp.async / bulk copy becomes visible

struct Config {
  Sched sched = Sched::InOrder;
  uint64_t seed = 1;
  Async async = Async::Late;
  bool strict_loc =
      true;  // barrier/shuffle must be reached at the same source line by all participants
  bool shuffle_orders_memory = false;
  int preempt_every = 0;  // tracked builds: switch fiber after ~N tracked accesses (0 = never)
  bool trace = true;      // tracked builds: collect per-instruction memory statistics
  bool race = true;       // tracked builds: happens-before race check, init check, bounds check
  int max_errors = 20;
};

struct Error {
  std::string kind, msg;
};

struct PcStat {  // one memory instruction (call site)
  const void* pc = nullptr;
  std::string where;
  bool write = false, shared = false;
  unsigned size = 0;
  uint64_t requests = 0, lanes = 0, bytes = 0 /*unique bytes asked by warp*/, sectors = 0,
           ideal_sectors = 0, wavefronts = 0, ideal_wavefronts = 0;
};
struct Stats {
  uint64_t blocks = 0, threads = 0, barriers = 0, warp_ops = 0, switches = 0, cp_async = 0,
           cp_async_bytes = 0, atomics = 0, tracked = 0;
  uint64_t g_ld_bytes = 0, g_ld_sectors = 0, g_ld_ideal = 0, g_st_bytes = 0, g_st_sectors = 0,
           g_st_ideal = 0;
  uint64_t s_req = 0, s_wave = 0, s_ideal = 0;
  uint64_t touched_ld_sectors = 0,
           touched_st_sectors = 0;  // distinct 32-byte sectors in the launch
  std::vector<PcStat> pcs;
};

struct Copy {
  void* dst;
  const void* src;
  unsigned n, zfill;
  bool done;
  const char* file;
  int line;
};

struct Thread : Context {
  void* sp = nullptr;
  int lin = 0, warp = 0;
  int st = 0;  // 0 ready 1 waiting 2 done
  const char* wkind = "";
  const char* wfile = "";
  int wline = 0;
  unsigned wmask = 0;
  std::vector<Copy> cur_group;
  std::vector<std::vector<Copy>> groups;
  unsigned char* stack = nullptr;
  size_t stack_sz = 0;
  void* fake = nullptr;
  uint32_t clk = 1;
  std::vector<uint32_t> vc;   // happens-before clocks inside the block
  std::vector<uint32_t> occ;  // per-pc occurrence counter since last warp sync
};

enum { kRead = 0, kWrite = 1, kAtomic = 2, kVolRead = 3, kVolWrite = 4 };
static Config cfg;
static Stats stats;
static std::vector<Error> errors;
static void access_n(const void* p, unsigned n, int kind, const void* pc);
static void access_at(const void* p, unsigned n, int kind, const char* f, int l);
static Thread* cur = nullptr;

static std::map<std::string, Translated>& ptx_kernels() {
  static std::map<std::string, Translated> m;
  return m;
}
Registered::Registered(const char* name, Translated kernel) { ptx_kernels()[name] = kernel; }
Translated translated(const void* k) {
  if (!use_ptx) return nullptr;
  Dl_info d;
  if (!dladdr(k, &d) || !d.dli_sname) return nullptr;
  auto i = ptx_kernels().find(d.dli_sname);
  if (i == ptx_kernels().end()) {
    error("ptx", "no translated kernel %s", d.dli_sname);
    return nullptr;
  }
  return i->second;
}

// ------------------------------------------------------------------------------------------------
// context switch
#if defined(__x86_64__)
extern "C" void less_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl less_emulator_switch
.hidden less_emulator_switch
.type less_emulator_switch,@function
less_emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size less_emulator_switch,.-less_emulator_switch
)");
#else
#error "add a context switch for this CPU"
#endif

static uint64_t rng_s = 88172645463325252ull;
static inline uint64_t rnd() {
  rng_s ^= rng_s << 13;
  rng_s ^= rng_s >> 7;
  rng_s ^= rng_s << 17;
  return rng_s;
}

// ------------------------------------------------------------------------------------------------
// state of a block
struct Bar {
  int count = 0, expected = 0, acc = 0, gen = 0, res[2] = {0, 0};
  const char* f = "";
  int l = 0;
  std::vector<Thread*> wait;
  std::vector<uint32_t> vc;
};
struct WOp {
  unsigned char data[32][kExchangeStride];
  unsigned mask, arrived, left, live;
  const char* kind;
  const char* f;
  int l;
  bool done, orders;
  Thread* waiters[32];
};
struct Bulk {
  Copy c;
  uint64_t* b;
};
struct MBar {
  unsigned count = 0, pending = 0;
  int64_t tx = 0;
  unsigned phase = 0;
  std::vector<Thread*> wait;
  std::vector<uint32_t> vc;
};
struct Group {
  unsigned mask = 0, size = 0;
  int kind = 0;
  bool shared = false;
  uint64_t addr[32];
};
struct Warp {
  std::vector<WOp*> ops;
  unsigned exited = 0;
  std::vector<std::vector<Group>> groups;
  std::vector<int> used;
};

static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<Thread*> ready;  // FIFO in [rhead, size)
static size_t rhead = 0;
static Bar bars[16];
static std::unordered_map<uint64_t*, MBar> mbars;
static std::vector<Bulk> bulks;
static std::vector<WOp*> freeops;
static int nthr, nalive;
static uint32_t blk_serial = 0, launch_first = 1;
static uint32_t proxy_clk;
static std::vector<uint32_t> base_vc;
static void* main_sp;
[[maybe_unused]] static void* main_fake;
static void (*body)(void*);
static void* body_arg;
static bool dead, in_kernel = false;
static int prefer_warp;
static const size_t kStack = ASAN ? 256 << 10 : 64 << 10;
static std::vector<unsigned char*> stacks;
static const void* main_stack_lo;
static size_t main_stack_sz;
static int tick;

void error(const char* kind, const char* fmt, ...) {
  char b[1500];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(b, sizeof b, fmt, ap);
  va_end(ap);
  char c[1700];
  if (cur)
    snprintf(c, sizeof c, "block (%u,%u,%u) thread %d (warp %d lane %d): %s", cur->block.x,
             cur->block.y, cur->block.z, cur->lin, cur->warp, cur->lane, b);
  else
    snprintf(c, sizeof c, "%s", b);
  if ((int)errors.size() < cfg.max_errors) errors.push_back({kind, c});
}
static void to_main();
void fatal(const char* kind, const char* fmt, ...) {
  char b[1500];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(b, sizeof b, fmt, ap);
  va_end(ap);
  error(kind, "%s", b);
  dead = true;
  to_main();
  abort();
}

// ------------------------------------------------------------------------------------------------
// memory regions + shadow
struct Cell {  // one per byte
  uint32_t wblk = 0, wclk = 0, wloc = 0, rblk = 0, rclk = 0, rloc = 0, rclk2 = 0;
  uint16_t wtid = 0, rtid = 0, rtid2 = 0;
  uint16_t nw = 0;
  uint8_t init = 0, watomic = 0, async = 0, guard = 0, has2 = 0, ratomic = 1;
};
struct Region {
  uintptr_t lo, hi;
  std::string name;
  bool shared, owned;
  std::unique_ptr<Cell[]> sh;
  std::vector<uint8_t> ld, stv;
};
static std::map<uintptr_t, Region> regions;
static uintptr_t reg_lo = ~0ull, reg_hi = 0;
static Region* last_reg = nullptr;
constexpr size_t kWin = 384 << 10, kStaticOff = 256 << 10;
static unsigned char* win;
static Region* win_reg;
static size_t dyn_n;
static std::map<std::pair<std::pair<const char*, int>, size_t>, size_t> static_off;
static size_t static_top = kStaticOff;
static unsigned char* arena;
static size_t arena_top;
constexpr size_t kArena = 8ull << 30;

static Region* add_region(uintptr_t lo, size_t n, const std::string& name, bool shared, bool owned,
                          bool init) {
  Region r{lo, lo + n, name, shared, owned, nullptr, {}, {}};
  if (tracking) {
    r.sh.reset(new Cell[n]);
    if (init)
      for (size_t i = 0; i < n; i++) r.sh[i].init = 1;
    if (!shared) {
      r.ld.assign(n / 32 + 2, 0);
      r.stv.assign(n / 32 + 2, 0);
    }
  }
  reg_lo = std::min(reg_lo, lo - 4096);
  reg_hi = std::max(reg_hi, lo + n + 4096);
  last_reg = nullptr;
  return &(regions[lo] = std::move(r));
}
static Region* find(uintptr_t a) {
  if (last_reg && a >= last_reg->lo && a < last_reg->hi) return last_reg;
  auto it = regions.upper_bound(a);
  if (it == regions.begin()) return nullptr;
  --it;
  if (a < it->second.hi) return last_reg = &it->second;
  return nullptr;
}
static void win_init() {
  if (win) return;
  win = (unsigned char*)mmap(nullptr, kWin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                             0);
  win_reg = add_region((uintptr_t)win, kWin, "shared memory", true, true, false);
}
static void* dmalloc(size_t n, const char* name, bool init) {
  void* p;
  if (ASAN) {
    if (posix_memalign(&p, 256, n)) abort();
  } else {
    if (!arena)
      arena = (unsigned char*)mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
      arena_top = 4096;
    p = arena + arena_top;
    arena_top = (arena_top + n + 4096 + 255) & ~size_t(255);
  }
  memset(p, 0xFF, n);
  add_region((uintptr_t)p, n, name, false, true, init);
  return p;
}
static void register_external(const void* p, size_t n, const char* name) {
  add_region((uintptr_t)p, n, name, false, false, true);
}
static void dfree_all() {
  for (auto it = regions.begin(); it != regions.end();) {
    if (it->second.shared) {
      ++it;
      continue;
    }
    if (ASAN && it->second.owned) free((void*)it->first);
    it = regions.erase(it);
  }
  arena_top = 4096;
  last_reg = nullptr;
}
static void reset_pcs();
static void reset() {
  errors.clear();
  stats = Stats();
  dfree_all();
  reset_pcs();
}
unsigned char* dynamic_shared() { return win; }
uint32_t shared_address(const void* own) { return uint32_t((const unsigned char*)own - win); }
unsigned char* shared_pointer(uint32_t a, Where) { return win + a; }
uint32_t map_shared(uint32_t, uint32_t, Where at) {
  fatal("cluster", "%s:%d: clusters are not emulated yet", at.file, at.line);
}
void* cluster_pointer(const void* own, uint32_t rank, Where at) {
  if (rank) fatal("cluster", "%s:%d: clusters are not emulated yet", at.file, at.line);
  return (void*)own;
}
static void smem_guard(void* p, size_t n) {
  if (!cur) return;
  ASAN_POISON_MEMORY_REGION(p, n);
  if (tracking)
    for (size_t i = 0; i < n; i++) win_reg->sh[(unsigned char*)p - win + i].guard = 1;
}
void shared_guard(void*, size_t, void* end) { smem_guard(end, kSharedGuard); }
void* static_shared(const char* f, int l, size_t n, size_t al) {
  auto& o = static_off[{{f, l}, n}];
  if (!o) {
    o = (static_top + al - 1) & ~(al - 1);
    static_top = o + ((n + 127) & ~size_t(127)) + 128;
    if (static_top > kWin) fatal("smem", "static shared memory exhausted");
  }
  ASAN_UNPOISON_MEMORY_REGION(win + o, n);
  ASAN_POISON_MEMORY_REGION(win + o + ((n + 7) & ~size_t(7)), 128);
  if (tracking && !win_reg->sh[o + ((n + 127) & ~size_t(127))].guard)
    for (size_t i = n; i < ((n + 127) & ~size_t(127)) + 128; i++) win_reg->sh[o + i].guard = 1;
  return win + o;
}

// ------------------------------------------------------------------------------------------------
// scheduler
static inline void push_ready(Thread* t) {
  t->st = 0;
  ready.push_back(t);
}
static bool complete_some_bulk(bool all);
static Thread* pick() {
  if (cfg.async == Async::Random && !bulks.empty() && (rnd() & 7) == 0) complete_some_bulk(false);
  if (rhead == ready.size()) {
    ready.clear();
    rhead = 0;
    while (!bulks.empty()) {
      complete_some_bulk(false);
      if (!ready.empty()) break;
    }
    if (ready.empty()) return nullptr;
  }
  if (rhead > 4096) {
    ready.erase(ready.begin(), ready.begin() + rhead);
    rhead = 0;
  }
  size_t k = rhead, n = ready.size();
  switch (cfg.sched) {
    case Sched::InOrder:
      break;
    case Sched::Reverse:
      k = n - 1;
      break;
    case Sched::Random:
      k = rhead + rnd() % (n - rhead);
      break;
    case Sched::WarpAhead: {
      size_t c = 0;
      for (size_t i = rhead; i < n; i++)
        if (ready[i]->warp == prefer_warp) {
          k = i;
          c = 1;
          break;
        }
      if (!c) {
        k = rhead + rnd() % (n - rhead);
        prefer_warp = ready[k]->warp;
      }
    }
  }
  Thread* t = ready[k];
  if (k == rhead)
    rhead++;
  else {
    ready[k] = ready.back();
    ready.pop_back();
    if (cfg.sched == Sched::WarpAhead || cfg.sched == Sched::Random) {
    }
  }
  return t;
}
static void do_switch(Thread* from, Thread* to) {
  stats.switches++;
  cur = to;
  current = to;
#if ASAN
  __sanitizer_start_switch_fiber(from->st == 2 ? nullptr : &from->fake, to->stack, to->stack_sz);
#endif
  less_emulator_switch(&from->sp, to->sp);
#if ASAN
  __sanitizer_finish_switch_fiber(cur->fake, nullptr, nullptr);
#endif
}
static void to_main() {
  Thread* me = cur;
  cur = nullptr;
  current = nullptr;
#if ASAN
  __sanitizer_start_switch_fiber(nullptr, main_stack_lo, main_stack_sz);
#endif
  void* dummy;
  less_emulator_switch(me ? &me->sp : &dummy, main_sp);
#if ASAN
  __sanitizer_finish_switch_fiber(me->fake, nullptr, nullptr);
#endif
}
static void next() {
  Thread* me = cur;
  Thread* n = pick();
  if (!n) {
    to_main();
    return;
  }
  if (n == me) return;
  do_switch(me, n);
}
static void wait_as(const char* kind, unsigned mask, const char* f, int l) {
  cur->st = 1;
  cur->wkind = kind;
  cur->wmask = mask;
  cur->wfile = f;
  cur->wline = l;
  next();
}
void maybe_preempt() {
  if (!in_kernel || cfg.sched == Sched::InOrder || cfg.sched == Sched::Reverse) return;
  push_ready(cur);
  next();
}

static void op_try_complete(Warp& w, WOp* o);
static void bar_try_release(Bar& b);
static void thread_exit() {
  Thread* me = cur;
  me->st = 2;
  nalive--;
  for (auto& g : me->groups)
    for (auto& c : g)
      if (!c.done) {
        error("async-pending", "thread exits with a cp.async in flight, issued at %s:%d", c.file,
              c.line);
        goto out;
      }
out:
  Warp& w = warps[me->warp];
  w.exited |= 1u << me->lane;
  for (size_t i = 0; i < w.ops.size(); i++)
    if (!w.ops[i]->done) op_try_complete(w, w.ops[i]);
  for (auto& b : bars)
    if (b.count) bar_try_release(b);
  Thread* n = pick();
  if (!n)
    to_main();
  else
    do_switch(me, n);
  abort();
}
extern "C" __attribute__((visibility("hidden"))) void less_emulator_fiber_main() {
#if ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  body(body_arg);
  thread_exit();
}
extern "C" void less_emulator_fiber_entry();
asm(R"(
.text
.globl less_emulator_fiber_entry
.hidden less_emulator_fiber_entry
less_emulator_fiber_entry:
  xorl %ebp, %ebp
  call less_emulator_fiber_main
  ud2
)");
static void make_fiber(Thread& t) {
  void** s = (void**)(t.stack + t.stack_sz);
  s -= 2;
  *s = nullptr;  // keep 16-byte alignment at the call
  *--s = (void*)less_emulator_fiber_entry;
  for (int i = 0; i < 6; i++) *--s = nullptr;
  t.sp = s;
  t.fake = nullptr;
}

// ------------------------------------------------------------------------------------------------
// happens-before
static inline uint32_t seen(const Thread& t, unsigned o) {
  uint32_t b = o < base_vc.size() ? base_vc[o] : 0;
  return o < t.vc.size() ? std::max(b, t.vc[o]) : b;
}
static void vc_out(const Thread& t, std::vector<uint32_t>& d) {
  d.resize(nthr + 1);
  for (int i = 0; i <= nthr; i++) d[i] = std::max(d[i], seen(t, i));
  d[t.lin] = std::max(d[t.lin], t.clk);
}
static void vc_in(Thread& t, const std::vector<uint32_t>& s) {
  if (t.vc.empty()) t.vc.assign(nthr + 1, 0);
  for (size_t i = 0; i < s.size(); i++) t.vc[i] = std::max(t.vc[i], s[i]);
}
static void flush_warp(Warp& w);
static void release_full() {
  if (!tracking) return;
  for (auto& t : threads) {
    base_vc[t.lin] = t.clk;
    t.clk++;
  }
  for (auto& w : warps) flush_warp(w);
}

static void bar_try_release(Bar& b) {
  int need = b.expected > 0 ? b.expected : nalive;
  if (b.count < need) return;
  stats.barriers++;
  if (tracking) {
    if (b.expected <= 0 || b.expected == nthr) {
      for (auto* t : b.wait) vc_out(*t, b.vc);
      release_full();
      for (auto* t : b.wait) vc_in(*t, b.vc);
    } else {
      for (auto* t : b.wait) vc_out(*t, b.vc);
      for (auto* t : b.wait) {
        vc_in(*t, b.vc);
        t->clk++;
      }
    }
    b.vc.clear();
  }
  b.res[b.gen & 1] = b.acc;
  b.gen++;
  b.count = 0;
  auto w = std::move(b.wait);
  b.wait.clear();
  for (auto* t : w)
    if (t->st == 1) push_ready(t);
}
int block_barrier(int id, int n, int pred, Vote vote, Where at) {
  int op = int(vote);
  const char* f = at.file;
  int l = at.line;
  Bar& b = bars[id];
  Thread* me = cur;
  if (n > 0 && n % 32)
    fatal("barrier", "barrier %d at %s:%d: thread count %d is not a multiple of 32", id, f, l, n);
  if (!b.count) {
    b.f = f;
    b.l = l;
    b.expected = n;
    b.acc = op == 2 ? 1 : 0;
  } else if (b.expected != n)
    fatal("barrier", "barrier %d: %s:%d expects %d threads but %s:%d expects %d", id, f, l, n, b.f,
          b.l, b.expected);
  else if (cfg.strict_loc && n <= 0 && (b.l != l || strcmp(b.f, f)))
    error("barrier-divergence",
          "threads of one block meet at different __syncthreads(): %s:%d and %s:%d", f, l, b.f,
          b.l),
        b.f = f, b.l = l;
  b.count++;
  if (op == 1) b.acc += !!pred;
  if (op == 2) b.acc &= !!pred;
  if (op == 3) b.acc |= !!pred;
  int g = b.gen;
  b.wait.push_back(me);
  me->st = 1;
  bar_try_release(b);
  if (b.gen == g)
    wait_as(id ? "named barrier" : "__syncthreads", id, f, l);
  else {
    if (ready.back() == me)
      ready.pop_back();
    else
      ready.erase(std::find(ready.begin() + rhead, ready.end(), me));
    me->st = 0;
    if (cfg.sched != Sched::InOrder) {
      push_ready(me);
      next();
    }
  }
  return b.res[g & 1];
}
void named_arrive(int id, int n, Where at) {
  const char* f = at.file;
  int l = at.line;
  Bar& b = bars[id];
  if (!b.count) {
    b.f = f;
    b.l = l;
    b.expected = n;
  }
  b.count++;
  if (tracking) {
    vc_out(*cur, b.vc);
    cur->clk++;
  }
  bar_try_release(b);
}

static void op_try_complete(Warp& w, WOp* o) {
  unsigned need = o->mask & ~w.exited;
  if ((o->arrived & need) != need) return;
  o->done = true;
  o->live = o->arrived;
  o->left = __builtin_popcount(o->arrived);
  stats.warp_ops++;
  if (tracking && o->orders) {
    std::vector<uint32_t> v;
    for (int i = 0; i < 32; i++)
      if (o->arrived >> i & 1) vc_out(*o->waiters[i], v);
    for (int i = 0; i < 32; i++)
      if (o->arrived >> i & 1) {
        vc_in(*o->waiters[i], v);
        o->waiters[i]->clk++;
      }
  }
  if (tracking && (o->arrived | w.exited) == ~0u) flush_warp(w);
  for (int i = 0; i < 32; i++)
    if ((o->arrived >> i & 1) && o->waiters[i]->st == 1) push_ready(o->waiters[i]);
}
const unsigned char* warp_exchange(unsigned mask, const char* kind, const void* in, unsigned n,
                                   uint32_t* live, bool orders, Where at) {
  const char* f = at.file;
  int l = at.line;
  Thread* me = cur;
  Warp& w = warps[me->warp];
  unsigned bit = 1u << me->lane;
  if (!(mask & bit))
    fatal("mask", "%s at %s:%d: the calling lane is not in its own mask 0x%08x", kind, f, l, mask);
  WOp* o = nullptr;
  for (auto* x : w.ops)
    if (!x->done && x->mask == mask && !(x->arrived & bit)) {
      o = x;
      break;
    }
  if (!o) {
    if (freeops.empty())
      o = new WOp;
    else {
      o = freeops.back();
      freeops.pop_back();
    }
    o->mask = mask;
    o->arrived = 0;
    o->kind = kind;
    o->f = f;
    o->l = l;
    o->done = false;
    o->orders = orders;
    w.ops.push_back(o);
  } else if (strcmp(o->kind, kind))
    fatal("divergent-collective", "%s at %s:%d meets %s at %s:%d (mask 0x%08x)", kind, f, l,
          o->kind, o->f, o->l, mask);
  else if (cfg.strict_loc && strcmp(kind, "__syncwarp") && (o->l != l || strcmp(o->f, f))) {
    error("divergent-collective",
          "%s reached at different places with one mask 0x%08x: %s:%d and %s:%d", kind, mask, f, l,
          o->f, o->l);
    o->l = l;
    o->f = f;
  }
  if (n) memcpy(o->data[me->lane], in, n);
  o->arrived |= bit;
  o->waiters[me->lane] = me;
  op_try_complete(w, o);
  if (!o->done) wait_as(kind, mask, f, l);
  *live = o->live;
  return o->data[0];
}
void warp_release(const unsigned char* t) {
  WOp* o = (WOp*)t;
  if (--o->left) return;
  Warp& w = warps[cur->warp];
  w.ops.erase(std::find(w.ops.begin(), w.ops.end(), o));
  freeops.push_back(o);
}

// ------------------------------------------------------------------------------------------------
// async copies
static uint32_t loc_id(const void* pc);
static const void* loc_pc(const char* f, int l);
static void mark_async(void* d, unsigned n, bool on) {
  if (on)
    ASAN_POISON_MEMORY_REGION(d, n);
  else
    ASAN_UNPOISON_MEMORY_REGION(d, n);
  if (tracking) {
    size_t o = (unsigned char*)d - win;
    if (o < kWin)
      for (unsigned i = 0; i < n; i++) {
        win_reg->sh[o + i].async = on;
      }
  }
}
static void do_copy(Copy& c, uint16_t tid, uint32_t clk) {
  mark_async(c.dst, c.n, false);
  memcpy(c.dst, c.src, c.n - c.zfill);
  memset((char*)c.dst + c.n - c.zfill, 0, c.zfill);
  c.done = true;
  if (tracking) {
    size_t o = (unsigned char*)c.dst - win;
    if (o < kWin)
      for (unsigned i = 0; i < c.n; i++) {
        Cell& x = win_reg->sh[o + i];
        x.wblk = blk_serial;
        x.wtid = tid;
        x.wclk = clk;
        x.wloc = loc_id(loc_pc(c.file, c.line));
        x.init = 1;
        x.watomic = 0;
      }
  }
}
void copy_async(void* d, const void* s, unsigned n, unsigned src_n, Where at) {
  const char* f = at.file;
  int l = at.line;
  if (((uintptr_t)d | (uintptr_t)s) & (n - 1))
    fatal("misaligned", "cp.async of %u bytes at %s:%d: dst %p src %p", n, f, l, d, s);
  size_t o = (unsigned char*)d - win;
  if (o + n > kWin)
    fatal("address-space", "cp.async at %s:%d: destination is not shared memory", f, l);
  stats.cp_async++;
  stats.cp_async_bytes += src_n;
  if (src_n) access_at(s, src_n, kRead, f, l);
  access_at(d, n, kWrite, f, l);  // the issue counts as a write: catches write-after-read
#if ASAN
  if (__asan_region_is_poisoned(d, n))
    error("async-overlap", "cp.async at %s:%d writes bytes already in flight or out of bounds", f,
          l);
  if (src_n && __asan_region_is_poisoned((void*)s, src_n))
    error("out-of-bounds", "cp.async at %s:%d reads %u bytes outside its buffer", f, l, src_n);
#endif
  Copy c{d, s, n, n - src_n, false, f, l};
  bool early = cfg.async == Async::Early || (cfg.async == Async::Random && (rnd() & 1));
  if (early)
    do_copy(c, cur->lin, cur->clk);
  else {
    memset(d, 0xFF, n);
    mark_async(d, n, true);
  }
  cur->cur_group.push_back(c);
}
void copy_async_commit() {
  cur->groups.push_back(std::move(cur->cur_group));
  cur->cur_group.clear();
}
void copy_async_wait(int n, Where) {
  Thread* t = cur;
  while ((int)t->groups.size() > n) {
    for (auto& c : t->groups.front()) {
      if (!c.done)
        do_copy(c, t->lin, t->clk);
      else if (tracking) {
        for (unsigned i = 0; i < c.n; i++)
          win_reg->sh[(unsigned char*)c.dst - win + i].wclk = t->clk;
      }
    }
    t->groups.erase(t->groups.begin());
  }
}
void mbarrier_init(uint64_t* b, uint32_t n, Where at) {
  const char* f = at.file;
  int l = at.line;
  if ((uintptr_t)b & 7) fatal("misaligned", "mbarrier at %s:%d", f, l);
  MBar m;
  m.count = m.pending = n;
  mbars[b] = m;
  access_at(b, 8, kWrite, f, l);
  *b = 0x4d42415252494552ull;
}
static MBar& mb(uint64_t* b, const char* f, int l) {
  auto it = mbars.find(b);
  if (it == mbars.end()) fatal("mbarrier", "uninitialised mbarrier used at %s:%d", f, l);
  if (*b != 0x4d42415252494552ull)
    fatal("mbarrier", "mbarrier used at %s:%d was overwritten", f, l);
  return it->second;
}
static void mbar_check(uint64_t*, MBar& m) {
  if (m.pending == 0 && m.tx == 0) {
    m.phase++;
    m.pending = m.count;
    auto w = std::move(m.wait);
    m.wait.clear();
    for (auto* t : w) push_ready(t);
  }
}
void mbarrier_arrive(uint64_t* b, uint32_t tx, Where at) {
  const char* f = at.file;
  int l = at.line;
  access_at(b, 8, kAtomic, f, l);
  MBar& m = mb(b, f, l);
  if (m.pending == 0) fatal("mbarrier", "too many arrivals at %s:%d (count %u)", f, l, m.count);
  if (tracking) {
    vc_out(*cur, m.vc);
    cur->clk++;
  }
  m.tx += tx;
  m.pending--;
  mbar_check(b, m);
}
void mbarrier_wait(uint64_t* b, uint32_t par, Where at) {
  const char* f = at.file;
  int l = at.line;
  access_at(b, 8, kAtomic, f, l);
  MBar& m = mb(b, f, l);
  while ((m.phase & 1) == par) {
    m.wait.push_back(cur);
    wait_as("mbarrier wait", par, f, l);
  }
  if (tracking) vc_in(*cur, m.vc);
}
void bulk_copy(void* d, const void* s, uint32_t n, uint64_t* b, Where at) {
  const char* f = at.file;
  int l = at.line;
  if ((((uintptr_t)d | (uintptr_t)s) & 15) || n % 16)
    fatal("misaligned", "bulk copy of %u bytes at %s:%d: dst %p src %p", n, f, l, d, s);
  mb(b, f, l);
  stats.cp_async++;
  stats.cp_async_bytes += n;
  access_at(s, n, kRead, f, l);
  access_at(d, n, kWrite, f, l);
  memset(d, 0xFF, n);
  mark_async(d, n, true);
  bulks.push_back({{d, s, n, 0, false, f, l}, b});
  if (cfg.async == Async::Early) complete_some_bulk(true);
}
static bool complete_some_bulk(bool all) {
  while (!bulks.empty()) {
    size_t k = rnd() % bulks.size();
    Bulk x = bulks[k];
    bulks.erase(bulks.begin() + k);
    MBar& m = mbars[x.b];
    proxy_clk++;
    do_copy(x.c, nthr, proxy_clk);
    if (tracking) {
      m.vc.resize(nthr + 1);
      m.vc[nthr] = std::max(m.vc[nthr], proxy_clk);
    }
    m.tx -= x.c.n;
    mbar_check(x.b, m);
    if (!all) return true;
  }
  return false;
}

// ------------------------------------------------------------------------------------------------
// tensor cores
static inline float half_f(uint16_t h, bool bf) {
  float f;
  if (bf) {
    uint32_t u = (uint32_t)h << 16;
    memcpy(&f, &u, 4);
    return f;
  }
  _Float16 x;
  memcpy(&x, &h, 2);
  return (float)x;
}
void ldmatrix(uint32_t* d, int num, const void* row, bool trans, Where at) {
  const char* f = at.file;
  int l = at.line;
  if (cur->lane < 8 * num) {
    if ((uintptr_t)row & 15) fatal("misaligned", "ldmatrix row address at %s:%d", f, l);
    access_at(row, 16, kRead, f, l);
  }
  uint16_t r[8] = {0};
  if (cur->lane < 8 * num) memcpy(r, row, 16);
  unsigned live;
  const unsigned char* t = warp_exchange(~0u, "ldmatrix", r, 16, &live, false, at);
  for (int i = 0; i < num; i++)
    for (int e = 0; e < 2; e++) {
      int rr = cur->lane / 4, cc = (cur->lane & 3) * 2 + e;
      if (trans) std::swap(rr, cc);
      uint16_t h;
      memcpy(&h, t + (8 * i + rr) * kExchangeStride + cc * 2, 2);
      d[i] = e ? (d[i] & 0xffff) | (uint32_t)h << 16 : h;
    }
  warp_release(t);
}
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool bf,
                  Where at) {
  uint32_t in[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  unsigned live;
  const unsigned char* t = warp_exchange(~0u, "mma.m16n8k16", in, 24, &live, false, at);
  int g = cur->lane >> 2, q = cur->lane & 3;
  float o[4];
  for (int x = 0; x < 4; x++) {
    int row = g + (x >= 2 ? 8 : 0), col = q * 2 + (x & 1);
    double s = 0;  // exact products, one rounding: tensor cores differ in the last bits
    for (int k = 0; k < 16; k++) {
      int la = (row & 7) * 4 + (k & 7) / 2, ra = (row >> 3) + 2 * (k >> 3),
          lb = col * 4 + (k & 7) / 2, rb = k >> 3;
      uint16_t ha, hb;
      memcpy(&ha, t + la * kExchangeStride + ra * 4 + (k & 1) * 2, 2);
      memcpy(&hb, t + lb * kExchangeStride + 16 + rb * 4 + (k & 1) * 2, 2);
      s += (double)half_f(ha, bf) * half_f(hb, bf);
    }
    o[x] = (float)(s + c[x]);
  }
  warp_release(t);
  memcpy(d, o, 16);
}

// ------------------------------------------------------------------------------------------------
// access tracking
struct Site {
  const void* pc;
  const char* f;
  int l;
};
static std::vector<Site> sites;
static std::unordered_map<const void*, uint32_t> site_of;
static std::vector<PcStat> pcstat;
static std::map<std::pair<std::string, int>, std::unique_ptr<Site>> locs;
static void reset_pcs() {
  for (auto& p : pcstat) p = PcStat();
}
static const void* loc_pc(const char* f, int l) {
  static const char* cf = nullptr;
  static int cl = 0;
  static const void* cp = nullptr;
  if (f == cf && l == cl) return cp;
  auto& s = locs[{f, l}];
  if (!s) s.reset(new Site{nullptr, f, l});
  cf = f;
  cl = l;
  cp = s.get();
  site_of.count(cp) ||
      (site_of[cp] = sites.size(), sites.push_back({cp, f, l}), pcstat.emplace_back(), 0);
  return cp;
}
static uint32_t loc_id(const void* pc) {
  static const void* c = nullptr;
  static uint32_t ci;
  if (pc == c) return ci;
  auto it = site_of.find(pc);
  if (it == site_of.end()) {
    it = site_of.emplace(pc, sites.size()).first;
    sites.push_back({pc, nullptr, 0});
    pcstat.emplace_back();
  }
  c = pc;
  return ci = it->second;
}
static std::string where(uint32_t id) {
  Site& s = sites[id];
  if (s.f) {
    const char* b = strrchr(s.f, '/');
    return std::string(b ? b + 1 : s.f) + ":" + std::to_string(s.l);
  }
  static std::map<const void*, std::string> cache;
  auto& r = cache[s.pc];
  if (!r.empty()) return r;
  Dl_info di;
  if (!dladdr(s.pc, &di)) return r = "?";
  char cmd[600];
  snprintf(cmd, sizeof cmd, "addr2line -e %s 0x%zx", di.dli_fname,
           (size_t)((char*)s.pc - (char*)di.dli_fbase - 1));
  if (FILE* p = popen(cmd, "r")) {
    char b[400] = "";
    if (fgets(b, sizeof b, p)) {
      b[strcspn(b, "\n ")] = 0;
      const char* q = strrchr(b, '/');
      r = q ? q + 1 : b;
    }
    pclose(p);
  }
  return r;
}
static std::set<std::pair<std::string, std::pair<uint32_t, uint32_t>>> seen_err;
static void race(const char* kind, const char* what, uint32_t l1, uint32_t l2, uint32_t ob,
                 unsigned ot, const char* space, uintptr_t off) {
  if (!seen_err.insert({kind, {l1, l2}}).second) return;
  char o[80];
  if (ob == blk_serial) {
    if ((int)ot < nthr)
      snprintf(o, sizeof o, "thread %u of this block", ot);
    else
      snprintf(o, sizeof o, "a bulk copy");
  } else
    snprintf(o, sizeof o, "thread %u of another block", ot);
  error(kind, "%s on %s byte %zu: %s here, earlier %s by %s, no synchronisation between", what,
        space, (size_t)off, where(l1).c_str(), where(l2).c_str(), o);
}
struct SyncLoc {
  std::map<uint32_t, std::vector<uint32_t>> rel;
};
static std::unordered_map<uintptr_t, SyncLoc> synclocs;
struct Fence {
  std::vector<uint32_t> vc;
  std::map<uint32_t, std::vector<uint32_t>> pending, acq;
};
static std::unordered_map<int, Fence> fences;
static std::map<uint32_t, std::vector<uint32_t>> blk_acq;
static void join(std::map<uint32_t, std::vector<uint32_t>>& d,
                 const std::map<uint32_t, std::vector<uint32_t>>& s) {
  for (auto& k : s) {
    auto& v = d[k.first];
    v.resize(std::max(v.size(), k.second.size()));
    for (size_t i = 0; i < k.second.size(); i++) v[i] = std::max(v[i], k.second[i]);
  }
}
void fence(bool gpu) {
  if (!gpu) return;
  if (!tracking || !cur) return;
  Fence& f = fences[cur->lin];
  f.vc.clear();
  vc_out(*cur, f.vc);
  cur->clk++;
  join(f.acq, f.pending);
  join(blk_acq, f.pending); /* approx.: visible to the whole block, assumes a barrier follows */
}
static bool ordered(uint32_t b, unsigned t, uint32_t clk, bool shared) {
  if (b == blk_serial) return (int)t == cur->lin || seen(*cur, t) >= clk;
  if (b < launch_first || shared) return true;
  auto it = blk_acq.find(b);
  return it != blk_acq.end() && t < it->second.size() && it->second[t] >= clk;
}
static void access_at(const void* p, unsigned n, int kind, const char* f, int l) {
  if (tracking && in_kernel) access_n(p, n, kind, loc_pc(f, l));
}
void access_at(const void* p, unsigned n, Access kind, Where at) {
  access_at(p, n, int(kind), at.file, at.line);
}
void access(const void* p, unsigned n, Access kind, const void* pc) {
  access_n(p, n, int(kind), pc);
}
static void access_n(const void* p, unsigned n, int kind, const void* pc) {
  if (!in_kernel || !cur) return;
  uintptr_t a = (uintptr_t)p;
  if (a - (uintptr_t)cur->stack < cur->stack_sz || a < reg_lo || a >= reg_hi) return;
  Region* r = find(a);
  uint32_t id = loc_id(pc);
  if (!r || a + n > r->hi) {
    for (auto* s : stacks)
      if (a - (uintptr_t)s < kStack) {
        error("stack", "%s: access to the stack of another thread", where(id).c_str());
        return;
      }
    auto it = regions.upper_bound(a);
    std::string near = "?";
    long d = 0;
    if (it != regions.begin()) {
      --it;
      near = it->second.name;
      d = (long)(a - it->second.lo);
    }
    bool in_arena = arena && a - (uintptr_t)arena < kArena;
    if (!in_arena && !r && (it == regions.end() || a > it->second.hi + 4096)) return;
    if (seen_err.insert({"oob", {id, 0}}).second)
      error("out-of-bounds", "%s: %u-byte %s at offset %ld of '%s' (%zu bytes)", where(id).c_str(),
            n, kind == kRead ? "read" : "write", d, near.c_str(),
            (size_t)(it->second.hi - it->second.lo));
    return;
  }
  stats.tracked++;
  size_t off = a - r->lo;
  bool sh = r->shared;
  if (n <= 16 && (n & (n - 1)) == 0 && (a & (n - 1)) && seen_err.insert({"mis", {id, 0}}).second)
    error("misaligned", "%s: %u-byte access at offset %zu of '%s'", where(id).c_str(), n, off,
          r->name.c_str());
  if (cfg.race) {
    const char* sp = r->name.c_str();
    bool at = kind >= kAtomic, rd = kind == kRead || kind == kVolRead;
    Thread* t = cur;
    for (unsigned i = 0; i < n; i++) {
      Cell& c = r->sh[off + i];
      if (c.guard || (sh && off + i >= dyn_n && off + i < kStaticOff)) {
        if (seen_err.insert({"oob", {id, 0}}).second)
          error("out-of-bounds",
                "%s: %s beyond its shared array (window byte %zu, dynamic size %zu)",
                where(id).c_str(), kind == kRead ? "read" : "write", off + i, dyn_n);
        return;
      }
      if (c.async) {
        race("async-race",
             kind == kRead ? "read of bytes with a cp.async in flight"
                           : "write to bytes with a cp.async in flight",
             id, c.wloc, blk_serial, c.wtid, sp, off + i);
        continue;
      }
      if (kind != kWrite && kind != kVolWrite && !c.init) {
        if (seen_err.insert({"uninit", {id, 0}}).second)
          error("uninitialised", "%s: read of %s byte %zu that nobody wrote", where(id).c_str(), sp,
                off + i);
      }
      if (c.wblk && !(at && c.watomic) && !ordered(c.wblk, c.wtid, c.wclk, sh))
        race("race", rd ? "read after write" : "write after write", id, c.wloc, c.wblk, c.wtid, sp,
             off + i);
      if (!rd) {
        {
          if (c.rblk && !(at && c.ratomic) && !ordered(c.rblk, c.rtid, c.rclk, sh))
            race("race", "write after read", id, c.rloc, c.rblk, c.rtid, sp, off + i);
          if (c.has2 && !(at && c.ratomic) && !ordered(c.rblk, c.rtid2, c.rclk2, sh))
            race("race", "write after read", id, c.rloc, c.rblk, c.rtid2, sp, off + i);
        }
        c.wblk = blk_serial;
        c.wtid = t->lin;
        c.wclk = t->clk;
        c.wloc = id;
        c.watomic = at;
        c.init = 1;
        c.rblk = 0;
        c.has2 = 0;
        c.ratomic = 1;
        if (c.nw < 65535) c.nw++;
      } else {
        if (c.rblk == blk_serial && c.rtid != t->lin) {
          c.has2 = 1;
          c.rtid2 = c.rtid;
          c.rclk2 = c.rclk;
        } else if (c.rblk != blk_serial)
          c.has2 = 0;
        if (c.rblk != blk_serial) c.ratomic = 1;
        if (!at) c.ratomic = 0;
        c.rblk = blk_serial;
        c.rtid = t->lin;
        c.rclk = t->clk;
        c.rloc = id;
      }
    }
    if (at && !sh) {
      Fence& f = fences[t->lin];
      SyncLoc& L = synclocs[a];
      if (!f.vc.empty()) {
        auto& v = L.rel[blk_serial];
        v.resize(f.vc.size());
        for (size_t i = 0; i < v.size(); i++) v[i] = std::max(v[i], f.vc[i]);
      }
      join(f.pending, L.rel);
    }
  }
  if (cfg.trace && n <= 16) {
    if (!sh)
      for (size_t s = off / 32; s <= (off + n - 1) / 32; s++)
        (kind == kRead || kind == kVolRead ? r->ld : r->stv)[s] = 1;
    id = id * 2 + sh;
    Thread* t = cur;
    Warp& w = warps[t->warp];
    if (t->occ.size() <= id) t->occ.resize(id + 64, 0);
    unsigned k = t->occ[id]++;
    if (w.groups.size() <= id) w.groups.resize(id + 64);
    auto& g = w.groups[id];
    if (g.empty()) w.used.push_back(id);
    if (g.size() <= k) g.resize(k + 1);
    Group& G = g[k];
    G.mask |= 1u << t->lane;
    G.addr[t->lane] = a;
    G.size = n;
    G.kind = kind;
    G.shared = sh;
  }
  if (cfg.preempt_every && ++tick >= cfg.preempt_every) {
    tick = -(int)(rnd() % cfg.preempt_every);
    push_ready(cur);
    next();
  }
}
static void flush_group(uint32_t id, const Group& g) {
  if (pcstat.size() <= id) pcstat.resize(id + 64);
  PcStat& s = pcstat[id];
  s.pc = sites[id / 2].pc;
  s.write = g.kind != kRead && g.kind != kVolRead;
  s.shared = g.shared;
  s.size = g.size;
  s.requests++;
  int nl = __builtin_popcount(g.mask);
  s.lanes += nl;
  uint64_t sec[32 * 5];
  int ns = 0;
  uint64_t words[32 * 4];
  if (!g.shared) {
    uint64_t ub[64 * 32];
    int nb = 0;  // unique 4-byte words (or bytes for narrow types) asked for
    unsigned gran = g.size < 4 ? g.size : 4;
    for (int i = 0; i < 32; i++)
      if (g.mask >> i & 1) {
        uint64_t a = g.addr[i];
        for (uint64_t x = a / 32; x <= (a + g.size - 1) / 32 && ns < 160; x++) sec[ns++] = x;
        for (unsigned o = 0; o < g.size && nb < 2048; o += gran) ub[nb++] = (a + o) / gran;
      }
    std::sort(sec, sec + ns);
    ns = std::unique(sec, sec + ns) - sec;
    std::sort(ub, ub + nb);
    nb = std::unique(ub, ub + nb) - ub;
    uint64_t bytes = (uint64_t)nb * gran, ideal = (bytes + 31) / 32;
    s.bytes += bytes;
    s.sectors += ns;
    s.ideal_sectors += ideal;
    if (s.write) {
      stats.g_st_bytes += bytes;
      stats.g_st_sectors += ns;
      stats.g_st_ideal += ideal;
    } else {
      stats.g_ld_bytes += bytes;
      stats.g_ld_sectors += ns;
      stats.g_ld_ideal += ideal;
    }
  } else {
    int per = g.size <= 4 ? 32 : g.size == 8 ? 16 : 8;  // lanes served per phase
    for (int p = 0; p < 32; p += per) {
      unsigned m = g.mask >> p & (per == 32 ? ~0u : (1u << per) - 1);
      if (!m) continue;
      int n = 0;
      int cnt[32] = {0};
      int mx = 0;
      for (int i = 0; i < per; i++)
        if (m >> i & 1) {
          uint64_t a = g.addr[p + i];
          for (uint64_t x = a / 4; x <= (a + g.size - 1) / 4; x++) words[n++] = x;
        }
      std::sort(words, words + n);
      n = std::unique(words, words + n) - words;
      for (int i = 0; i < n; i++) mx = std::max(mx, ++cnt[words[i] & 31]);
      s.wavefronts += mx;
      s.ideal_wavefronts++;
      stats.s_wave += mx;
      stats.s_ideal++;
    }
    s.bytes += (uint64_t)nl * g.size;
    stats.s_req++;
  }
}
static void flush_warp(Warp& w) {
  if (w.used.empty()) return;
  for (int id : w.used) {
    for (auto& g : w.groups[id])
      if (g.mask) flush_group(id, g);
    w.groups[id].clear();
  }
  w.used.clear();
  int wi = &w - &warps[0];
  for (int i = wi * 32; i < std::min(nthr, wi * 32 + 32); i++)
    std::fill(threads[i].occ.begin(), threads[i].occ.end(), 0);
}
static uint64_t written_bytes(const void* p, size_t n) {
  Region* r = find((uintptr_t)p);
  if (!r || !tracking) return 0;
  uint64_t k = 0;
  for (size_t i = 0; i < n; i++) k += r->sh[(uintptr_t)p - r->lo + i].nw > 0;
  return k;
}

// ------------------------------------------------------------------------------------------------
// launch
static void run_block(uint3 bid) {
  blk_serial++;
  stats.blocks++;
  nalive = nthr;
  dead = false;
  ready.clear();
  rhead = 0;
  mbars.clear();
  bulks.clear();
  fences.clear();
  blk_acq.clear();
  proxy_clk = 0;
  base_vc.assign(nthr + 1, 0);
  for (auto& b : bars) b = Bar();
  for (auto& w : warps) {
    for (auto* o : w.ops) freeops.push_back(o);
    w.ops.clear();
    w.exited = 0;
  }
  for (int i = nthr; i < (int)warps.size() * 32; i++) warps[i / 32].exited |= 1u << (i & 31);
  ASAN_UNPOISON_MEMORY_REGION(win, kWin);
  memset(win, 0xFF, dyn_n);
  memset(win + kStaticOff, 0xFF, static_top - kStaticOff);
  ASAN_POISON_MEMORY_REGION(win + ((dyn_n + 7) & ~size_t(7)), kStaticOff - dyn_n - 8);
  if (tracking) {
    Cell z;
    for (size_t i = 0; i < dyn_n; i++) win_reg->sh[i] = z;
    for (size_t i = kStaticOff; i < static_top; i++) {
      uint8_t g = win_reg->sh[i].guard;
      win_reg->sh[i] = z;
      win_reg->sh[i].guard = g;
    }
  }
  for (int i = 0; i < nthr; i++) {
    Thread& t = threads[i];
    t.lin = i;
    t.lane = i & 31;
    t.warp = i >> 5;
    t.thread = {i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y)};
    t.block = bid;
    t.st = 0;
    t.clk = 1;
    t.vc.clear();
    t.groups.clear();
    t.cur_group.clear();
    t.window = win;
    t.cluster_rank = 0;
    t.stack = stacks[i];
    t.stack_sz = kStack;
    make_fiber(t);
    std::fill(t.occ.begin(), t.occ.end(), 0);
    ready.push_back(&t);
    ASAN_UNPOISON_MEMORY_REGION(t.stack, t.stack_sz);
  }
  in_kernel = true;
  Thread* f = pick();
  cur = f;
  current = f;
#if ASAN
  __sanitizer_start_switch_fiber(&main_fake, f->stack, f->stack_sz);
#endif
  less_emulator_switch(&main_sp, f->sp);
#if ASAN
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
  in_kernel = false;
  cur = nullptr;
  current = nullptr;
  if (tracking)
    for (auto& w : warps) flush_warp(w);
  ASAN_UNPOISON_MEMORY_REGION(win, kWin);
  if (!dead && nalive) {
    std::map<std::string, std::pair<int, int>> g;
    for (auto& t : threads)
      if (t.st == 1) {
        char b[300];
        const char* q = strrchr(t.wfile, '/');
        snprintf(b, sizeof b, "%s at %s:%d mask 0x%08x", t.wkind, q ? q + 1 : t.wfile, t.wline,
                 t.wmask);
        auto& x = g[b];
        if (!x.second++) x.first = t.lin;
      }
    std::string m;
    for (auto& k : g)
      m += " [" + std::to_string(k.second.second) + " threads, first " +
           std::to_string(k.second.first) + ", wait in " + k.first + "]";
    error("deadlock", "block (%u,%u,%u): no thread can run:%s; %d exited", bid.x, bid.y, bid.z,
          m.c_str(), nthr - nalive);
  }
}
void run(const LaunchConfig& c, const void*, void (*b)(void*), void* arg) {
  dim3 grid = c.grid, block = c.block;
  size_t smem = c.shared;
  if (c.cluster > 1) {
    error("cluster", "clusters are not emulated yet");
    return;
  }
  win_init();
  grid_dim = grid;
  block_dim = block;
  nthr = block.x * block.y * block.z;
  body = b;
  body_arg = arg;
  rng_s = cfg.seed * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 8; i++) rnd();
  if (nthr < 1 || nthr > 1024) {
    error("launch", "block of %d threads", nthr);
    return;
  }
  if (smem > (227u << 10)) {
    error("launch", "%zu bytes of dynamic shared memory", smem);
    return;
  }
  dyn_n = smem;
  threads.resize(nthr);
  warps.resize((nthr + 31) / 32);
  launch_first = blk_serial + 1;
  seen_err.clear();
  synclocs.clear();
  while ((int)stacks.size() < nthr)
    stacks.push_back((unsigned char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
#if ASAN
  {
    pthread_attr_t a;
    void* lo;
    size_t sz;
    pthread_getattr_np(pthread_self(), &a);
    pthread_attr_getstack(&a, &lo, &sz);
    main_stack_lo = lo;
    main_stack_sz = sz;
    pthread_attr_destroy(&a);
  }
#endif
  std::vector<uint64_t> order((uint64_t)grid.x * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  if (cfg.sched == Sched::Random || cfg.sched == Sched::WarpAhead)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[rnd() % i]);
  if (cfg.sched == Sched::Reverse) std::reverse(order.begin(), order.end());
  stats.threads += (uint64_t)order.size() * nthr;
  size_t e0 = errors.size();
  for (auto i : order) {
    run_block({(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y),
               (unsigned)(i / ((uint64_t)grid.x * grid.y))});
    if (errors.size() > e0 && (dead || nalive)) break;
  }
  for (auto& k : regions)
    if (!k.second.shared && tracking) {
      for (auto& x : k.second.ld) {
        stats.touched_ld_sectors += x;
        x = 0;
      }
      for (auto& x : k.second.stv) {
        stats.touched_st_sectors += x;
        x = 0;
      }
    }
  stats.pcs.clear();
  for (size_t i = 0; i < pcstat.size(); i++)
    if (pcstat[i].requests) {
      pcstat[i].where = where(i / 2);
      stats.pcs.push_back(pcstat[i]);
    }
}
[[maybe_unused]] static std::string report_text() {
  char b[600];
  std::string o;
  auto& s = stats;
  snprintf(b, sizeof b,
           "blocks %llu threads %llu barriers %llu warp ops %llu switches %llu cp.async %llu (%llu "
           "bytes) atomics %llu tracked %llu\n",
           (unsigned long long)s.blocks, (unsigned long long)s.threads,
           (unsigned long long)s.barriers, (unsigned long long)s.warp_ops,
           (unsigned long long)s.switches, (unsigned long long)s.cp_async,
           (unsigned long long)s.cp_async_bytes, (unsigned long long)s.atomics,
           (unsigned long long)s.tracked);
  o += b;
  if (!tracking) return o;
  snprintf(b, sizeof b,
           "global ld: %llu B asked, %llu sectors (ideal %llu, efficiency %.1f%%), distinct "
           "sectors %llu = %llu B\nglobal st: %llu B asked, %llu sectors (ideal %llu, efficiency "
           "%.1f%%), distinct %llu\nshared: %llu requests, %llu wavefronts, ideal %llu, excess "
           "(bank conflicts) %llu\n",
           (unsigned long long)s.g_ld_bytes, (unsigned long long)s.g_ld_sectors,
           (unsigned long long)s.g_ld_ideal,
           s.g_ld_sectors ? 100.0 * s.g_ld_ideal / s.g_ld_sectors : 100,
           (unsigned long long)s.touched_ld_sectors, (unsigned long long)s.touched_ld_sectors * 32,
           (unsigned long long)s.g_st_bytes, (unsigned long long)s.g_st_sectors,
           (unsigned long long)s.g_st_ideal,
           s.g_st_sectors ? 100.0 * s.g_st_ideal / s.g_st_sectors : 100,
           (unsigned long long)s.touched_st_sectors, (unsigned long long)s.s_req,
           (unsigned long long)s.s_wave, (unsigned long long)s.s_ideal,
           (unsigned long long)(s.s_wave - s.s_ideal));
  o += b;
  auto v = s.pcs;
  std::sort(v.begin(), v.end(), [](const PcStat& x, const PcStat& y) { return x.where < y.where; });
  for (auto& p : v) {
    snprintf(
        b, sizeof b, "  %-26s %s %s %2uB req %8llu lanes/req %4.1f %s %llu ideal %llu (%.2fx)\n",
        p.where.c_str(), p.shared ? "smem" : "gmem", p.write ? "st" : "ld", p.size,
        (unsigned long long)p.requests, (double)p.lanes / p.requests,
        p.shared ? "wavefronts" : "sectors",
        (unsigned long long)(p.shared ? p.wavefronts : p.sectors),
        (unsigned long long)(p.shared ? p.ideal_wavefronts : p.ideal_sectors),
        p.shared ? (double)p.wavefronts / p.ideal_wavefronts : (double)p.sectors / p.ideal_sectors);
    o += b;
  }
  return o;
}
void cluster_arrive(bool, Where) {}
void cluster_wait(Where at) { block_barrier(0, 0, 0, Vote::none, at); }
void grid_dependency_wait(Where) {}
void grid_launch_dependents(Where) {}
static std::string json_text;
static std::string quoted(const std::string& s) {
  std::string o = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') o += '\\';
    o += c < ' ' && c >= 0 ? ' ' : c;
  }
  return o + "\"";
}
}  // namespace less::emulator

using namespace less::emulator;
extern "C" {
const char* less_emulator_tier() { return ASAN ? "asan" : tracking ? "track" : "fast"; }
int less_emulator_set(const char* o, const char* v) {
  std::string k = o, x = v;
  if (k == "schedule") {
    const char* names[] = {"in_order", "reverse", "random", "warp_ahead"};
    for (int i = 0; i < 4; i++)
      if (x == names[i]) {
        cfg.sched = Sched(i);
        return 0;
      }
    return -1;
  }
  if (k == "async") {
    const char* names[] = {"late", "early", "random"};
    for (int i = 0; i < 3; i++)
      if (x == names[i]) {
        cfg.async = Async(i);
        return 0;
      }
    return -1;
  }
  char* end;
  long long n = strtoll(v, &end, 10);
  if (*end) return -1;
  if (k == "seed")
    cfg.seed = n;
  else if (k == "preempt")
    cfg.preempt_every = n;
  else if (k == "race")
    cfg.race = n;
  else if (k == "profile")
    cfg.trace = n;
  else if (k == "ptx")
    use_ptx = n;
  else if (k == "max_errors")
    cfg.max_errors = n;
  else if (k != "blocks")
    return -1;
  return 0;
}
void less_emulator_reset() {
  errors.clear();
  stats = Stats();
  reset_pcs();
}
int64_t less_emulator_error_count() { return errors.size(); }
const char* less_emulator_errors_json() {
  json_text = "[";
  for (auto& e : errors)
    json_text += (json_text.size() > 1 ? "," : "") +
                 ("{\"kind\":" + quoted(e.kind) + ",\"message\":" + quoted(e.msg) + "}");
  return (json_text += "]").c_str();
}
const char* less_emulator_profile_json() { return (json_text = "{}").c_str(); }
void* less_emulator_alloc(size_t n, const char* name, int init) { return dmalloc(n, name, init); }
void less_emulator_free(void* p) {
  auto it = regions.find((uintptr_t)p);
  if (it == regions.end()) return;
  if (ASAN && it->second.owned) free(p);
  regions.erase(it);
  last_reg = nullptr;
}
void less_emulator_register(const void* p, size_t n, const char* name, int init) {
  add_region((uintptr_t)p, n, name, false, false, init);
}
void less_emulator_unregister(const void* p) {
  regions.erase((uintptr_t)p);
  last_reg = nullptr;
}
int64_t less_emulator_written(const void* p, size_t n) { return written_bytes(p, n); }
}
