// How kernels run, of the stand-in for CUDA: in seeded random order, under a detector of races.
//
// The sources are compiled with GCC's instrumentation for ThreadSanitizer, which calls __tsan_* before every access.
// Its runtime is not linked: those functions are here. It knows of threads and C++'s order; lanes have CUDA's, in which
// a warp's lanes are not in step, and neither an atomic nor a vote orders memory.
//
// Every lane is a fiber. A few blocks are resident at a time, in any order, and any lane of theirs may go on at each
// access to memory that lanes share. Races are found by what orders accesses in CUDA's memory model, in whatever order
// lanes happened to run: __syncwarp() among lanes of a warp; a fence, an atomic, an atomic that sees it and another
// fence; launches. A collective that exchanges values orders no memory.
//
// Also errors: a read of device or shared memory that nothing has written, lanes that meet in different collectives, a
// lane that ends while others of its warp wait for it.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx;

namespace {

constexpr unsigned kLanes = 32, kMostBlocks = 4;  // of a warp; resident
constexpr size_t kStackBytes = 128 << 10;         // 32 KB of arguments are copied there
constexpr size_t kSharedBytes = 64 << 10, kDeviceBytes = 32 << 20;

// What a lane knows to have happened: of each warp, the epoch of each of its lanes.
using Clock = std::map<unsigned, std::array<uint32_t, kLanes>>;
using SharedClock = std::shared_ptr<const Clock>;  // null: nothing

SharedClock join(const SharedClock& a, const SharedClock& b) {
  if (!a || !b || a == b) return a ? a : b;
  Clock both = *a;
  for (const auto& [warp, epochs] : *b)
    for (unsigned i = 0; i < kLanes; ++i) both[warp][i] = std::max(both[warp][i], epochs[i]);
  return std::make_shared<const Clock>(std::move(both));
}

enum Collective : unsigned { kSyncwarp, kBallot, kReduceMax, kShuffleXor };
constexpr const char* kCollectives[] = {"__syncwarp", "__ballot_sync", "__reduce_max_sync", "__shfl_xor_sync"};

struct Warp {
  unsigned waiting = 0, ended = 0;  // lanes, as masks
  Collective collective;
  void* site;                                          // of the collective
  std::array<uint64_t, kLanes> values{}, exchanged{};  // what lanes bring, and what all had brought
};

struct Block;
struct Lane {
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  Block* block;
  Warp* warp;
  unsigned id, thread;  // in the launch, in the block
  size_t place;         // in Machine::ready
  uint32_t epoch;
  SharedClock before;    // what is ordered before what the lane does now
  SharedClock released;  // what its atomics tell others: as of its last fence
  SharedClock acquired;  // what its atomics were told: ordered from its next fence on

  unsigned warp_id() const {
    return id / kLanes;
  }
  unsigned bit() const {
    return 1u << id % kLanes;
  }
};

struct Shared {
  std::source_location declared;
  size_t at, bytes;
};

struct Block {
  unsigned id, left;
  char* memory;
  size_t used = 0;
  std::vector<Shared> shared;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
};

// Kinds of accesses; and the last ones to a byte, in few bits: most of the time goes in moving them.
enum Kind { kRead, kWrite, kAtomic };
struct Access {
  uint64_t epoch : 27 = 0, lane : 14 = 0, kind : 2 = kRead, site : 21 = 0;
};
constexpr unsigned kMostLanes = 1 << 14, kNeverWritten = (1 << 27) - 1;  // the epoch of such a write
struct Cell {
  Access write, reads[2];

