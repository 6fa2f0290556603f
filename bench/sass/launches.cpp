// What the host launches for given cases, and the memory that the launches work on, for launches.py to read.
//
// A line of standard input is a case: words of key=value, see cases.py. Each case is run by the plan itself on the CPU
// stand-in for CUDA, so tables, arguments and choices of kernels are those that a GPU would get; then by the CPU
// kernels, and the bits have to be equal. Printed are, with tabs between words:
//
//   case     name
//   launch   kernel's address, from anchor() on; blocks; threads of a block; arguments
//   memory   name; address; bytes               before the first launch, and again after the last one
#include <sys/mman.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "cpu/run.h"
#include "cuda/device_plan.h"
#include "quant/cpu.h"
#include "quant/cuda.h"

using namespace genopt;

extern "C" void anchor() {
}

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "launches: %s\n", what.c_str());
  std::exit(1);
}

// Memory where a GPU has its own: high addresses, the same ones at every run, tensors 512 bytes apart.
class Memory {
 public:
  void* allocate(const std::string& name, size_t bytes) {
    if (!start_) {
      void* const wanted = reinterpret_cast<void*>(0x7f1000000000);
      void* const got = mmap(wanted, kRoom, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
      if (got != wanted) fail("the addresses of a GPU are not free here");
      start_ = next_ = static_cast<unsigned char*>(got);
    }
    unsigned char* const at = next_;
    next_ += (bytes + 1023) / 512 * 512;  // with a gap
    if (next_ > start_ + kRoom) fail("too much memory for one case");
    pieces_.push_back({name, at, bytes});
    return at;
  }
  void clear() {
    launched_ = false;
    if (start_) madvise(start_, kRoom, MADV_DONTNEED);
    next_ = start_;
    pieces_.clear();
  }
  // What a launch meets; a later one what the first has left.
  void print_once() {
    if (!launched_) print();
    launched_ = true;
  }
  void print() const {
    for (const auto& [name, at, bytes] : pieces_) {
      std::printf("memory\t%s\t%llu\t", name.c_str(), static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(at)));
      print_bytes(at, bytes);
      std::printf("\n");
    }
  }
  static void print_bytes(const unsigned char* at, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) std::printf("%02x", at[i]);
  }

 private:
  struct Piece {
    std::string name;
    unsigned char* at;
    size_t bytes;
  };
  static constexpr size_t kRoom = size_t{1} << 28;
  unsigned char *start_ = nullptr, *next_ = nullptr;
  std::vector<Piece> pieces_;
  bool launched_ = false;
};

Memory memory;

// Numbers that are the same with every compiler.
class Random {
 public:
  double uniform() {  // in (0, 1)
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (static_cast<double>(state_ >> 40) + 0.5) * 0x1p-24;
  }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  uint64_t state_ = 1;
};

class Case {
 public:
  explicit Case(const std::string& line) {
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      const size_t equals = word.find('=');
      if (equals == std::string::npos) fail("not key=value: " + word);
      values_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }
  std::string text(const std::string& key, const std::string& fallback = "") const {
    const auto found = values_.find(key);
    return found == values_.end() ? fallback : found->second;
  }
  int64_t integer(const std::string& key, int64_t fallback = 0) const {
    return std::stoll(text(key, std::to_string(fallback)));
  }
  std::vector<std::string> list(const std::string& key) const {
    std::vector<std::string> items;
    std::istringstream given(text(key));
    for (std::string item; std::getline(given, item, ',');) items.push_back(item);
    return items;
  }
  DType dtype(const std::string& key, const std::string& fallback = "float32") const {
    static const std::map<std::string, DType> kNames = {{"float32", DType::kFloat32},
                                                        {"float64", DType::kFloat64},
                                                        {"bfloat16", DType::kBFloat16},
                                                        {"float16", DType::kFloat16},
                                                        {"int8", DType::kInt8}};
    const auto found = kNames.find(text(key, fallback));
    if (found == kNames.end()) fail("no dtype: " + text(key));
    return found->second;
  }

 private:
  std::map<std::string, std::string> values_;
};

void fill(void* data, DType dtype, int64_t numel, const std::function<double()>& number) {
  for (int64_t i = 0; i < numel; ++i) {
    const double x = number();
    if (is_block(dtype)) {
      static_cast<unsigned char*>(data)[i] = static_cast<unsigned char>(static_cast<int>(x));
      continue;
    }
    with_codec(dtype, [&]<class Codec>(Codec) {
      static_cast<typename Codec::Stored*>(data)[i] = Codec::encode(static_cast<float>(x));
    });
  }
}

// Parameters of one kind and all that belongs to them, twice: for the launches and for the CPU kernels.
struct Step {
  Plan plan, twin;
  std::vector<std::pair<void*, std::vector<unsigned char>>> expected;  // where results lie, and what they have to be
  double norm = 0;

