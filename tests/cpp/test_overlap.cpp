// find_overlaps and find_met: exactly the regions that share a byte.
#include <algorithm>

#include "check.h"
#include "overlap.h"

using namespace genopt;

static char memory[4096];

static Region contiguous(int64_t first, int64_t numel, int64_t owner) {
  return {memory + 4 * first, 4, numel, {}, {}, owner};
}
static Region view(int64_t first, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t owner) {
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  return {memory + 4 * first, 4, numel, std::move(sizes), std::move(strides), owner};
}
static bool overlap(std::vector<Region> regions) {
  return !Regions(std::move(regions)).find_overlaps().empty();
}

int main() {
  CHECK(!overlap({}), "nothing");
  CHECK(!overlap({contiguous(0, 10, 0), contiguous(10, 5, 1), contiguous(15, 0, 2), contiguous(12, 0, 3)}),
        "touching and empty");
  CHECK(!overlap({contiguous(32, 32, 0), contiguous(0, 32, 1), contiguous(96, 32, 2), contiguous(64, 32, 3)}),
        "slices of one buffer");
  CHECK(!overlap({contiguous(5, 0, 0), contiguous(0, 10, 1), view(5, {0, 3}, {3, 1}, 2)}), "empty ones inside another");
  CHECK(overlap({contiguous(0, 11, 0), contiguous(10, 5, 1)}), "one element");
  CHECK(overlap({contiguous(0, 10, 0), {memory + 39, 1, 1, {}, {}, 1}}), "one byte, another element size");
  CHECK(!overlap({contiguous(0, 10, 0), {memory + 40, 1, 1, {}, {}, 1}}), "the next byte");
  CHECK(overlap({contiguous(8, 16, 0), contiguous(8, 16, 1)}), "the same twice");
  CHECK(overlap({contiguous(0, 100, 0), contiguous(20, 5, 1), contiguous(200, 5, 2)}), "one inside the other");
  CHECK(!overlap({view(0, {50}, {2}, 0), view(1, {50}, {2}, 1)}), "even and odd");
  CHECK(overlap({view(0, {50}, {2}, 0), view(1, {10}, {3}, 1)}), "strides that meet");
  CHECK(!overlap({view(0, {10, 4}, {8, 1}, 0), view(4, {10, 4}, {8, 1}, 1)}), "columns");
  CHECK(overlap({view(0, {10, 5}, {8, 1}, 0), view(4, {10, 4}, {8, 1}, 1)}), "columns that meet");
  CHECK(overlap({view(0, {5}, {0}, 0)}), "expanded");
  CHECK(overlap({view(0, {4, 4}, {1, 1}, 0)}), "sliding window");
  CHECK(!overlap({view(9, {5}, {-2}, 0), view(8, {5}, {-2}, 1)}), "backwards, even and odd");
  CHECK(overlap({view(9, {5}, {-2}, 0), view(1, {1}, {1}, 1)}), "the far end of one that runs backwards");
  CHECK(!overlap({view(0, {3, 2}, {2, 3}, 0)}), "strides that interlock without meeting");
  const auto pairs = Regions({contiguous(0, 9, 7), contiguous(3, 2, 8), contiguous(50, 2, 9)}).find_overlaps();
  CHECK(pairs.size() == 1 && pairs[0] == std::make_pair(int64_t{7}, int64_t{8}), "owners");
  const auto self = Regions({view(0, {3, 4}, {0, 1}, 5), contiguous(100, 4, 6)}).find_overlaps();
  CHECK(self.size() == 1 && self[0] == std::make_pair(int64_t{5}, int64_t{5}), "a pair with itself");

  // Bounded by dimensions: none of these walks its elements.
  constexpr int64_t kHuge = int64_t{1} << 36;
  CHECK(overlap({view(0, {kHuge}, {0}, 0)}), "expanded to 2^36 elements");
  CHECK(!overlap({view(0, {kHuge, 1}, {8, 1}, 0), view(1, {kHuge, 7}, {8, 1}, 1)}), "2^36 rows, columns apart");
  CHECK(overlap({view(0, {kHuge, 2}, {8, 1}, 0), view(1, {kHuge, 7}, {8, 1}, 1)}), "2^36 rows, columns that meet");
  // Nor is memory taken for a span of 2^42 bytes.
  std::vector<Region> far;
  for (int64_t i = 0; i < 90; ++i) far.push_back(view(7 * i, {60}, {kHuge / 4}, i));
  CHECK(!overlap(far), "few elements far apart");
  far.push_back(view(7 * 89, {2}, {kHuge / 4}, 90));
  CHECK(overlap(far), "few elements far apart, of which two meet");

  const Regions regions({contiguous(0, 10, 0), view(20, {10}, {2}, 1), view(21, {10}, {2}, 2), contiguous(50, 0, 3)});
  const auto met = [&](const Region& other) {
    std::vector<int64_t> owners;
    for (const Region* region : regions.find_met(other)) owners.push_back(region->owner);
    std::sort(owners.begin(), owners.end());
    return owners;
  };
  using Owners = std::vector<int64_t>;
  CHECK(met(contiguous(10, 10, 9)).empty(), "between them");
  CHECK(met(contiguous(41, 9, 9)).empty(), "behind them");
  CHECK(met(contiguous(0, 0, 9)).empty() && met(contiguous(48, 9, 9)).empty(), "empty ones");
  CHECK((met(contiguous(9, 12, 9)) == Owners{0, 1}), "two of them");
  CHECK((met(view(20, {10}, {2}, 9)) == Owners{1}), "one of two that interlock");
  CHECK((met(contiguous(0, 60, 9)) == Owners{0, 1, 2}), "all");
  CHECK((met(view(5, {kHuge}, {0}, 9)) == Owners{0}), "an expanded one");
  CHECK(Regions().find_met(contiguous(0, 10, 9)).empty(), "nothing to meet");
}