  bool operator==(const Cell& other) const {
    return std::memcmp(this, &other, sizeof other) == 0;
  }
};
static_assert(sizeof(Cell) == 24);

// Device memory, and that which blocks share, with a Cell for each byte. Never given back, but reused when all is free.
template <class T>
T* reserve(size_t count) {
  void* const memory =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return static_cast<T*>(memory);
}
constexpr size_t kMemoryBytes = kMostBlocks * kSharedBytes + kDeviceBytes;
char* const memory = reserve<char>(kMemoryBytes);
Cell* const cells = reserve<Cell>(kMemoryBytes);

Cell* cell_of(const void* address) {
  return cells + (static_cast<const char*>(address) - memory);
}
bool is_shared(const void* address) {
  return static_cast<const char*>(address) < memory + kMostBlocks * kSharedBytes;
}

struct Machine {
  uint64_t seed = 0, random_state = 0;
  const std::function<void()>* thread = nullptr;
  Lane* lane = nullptr;  // that runs; null: the host
  jmp_buf host;
  std::vector<Lane*> ready;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<unsigned> pending;  // blocks that have not begun
  unsigned threads = 0, held_back = 0;
  uint64_t switches = 0;              // one in so many accesses, less 1
  uint32_t launched = 0, latest = 0;  // epochs up to the launch; the latest of all
  std::map<void*, SharedClock> atomics;

  uint64_t random() {  // splitmix64
    uint64_t x = random_state += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
};
Machine machine;

// Where code stands in the program, in 21 bits; and in the kernel's source, where that has debug information.
extern "C" const char __executable_start;
uint64_t offset_of(const void* code) {
  return static_cast<uint64_t>(static_cast<const char*>(code) - &__executable_start);
}
std::string source_of(const void* code) {
  char program[512] = {}, text[1024];
  if (readlink("/proc/self/exe", program, sizeof program - 1) < 0) return "?";
  std::snprintf(text, sizeof text, "addr2line -sie '%s' %#zx | grep -vm1 cuda_runtime.h", program,
                reinterpret_cast<uintptr_t>(code) - 1);
  FILE* const lines = popen(text, "r");
  const char* const line = lines ? std::fgets(text, sizeof text, lines) : nullptr;
  if (lines) pclose(lines);
  return line ? std::string(line, std::strcspn(line, " \n")) : "?";
}

std::string name_of(unsigned lane) {
  return "block " + std::to_string(lane / machine.threads) + " thread " + std::to_string(lane % machine.threads);
}

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "interleaved, seed %llu: %s %s\n", static_cast<unsigned long long>(machine.seed),
               machine.lane ? name_of(machine.lane->id).c_str() : "host", what.c_str());
  std::_Exit(1);
}

std::string lanes_in(unsigned mask) {
  std::string text;
  for (unsigned i = 0; i < kLanes; ++i)
    if (mask >> i & 1) text += (text.empty() ? "" : ",") + std::to_string(i);
  return text;
}

// -- Who runs

Lane& next() {
  const std::vector<Lane*>& ready = machine.ready;
  if (!machine.seed)
    return **std::min_element(ready.begin(), ready.end(), [](Lane* a, Lane* b) { return a->id < b->id; });
  for (int tries = 1;; ++tries) {
    Lane& lane = *ready[machine.random() % ready.size()];
    if (lane.warp_id() != machine.held_back || tries == 8) return lane;
  }
}

void resume(Lane* to) {
  machine.lane = to;
  if (!to) _longjmp(machine.host, 1);
  threadIdx.x = to->thread;
  blockIdx.x = to->block->id;
  _longjmp(to->context, 1);
}

// Where a lane stops, until it is its turn again.
void go_on(Lane* to) {
  if (to == machine.lane) return;
  if (_setjmp(machine.lane->context) == 0) resume(to);
}

void maybe_switch() {
  if (machine.seed && (machine.random() & machine.switches) == 0) go_on(&next());
}

void make_ready(Lane& lane) {
  lane.place = machine.ready.size();
  machine.ready.push_back(&lane);
}

void stop(Lane& lane) {
  machine.ready.back()->place = lane.place;
  machine.ready[lane.place] = machine.ready.back();
  machine.ready.pop_back();
}

void begin_epoch(Lane& lane, uint32_t epoch) {
  lane.epoch = epoch;
  machine.latest = std::max(machine.latest, epoch);
}

void begin_block(Block& block) {
  std::vector<unsigned>& pending = machine.pending;
  if (machine.seed) std::swap(pending[machine.random() % pending.size()], pending.back());
  block.id = pending.back();
  pending.pop_back();
  block.left = machine.threads;
  block.used = 0;
  block.shared.clear();
  for (Warp& each : block.warps) each.waiting = each.ended = 0;
  for (Lane& each : block.lanes) {
    each.id = block.id * machine.threads + each.thread;
    begin_epoch(each, machine.launched + 1);
    each.before = each.released = each.acquired = nullptr;
    make_ready(each);
  }
}

