// What is ordered before what, of the interleaved stand-in for CUDA: a detector of races, and the memory that it
// watches.
//
// The sources are compiled with GCC's instrumentation for ThreadSanitizer, which calls __tsan_* before every access.
// Its runtime is not linked: those functions are here. It knows of threads and C++'s order; lanes have CUDA's, in which
// a warp's lanes are not in step, and neither an atomic nor a vote orders memory.
//
// Races are found by what orders accesses in CUDA's memory model, in whatever order lanes happened to run: __syncwarp()
// among lanes of a warp; a fence, an atomic, an atomic that sees it and another fence; launches. A collective that
// exchanges values orders no memory. Also an error: a read of device or shared memory that nothing has written.
#include <sys/mman.h>

#include <cstdlib>

#include "lanes.h"

namespace interleaved {
namespace {

SharedClock join(const SharedClock& a, const SharedClock& b) {
  if (!a || !b || a == b) return a ? a : b;
  Clock both = *a;
  for (const auto& [warp, epochs] : *b)
    for (unsigned i = 0; i < kLanes; ++i) both[warp][i] = std::max(both[warp][i], epochs[i]);
  return std::make_shared<const Clock>(std::move(both));
}

// Kinds of accesses; and the last ones to a byte, in few bits: most of the time goes in moving them.
enum Kind { kRead, kWrite, kAtomic };
struct Access {
  uint64_t epoch : 27 = 0, lane : 14 = 0, kind : 2 = kRead, site : 21 = 0;
};
static_assert(kMostEpochs == 1 << 27 && kMostLanes == 1 << 14);
constexpr unsigned kNeverWritten = kMostEpochs - 1;  // the epoch of such a write
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
constexpr size_t kDeviceBytes = 32 << 20, kMemoryBytes = kMostBlocks * kSharedBytes + kDeviceBytes;
char* const memory = reserve<char>(kMemoryBytes);
Cell* const cells = reserve<Cell>(kMemoryBytes);

Cell* cell_of(const void* address) {
  return cells + (static_cast<const char*>(address) - memory);
}
bool is_shared(const void* address) {
  return static_cast<const char*>(address) < memory + kMostBlocks * kSharedBytes;
}

// Where code stands in the program, in 21 bits.
extern "C" const char __executable_start;
uint64_t offset_of(const void* code) {
  return static_cast<uint64_t>(static_cast<const char*>(code) - &__executable_start);
}

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

}  // namespace

void join_lanes(Lane* lanes) {
  SharedClock joined;
  for (unsigned i = 0; i < kLanes; ++i) joined = join(joined, lanes[i].before);
  Clock clock = joined ? *joined : Clock{};
  for (unsigned i = 0; i < kLanes; ++i) clock[lanes->warp_id()][i] = lanes[i].epoch;
  joined = std::make_shared<const Clock>(std::move(clock));
  for (unsigned i = 0; i < kLanes; ++i) lanes[i].before = joined;
}

char* shared_memory_of(unsigned block) {
  return memory + block * kSharedBytes;
}

}  // namespace interleaved

using namespace interleaved;

#define HERE __builtin_return_address(0)

// Acquires and releases.
void __threadfence() {
  maybe_switch();
  Lane& lane = *machine.lane;
  lane.before = join(lane.before, lane.acquired);
  lane.acquired = nullptr;
  lane.released = known_to(lane);
  machine.begin_epoch(lane, lane.epoch + 1);
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