  explicit Step(const Case& given) : plan(rule_info(given.text("rule"))), twin(plan.rule) {
    Options options = kNoOptions;
    const auto own = given.list("options");
    for (size_t i = 0; i < own.size(); ++i) options[i] = std::stod(own[i]);
    plan.groups = twin.groups = {options};
    plan.control.measure = plan.control.only_measure = given.integer("measures") != 0;
    Random random;
    for (int64_t r = 0; r < given.integer("rows", 1); ++r)
      add_row(given, options, r ? ' ' + std::to_string(r) : "", random);
  }

  void add_row(const Case& given, const Options& options, const std::string& suffix, Random& random) {
    Row& row = plan.rows.emplace_back();
    row.numel = given.integer("numel");
    row.tile = static_cast<int>(given.integer("block", kTile));
    row.active = true;
    row.used = plan.rule.used_states(options);
    if (const int64_t columns = given.integer("columns")) {
      row.used = plan.rule.factored;
      row.factors = kState + std::countr_zero(row.used);
      row.matrices = {1, row.numel / columns, columns};
    }
    const std::string extra = given.text("extra", "none");
    if (extra != "none") row.used |= kWithExtra;
    row.extra = extra == "master" ? Extra::kMaster : extra == "none" ? Extra::kNone : Extra::kCompensation;
    for (const std::string& which : given.list("unbiased"))
      row.unbiased |= which == "weights" ? 1u << kParam : (row.used & 15u) << kState;
    fill_operands(row, given, suffix, random);
    row.step = memory.allocate("step" + suffix, sizeof(float));
    *static_cast<float*>(row.step) = 999;
    for (size_t i = 0; i < plan.rule.running.size(); ++i) {
      row.running[i] = memory.allocate(plan.rule.running[i] + suffix, sizeof(float));
      *static_cast<float*>(row.running[i]) = 0.5f;
    }
    copy_to_twin();
  }

  void fill_operands(Row& row, const Case& given, const std::string& suffix, Random& random) {
    static const std::string kNames[] = {"weights", "gradient", "state 0", "state 1",
                                         "state 2", "state 3",  "average", "extra"};
    for (int k = 0; k < kOperands; ++k) {
      const bool is_state = k >= kState && k < kAverage;
      const bool square = is_state && plan.rule.squares >> (k - kState) & 1;
      row.dtype[k] = given.dtype(k == kParam ? "weights" : k == kGrad ? "gradient" : is_state ? "states" : "extras");
      if (k >= kAverage) row.dtype[k] = row.extra == Extra::kMaster ? DType::kFloat32 : row.dtype[kParam];
      if (square && row.dtype[k] == DType::kInt8) row.dtype[k] = DType::kUInt8;
      if (!is_used(row.used, k)) continue;
      row.data[k] = memory.allocate(kNames[k] + suffix, numbers_of(row, k) * size_of(row.dtype[k]));
      fill(row.data[k], row.dtype[k], numbers_of(row, k), [&] {
        if (k != kParam && given.integer("zeros")) return 0.0;
        if (is_block(row.dtype[k]))
          return std::trunc(random.uniform() * 127) * (square || random.uniform() < 0.5 ? 1 : -1);
        if (k == kGrad) return given.integer("nans") && random.uniform() < 0.1 ? NAN : random.normal();
        if (square) return 1e-6 + 1e-3 * random.uniform();
        return random.normal() * (is_state ? 0.1 : 0.02);
      });
      if (!is_state || !is_block(row.dtype[k])) continue;
      row.scales[k - kState] = static_cast<float*>(
          memory.allocate(kNames[k] + suffix + " scales", tiles_of(row.numel, row.tile) * sizeof(float)));
      for (int64_t i = 0; i < tiles_of(row.numel, row.tile); ++i)
        row.scales[k - kState][i] = 0.25f * static_cast<float>(1 + i % 3);
    }
  }

  static int64_t numbers_of(const Row& row, int operand) {
    if (!row.is_factor(operand)) return row.numel;
    return operand == row.factors ? row.matrices.rows : row.matrices.columns;
  }

  // The CPU kernels' row is a copy of this one.
  void copy_to_twin() {
    Row& row = twin.rows.emplace_back(plan.rows.back());
    const auto copy = [this]<class T>(T*& data, size_t bytes) {
      if (!data) return;
      const auto* from = static_cast<const unsigned char*>(static_cast<const void*>(data));
      expected.emplace_back(data, std::vector<unsigned char>(from, from + bytes));
      data = static_cast<T*>(static_cast<void*>(expected.back().second.data()));
    };
    for (int k = 0; k < kOperands; ++k) copy(row.data[k], numbers_of(row, k) * size_of(row.dtype[k]));
    for (float*& scales : row.scales) copy(scales, tiles_of(row.numel, row.tile) * sizeof(float));
    copy(row.step, sizeof(float));
    for (void*& running : row.running) copy(running, sizeof(float));
  }