void end_lane() {
  Lane& lane = *machine.lane;
  Warp& warp = *lane.warp;
  warp.ended |= lane.bit();
  if (warp.waiting)
    fail("ends, while lanes " + lanes_in(warp.waiting) + " of its warp wait in " + kCollectives[warp.collective] +
         " (" + source_of(warp.site) + ")");
  stop(lane);
  if (--lane.block->left == 0 && !machine.pending.empty()) begin_block(*lane.block);
  // A lane that ends has no more to do, but its fiber has: it may even be its own successor.
  if (_setjmp(lane.context) == 0) resume(machine.ready.empty() ? nullptr : &next());
}

// A lane's fiber lives for ever: it runs one thread after the other.
void run_fiber() {
  Lane& own = *machine.lane;
  if (_setjmp(own.context) == 0) _longjmp(machine.host, 1);
  for (;;) {
    (*machine.thread)();
    end_lane();
  }
}

void make_fiber(Lane& lane) {
  lane.stack.reset(new char[kStackBytes]);
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = lane.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, run_fiber, 0);
  machine.lane = &lane;
  if (_setjmp(machine.host) == 0) setcontext(&context);
  machine.lane = nullptr;
}

void make_blocks(unsigned threads) {
  machine.threads = threads;
  machine.blocks.clear();
  for (unsigned b = 0; b < kMostBlocks; ++b) {
    Block& block = *machine.blocks.emplace_back(std::make_unique<Block>());
    block.memory = memory + b * kSharedBytes;
    block.lanes = std::vector<Lane>(threads);
    block.warps = std::vector<Warp>(threads / kLanes);
    for (unsigned i = 0; i < threads; ++i) {
      Lane& lane = block.lanes[i];
      lane.thread = i;
      lane.block = &block;
      lane.warp = &block.warps[i / kLanes];
      make_fiber(lane);
    }
  }
}

// -- What is ordered

SharedClock known_to(const Lane& lane) {
  Clock clock = lane.before ? *lane.before : Clock{};
  clock[lane.warp_id()][lane.id % kLanes] = lane.epoch;
  return std::make_shared<const Clock>(std::move(clock));
}

bool is_ordered(const Access& before, const Lane& lane) {
  if (before.epoch <= machine.launched || before.lane == lane.id) return true;
  if (!lane.before) return false;
  const auto found = lane.before->find(before.lane / kLanes);
  return found != lane.before->end() && found->second[before.lane % kLanes] >= before.epoch;
}

void access(const void* address, size_t bytes, Kind kind, void* site) {
  static constexpr const char* kKinds[] = {"read", "write", "atomic"};
  if (!machine.lane || static_cast<size_t>(static_cast<const char*>(address) - memory) >= kMemoryBytes) return;
  maybe_switch();
  Lane& lane = *machine.lane;
  const bool shared = is_shared(address);
  const auto where = [&] { return std::string(shared ? "shared" : "device") + " memory at " + source_of(site); };
  const Access now{lane.epoch, lane.id, static_cast<uint64_t>(kind), offset_of(site)};
  // The memory of a block that shares it has been that of others.
  const auto is_gone = [&](const Access& before) {
    return before.epoch <= machine.launched || (shared && before.lane / machine.threads != lane.block->id);
  };
  const auto check = [&](const Access& before) {
    if (is_gone(before) || (before.kind == kAtomic && kind == kAtomic) || is_ordered(before, lane)) return;
    fail(std::string("races: its ") + kKinds[kind] + " of " + where() + " is not ordered after the " +
         kKinds[before.kind] + " by " + name_of(before.lane) + " at " + source_of(&__executable_start + before.site));
  };
  // Which of two earlier reads gives way: with another seed another.
  const uint64_t kept = kind == kRead ? machine.random() % 2 : 0;
  const auto enter = [&](Cell& cell) {
    if (kind != kWrite && (shared ? is_gone(cell.write) : cell.write.epoch == kNeverWritten))
      fail("reads " + where() + ", which nothing has written");
    if (cell.write.epoch != kNeverWritten) check(cell.write);
    if (kind == kRead) {
      Access* place = &cell.reads[kept];
      for (Access& each : cell.reads)
        if (is_gone(each) || each.lane == lane.id) place = &each;
      *place = now;
    } else {
      for (const Access& each : cell.reads) check(each);
      cell = {now, {}};
    }
  };
  // Most bytes have the history of the one before them.
  Cell* const first = cell_of(address);
  Cell known = *first;
  enter(*first);
  for (Cell* cell = first + 1; cell < first + bytes; ++cell) {
    if (*cell == known) {
      *cell = cell[-1];
    } else {
      known = *cell;
      enter(*cell);
    }
  }
}

