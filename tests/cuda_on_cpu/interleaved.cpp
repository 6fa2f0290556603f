// How kernels run, of the stand-in for CUDA: in seeded random order, under a detector of races (races.cpp).
//
// Every lane is a fiber. A few blocks are resident at a time, in any order, and any lane of theirs may go on at each
// access to memory that lanes share.
//
// Errors here: lanes that meet in different collectives, a lane that ends while others of its warp wait for it.
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "lanes.h"

dim3 threadIdx, blockIdx;

namespace interleaved {

Machine machine;

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

namespace {

constexpr size_t kStackBytes = 128 << 10;  // 32 KB of arguments are copied there

std::string lanes_in(unsigned mask) {
  std::string text;
  for (unsigned i = 0; i < kLanes; ++i)
    if (mask >> i & 1) text += (text.empty() ? "" : ",") + std::to_string(i);
  return text;
}

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

void make_ready(Lane& lane) {
  lane.place = machine.ready.size();
  machine.ready.push_back(&lane);
}

void stop(Lane& lane) {
  machine.ready.back()->place = lane.place;
  machine.ready[lane.place] = machine.ready.back();
  machine.ready.pop_back();
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
    machine.begin_epoch(each, machine.launched + 1);
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
    block.memory = shared_memory_of(b);
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
      machine.begin_epoch(lanes[i], lanes[i].epoch + 1);
      make_ready(lanes[i]);
    }
  }
  go_on(&next());
  return warp;
}

}  // namespace

void maybe_switch() {
  if (machine.seed && (machine.random() & machine.switches) == 0) go_on(&next());
}

}  // namespace interleaved

using namespace interleaved;

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
  if (uint64_t{config.gridDim.x} * config.blockDim.x > kMostLanes || machine.latest > kMostEpochs / 2)
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
