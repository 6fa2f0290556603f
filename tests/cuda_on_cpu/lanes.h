// Lanes of the interleaved stand-in, as its two parts share them: who runs (interleaved.cpp), and what is ordered
// before what (races.cpp).
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <vector>

namespace interleaved {

constexpr unsigned kLanes = 32, kMostBlocks = 4;  // of a warp; resident
constexpr size_t kSharedBytes = 64 << 10;         // of a block
// What an access that is remembered has bits for.
constexpr unsigned kMostLanes = 1 << 14, kMostEpochs = 1 << 27;

// What a lane knows to have happened: of each warp, the epoch of each of its lanes.
using Clock = std::map<unsigned, std::array<uint32_t, kLanes>>;
using SharedClock = std::shared_ptr<const Clock>;  // null: nothing

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

  void begin_epoch(Lane& lane, uint32_t epoch) {
    lane.epoch = epoch;
    latest = std::max(latest, epoch);
  }
};
extern Machine machine;

[[noreturn]] void fail(const std::string& what);
// Where code stands in the kernel's source, if that has debug information.
std::string source_of(const void* code);
std::string name_of(unsigned lane);
// Before an access: any lane of a resident block may go on.
void maybe_switch();

// The memory that a resident block's lanes share.
char* shared_memory_of(unsigned block);
// All lanes of a warp know what one knew, and what all did. `lanes`: its first one.
void join_lanes(Lane* lanes);

}  // namespace interleaved