// A relaxed one, of device scope. What a fence came before travels with it, also through others.
void access_atomic(void* address, size_t bytes, void* site) {
  access(address, bytes, kAtomic, site);
  Lane& lane = *machine.lane;
  SharedClock& passed_on = machine.atomics[address];
  lane.acquired = join(lane.acquired, passed_on);
  passed_on = join(passed_on, lane.released);
}

// All lanes of a warp know what one knew, and what all did.
void join_lanes(Lane* lanes) {
  SharedClock joined;
  for (unsigned i = 0; i < kLanes; ++i) joined = join(joined, lanes[i].before);
  Clock clock = joined ? *joined : Clock{};
  for (unsigned i = 0; i < kLanes; ++i) clock[lanes->warp_id()][i] = lanes[i].epoch;
  joined = std::make_shared<const Clock>(std::move(clock));
  for (unsigned i = 0; i < kLanes; ++i) lanes[i].before = joined;
}

// Waits until all lanes of the warp have come; what they bring is then in Warp::exchanged.
Warp& meet(Collective collective, unsigned mask, uint64_t value, void* site) {
  Lane& lane = *machine.lane;
  Warp& warp = *lane.warp;
  const std::string name = kCollectives[collective];
  if (mask != ~0u) fail(name + ": only whole warps are supported");
  if (warp.ended)
    fail("waits in " + name + " (" + source_of(site) + "), without which lanes " + lanes_in(warp.ended) +
         " of its warp have ended");
  if (warp.waiting && warp.collective != collective)
    fail("comes to " + name + " (" + source_of(site) + "), while lanes " + lanes_in(warp.waiting) +
         " of its warp wait in " + kCollectives[warp.collective] + " (" + source_of(warp.site) + ")");
  warp.collective = collective;
  warp.site = site;
  warp.waiting |= lane.bit();
  warp.values[lane.id % kLanes] = value;
  stop(lane);
  if (warp.waiting == ~0u) {
    warp.waiting = 0;
    warp.exchanged = warp.values;
    Lane* const lanes = &lane.block->lanes[lane.thread / kLanes * kLanes];
    if (collective == kSyncwarp) join_lanes(lanes);
    for (unsigned i = 0; i < kLanes; ++i) {
      begin_epoch(lanes[i], lanes[i].epoch + 1);
      make_ready(lanes[i]);
    }
  }
  go_on(&next());
  return warp;
}

}  // namespace

#define HERE __builtin_return_address(0)

void __syncwarp() {
  meet(kSyncwarp, ~0u, 0, HERE);
}
unsigned __ballot_sync(unsigned mask, bool predicate) {
  unsigned ballot = 0;
  const Warp& warp = meet(kBallot, mask, predicate, HERE);
  for (unsigned i = 0; i < kLanes; ++i) ballot |= static_cast<unsigned>(warp.exchanged[i]) << i;
  return ballot;
}
unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const Warp& warp = meet(kReduceMax, mask, value, HERE);
  return static_cast<unsigned>(*std::max_element(warp.exchanged.begin(), warp.exchanged.end()));
}
uint64_t cuda_on_cpu_exchange(unsigned mask, uint64_t value, int lanes) {
  const unsigned other = (machine.lane->id ^ static_cast<unsigned>(lanes)) % kLanes;
  return meet(kShuffleXor, mask, value, HERE).exchanged[other];
}