  void run() {
    cuda::DevicePlan device(plan.rule, kHost);
    DeviceTensors tensors{};
    double* const norm = static_cast<double*>(memory.allocate("norm", sizeof(double)));
    tensors[kGradNorm] = {norm, DType::kFloat64, 1};
    std::array<double, kMaxShared> shared{0.5, 0.75, 0.25, 3};
    void* const on_device = memory.allocate("shared", sizeof shared);
    std::memcpy(on_device, shared.data(), sizeof shared);
    if (plan.rule.shared) tensors[kSharedNumbers] = {on_device, DType::kFloat64, plan.rule.shared};
    twin.shared = shared.data();
    device.step(plan, std::vector<Sources>(1), tensors, {nullptr, false, [](size_t bytes) {
                                                           void* const at = memory.allocate("table", bytes);
                                                           return std::shared_ptr<void>(at, [](void*) {});
                                                         }});
    memory.print();
    twin.control = plan.control;
    if (plan.control.only_measure) {
      twin.number();
      cpu::measure(twin, 1);
      twin.decide();
      if (twin.total_norm() != *norm) fail("the norm is not that of the CPU kernels");
      return;
    }
    cpu::step(twin, 1);
    for (const auto& [data, bytes] : expected)
      if (std::memcmp(data, bytes.data(), bytes.size()) != 0) fail("the step is not that of the CPU kernels");
    if (std::memcmp(on_device, shared.data(), sizeof shared) != 0) fail("numbers of all rows are not the CPU kernels'");
  }
};

void run_quantization(const Case& given, bool encodes) {
  Random random;
  quant::Quantization q{};
  q.numel = given.integer("numel");
  q.run = given.integer("run", 256);
  q.units = (q.numel + q.run - 1) / q.run;
  q.bits = static_cast<int>(given.integer("bits", 8));
  q.dtype = given.dtype("numbers");
  const size_t bytes = q.numel * size_of(q.dtype);
  q.numbers = memory.allocate("numbers", bytes);
  q.codes = memory.allocate("codes", q.numel);
  q.scale = static_cast<float*>(memory.allocate("scales", q.units * sizeof(float)));
  if (encodes) {
    fill(q.numbers, q.dtype, q.numel, [&] { return random.normal(); });
  } else {
    fill(q.codes, DType::kInt8, q.numel, [&] { return random.uniform() * 254 - 127; });
    fill(q.scale, DType::kFloat32, q.units, [&] { return 0.01 + 0.01 * random.uniform(); });
  }
  quant::Quantization twin = q;
  std::vector<unsigned char> numbers(bytes);
  std::vector<int8_t> codes(q.numel);
  std::vector<float> scale(q.scale, q.scale + q.units);
  std::memcpy(numbers.data(), q.numbers, bytes);
  std::memcpy(codes.data(), q.codes, codes.size());
  twin.numbers = numbers.data();
  twin.codes = codes.data();
  twin.scale = scale.data();
  const cuda::Queue queue{};
  if (given.integer("blocks", 1) != 0 || !encodes) {
    encodes ? quant::cuda::quantize_blocks(q, queue) : quant::cuda::decode(q, queue);
  } else {
    quant::cuda::find_scales(q, memory.allocate("ranges", q.units * 16), queue);
    quant::cuda::encode(q, queue);
  }
  memory.print();
  if (given.integer("blocks", 1) != 0 || !encodes) {
    encodes ? quant::cpu::quantize_blocks(twin, 1) : quant::cpu::decode(twin, 1);
  } else {
    quant::cpu::find_scales(twin, 1);
    quant::cpu::encode(twin, 1);
  }
  if (std::memcmp(q.numbers, twin.numbers, bytes) != 0 || std::memcmp(q.codes, twin.codes, codes.size()) != 0 ||
      std::memcmp(q.scale, twin.scale, q.units * sizeof(float)) != 0)
    fail("the codes or numbers are not those of the CPU kernels");
}

}  // namespace

void record_launch(const void* kernel, const cudaLaunchConfig_t& config, const std::vector<unsigned char>& arguments) {
  const auto address = [](const void* function) {
    return static_cast<long long>(reinterpret_cast<uintptr_t>(function));
  };
  std::printf("launch\t%lld\t%u\t%u\t", address(kernel) - address(reinterpret_cast<const void*>(anchor)),
              config.gridDim.x, config.blockDim.x);
  Memory::print_bytes(arguments.data(), arguments.size());
  std::printf("\n");
  memory.print_once();
}

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    const Case given(line);
    memory.clear();
    std::printf("case\t%s\n", given.text("name").c_str());
    const std::string kind = given.text("kind");
    if (kind == "step") {
      Step(given).run();
    } else if (kind == "quantize" || kind == "dequantize") {
      run_quantization(given, kind == "quantize");
    } else {
      fail("no kind: " + kind);
    }
  }
}
