// See overlap.h. Sort by address, sweep; only regions whose spans meet are looked at element by element.
#include "overlap.h"

#include <algorithm>
#include <numeric>
#include <set>

namespace genopt {
namespace {

struct Span {
  const char *low, *high;
  const Region* region;
};

Span span_of(const Region& region) {
  if (region.strides.empty()) return {region.base, region.base + region.numel * region.item_size, &region};
  int64_t low = 0, high = 0;
  for (size_t d = 0; d < region.sizes.size(); ++d)
    (region.strides[d] < 0 ? low : high) += region.strides[d] * (region.sizes[d] - 1);
  return {region.base + low * region.item_size, region.base + (high + 1) * region.item_size, &region};
}

// Sufficient, and enough for any view that slicing and transposing make: each stride steps over all
// that the smaller ones reach.
bool nested(const Region& region) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < region.sizes.size(); ++d)
    if (region.sizes[d] > 1) dims.emplace_back(region.strides[d], region.sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

template <class Visit>
void for_each_element(const Region& region, Visit&& visit) {
  std::vector<int64_t> index(region.strides.size());
  const char* at = region.base;
  for (int64_t i = 0; i < region.numel; ++i) {
    visit(at);
    if (region.strides.empty()) {
      at += region.item_size;
      continue;
    }
    for (size_t d = region.sizes.size(); d-- > 0;) {
      at += region.strides[d] * region.item_size;
      if (++index[d] < region.sizes[d]) break;
      at -= region.strides[d] * region.sizes[d] * region.item_size;
      index[d] = 0;
    }
  }
}

using Pairs = std::set<std::pair<int64_t, int64_t>>;

void mark_elements(const Span* first, const Span* last, const char* high, Pairs& pairs) {
  const char* low = first->low;
  int64_t grain = 0;
  for (const Span* span = first; span != last; ++span)
    grain = std::gcd(grain, std::gcd(span->region->base - low, span->region->item_size));
  std::vector<int32_t> writer((high - low) / grain, -1);
  for (const Span* span = first; span != last; ++span) {
    const auto id = static_cast<int32_t>(span - first);
    for_each_element(*span->region, [&](const char* at) {
      for (int64_t byte = 0; byte < span->region->item_size; byte += grain) {
        int32_t& slot = writer[(at + byte - low) / grain];
        if (slot >= 0) pairs.emplace(first[slot].region->owner, span->region->owner);
        slot = id;
      }
    });
  }
}

}  // namespace

std::vector<std::pair<int64_t, int64_t>> find_overlaps(std::vector<Region> regions) {
  std::vector<Span> spans;
  spans.reserve(regions.size());
  for (const Region& region : regions)
    if (region.numel > 0) spans.push_back(span_of(region));
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.low < b.low; });
  Pairs pairs;
  for (size_t first = 0, last; first < spans.size(); first = last) {
    const char* high = spans[first].high;
    for (last = first + 1; last < spans.size() && spans[last].low < high; ++last)
      high = std::max(high, spans[last].high);
    const Region& region = *spans[first].region;
    if (last - first == 1 && (region.strides.empty() || nested(region))) continue;
    mark_elements(&spans[first], &spans[0] + last, high, pairs);
  }
  return {pairs.begin(), pairs.end()};
}

}  // namespace genopt