// Acquires and releases.
void __threadfence() {
  maybe_switch();
  Lane& lane = *machine.lane;
  lane.before = join(lane.before, lane.acquired);
  lane.acquired = nullptr;
  lane.released = known_to(lane);
  begin_epoch(lane, lane.epoch + 1);
}
unsigned atomicAdd(unsigned* address, unsigned value) {
  access_atomic(address, sizeof *address, HERE);
  const unsigned old = *address;
  *address += value;
  return old;
}
unsigned long long atomicMax(unsigned long long* address, unsigned long long value) {
  access_atomic(address, sizeof *address, HERE);
  const unsigned long long old = *address;
  *address = std::max(old, value);
  return old;
}

void* cuda_on_cpu_shared(size_t bytes, const std::source_location& declared) {
  Block& block = *machine.lane->block;
  for (const Shared& each : block.shared)
    if (each.declared.line() == declared.line() && each.bytes == bytes &&
        !std::strcmp(each.declared.file_name(), declared.file_name()))
      return block.memory + each.at;
  block.shared.push_back({declared, block.used, bytes});
  block.used += (bytes + 15) / 16 * 16;
  if (block.used > kSharedBytes) fail("has too much shared memory");
  return block.memory + block.shared.back().at;
}

void cuda_on_cpu_seed(uint64_t seed) {
  machine.seed = machine.random_state = seed;
}

void cuda_on_cpu_run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (uint64_t{config.gridDim.x} * config.blockDim.x > kMostLanes || machine.latest > kNeverWritten / 2)
    fail("has more lanes or epochs than an access has bits for");
  if (machine.threads != config.blockDim.x) make_blocks(config.blockDim.x);
  machine.thread = &thread;
  machine.launched = machine.latest;
  machine.atomics.clear();
  machine.pending.resize(config.gridDim.x);
  for (unsigned i = 0; i < config.gridDim.x; ++i) machine.pending[i] = config.gridDim.x - 1 - i;
  const unsigned resident = machine.seed ? 1 + machine.random() % kMostBlocks : 1;
  machine.switches = (uint64_t{1} << machine.random() % 8) - 1;
  machine.held_back = machine.random() % (config.gridDim.x * config.blockDim.x / kLanes);
  for (unsigned b = 0; b < resident && !machine.pending.empty(); ++b) begin_block(*machine.blocks[b]);
  if (_setjmp(machine.host) == 0) resume(&next());
}

static size_t device_used = 0, device_held = 0;

cudaError_t cudaMalloc(void** address, size_t bytes) {
  if (!device_held++) device_used = 0;
  device_used = (device_used + 255) / 256 * 256;
  char* const start = memory + kMostBlocks * kSharedBytes + device_used;
  device_used += bytes;
  if (device_used > kDeviceBytes) fail("has too much device memory");
  for (size_t i = 0; i < bytes; ++i) cell_of(start)[i] = {{kNeverWritten}, {}};
  *address = start;
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  device_held -= address != nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  if (static_cast<size_t>(static_cast<char*>(to) - memory) < kMemoryBytes)
    for (size_t i = 0; i < bytes; ++i) cell_of(to)[i] = {};
  return cudaSuccess;
}

// What the compiler calls before accesses. Host code calls them too, and they return at once.
extern "C" {
#define ACCESSES(bytes)                               \
  void __tsan_read##bytes(void* address) {            \
    access(address, bytes, kRead, HERE);              \
  }                                                   \
  void __tsan_write##bytes(void* address) {           \
    access(address, bytes, kWrite, HERE);             \
  }                                                   \
  void __tsan_unaligned_read##bytes(void* address) {  \
    access(address, bytes, kRead, HERE);              \
  }                                                   \
  void __tsan_unaligned_write##bytes(void* address) { \
    access(address, bytes, kWrite, HERE);             \
  }
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16) void __tsan_read_range(void* address, size_t bytes) {
  access(address, bytes, kRead, HERE);
}
void __tsan_write_range(void* address, size_t bytes) {
  access(address, bytes, kWrite, HERE);
}
void __tsan_init() {
}
void __tsan_func_entry(void*) {
}
void __tsan_func_exit() {
}
void __tsan_vptr_update(void**, void*) {
}
void __tsan_vptr_read(void**) {
}
// Of host code: shared_ptr and static variables.
int __tsan_atomic32_fetch_add(int* address, int value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
char __tsan_atomic8_load(const char* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
}
