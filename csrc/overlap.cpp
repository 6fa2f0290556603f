// See overlap.h. Sort by address, sweep; only regions whose spans meet are looked at more closely, by their dimensions:
// two elements share a byte where a sum of strides, each times a bounded whole number, comes to less than an element.
#include "overlap.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <set>

namespace genopt {
namespace {

std::pair<const char*, const char*> ends_of(const Region& region) {
  if (region.strides.empty()) return {region.base, region.base + region.numel * region.item_size};
  int64_t low = 0, high = 0;
  for (size_t d = 0; d < region.sizes.size(); ++d)
    (region.strides[d] < 0 ? low : high) += region.strides[d] * (region.sizes[d] - 1);
  return {region.base + low * region.item_size, region.base + (high + 1) * region.item_size};
}

// A whole number from `least` to `most`, times a stride in bytes above 0.
struct Term {
  int64_t stride, least, most;
};

// The offsets of a region's elements, as sums of terms. `sign` is -1 for a region whose offsets are subtracted.
void add_terms(const Region& region, int sign, std::vector<Term>& terms) {
  const auto add = [&](int64_t stride, int64_t size) {
    const bool back = stride * sign < 0;
    if (size > 1 && stride != 0) terms.push_back({std::abs(stride), back ? 1 - size : 0, back ? 0 : size - 1});
  };
  if (region.strides.empty()) add(region.item_size, region.numel);
  for (size_t d = 0; d < region.strides.size(); ++d) add(region.strides[d] * region.item_size, region.sizes[d]);
}

// Largest first, each stride once.
void merge_terms(std::vector<Term>& terms) {
  std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.stride > b.stride; });
  size_t count = 0;
  for (const Term& term : terms) {
    if (count > 0 && terms[count - 1].stride == term.stride) {
      terms[count - 1].least += term.least;
      terms[count - 1].most += term.most;
    } else {
      terms[count++] = term;
    }
  }
  terms.resize(count);
}

int64_t floor_of(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}

// Whether the terms can come to a sum in [low, high], not all of them 0 if `moves`. Views that slicing and transposing
// make have two choices a term; others may have many: nothing, once `work` is used up.
class Search {
 public:
  Search(const std::vector<Term>& terms, bool moves, int work) : terms_(terms), moves_(moves), work_(work) {
    below_.resize(terms.size() + 1, {0, 0});
    for (size_t i = terms.size(); i-- > 0;)
      below_[i] = {below_[i + 1].first + terms[i].stride * terms[i].least,
                   below_[i + 1].second + terms[i].stride * terms[i].most};
  }
  std::optional<bool> reaches(int64_t low, int64_t high, size_t i = 0, bool moved = false) {
    if (--work_ < 0) return std::nullopt;
    if (high < below_[i].first || low > below_[i].second) return false;
    if (i == terms_.size()) return moved || !moves_;
    const auto& [stride, least, most] = terms_[i];
    const int64_t first = std::max(least, -floor_of(below_[i + 1].second - low, stride));
    const int64_t last = std::min(most, floor_of(high - below_[i + 1].first, stride));
    for (int64_t n = first; n <= last; ++n) {
      const std::optional<bool> found = reaches(low - n * stride, high - n * stride, i + 1, moved || n != 0);
      if (!found || *found) return found;
    }
    return false;
  }

 private:
  const std::vector<Term>& terms_;
  const bool moves_;
  int work_;
  std::vector<std::pair<int64_t, int64_t>> below_;  // what terms from i on can come to
};

constexpr int kWork = 10000;

// Nothing: it takes too long to tell by dimensions.
std::optional<bool> share_by_dimensions(const Region& a, const Region& b) {
  if (a.strides.empty() && b.strides.empty()) return true;  // as their spans meet
  std::vector<Term> terms;
  add_terms(a, 1, terms);
  add_terms(b, -1, terms);
  merge_terms(terms);
  const int64_t apart = b.base - a.base;
  return Search(terms, false, kWork).reaches(apart - a.item_size + 1, apart + b.item_size - 1);
}

bool has_more_elements_than_room(const Region& region) {
  const auto [low, high] = ends_of(region);
  return region.numel > (high - low) / region.item_size;
}

std::optional<bool> revisits(const Region& region) {
  if (region.strides.empty()) return false;
  for (size_t d = 0; d < region.sizes.size(); ++d)
    if (region.strides[d] == 0 && region.sizes[d] > 1) return true;
  if (has_more_elements_than_room(region)) return true;
  std::vector<Term> terms;  // of the difference between two of its elements
  add_terms(region, 1, terms);
  for (Term& term : terms) {
    const int64_t most = term.most - term.least;
    term = {term.stride, -most, most};
  }
  const size_t dimensions = terms.size();
  merge_terms(terms);
  if (terms.size() < dimensions) return true;  // two of one stride
  return Search(terms, true, kWork).reaches(1 - region.item_size, region.item_size - 1);
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

// Element by element, for as many regions or such strides that this is less work. No region has more elements than its
// span has room for.
void mark_elements(const std::vector<const Region*>& group, Pairs& pairs) {
  const char *low = group[0]->base, *high = low;
  int64_t grain = 0;
  for (const Region* region : group) {
    const auto [first, last] = ends_of(*region);
    low = std::min(low, first);
    high = std::max(high, last);
  }
  for (const Region* region : group) grain = std::gcd(grain, std::gcd(region->base - low, region->item_size));
  std::vector<int32_t> writer((high - low) / grain, -1);
  for (size_t id = 0; id < group.size(); ++id) {
    for_each_element(*group[id], [&](const char* at) {
      for (int64_t byte = 0; byte < group[id]->item_size; byte += grain) {
        int32_t& slot = writer[(at + byte - low) / grain];
        if (slot >= 0) pairs.emplace(group[slot]->owner, group[id]->owner);
        slot = static_cast<int32_t>(id);
      }
    });
  }
}

// By dimensions. False: some take too long.
bool compare_pairs(const std::vector<const Region*>& group, Pairs& pairs) {
  for (size_t i = 0; i < group.size(); ++i) {
    const char* high = ends_of(*group[i]).second;
    for (size_t j = i + 1; j < group.size() && ends_of(*group[j]).first < high; ++j) {
      const std::optional<bool> shared = share_by_dimensions(*group[i], *group[j]);
      if (!shared) return false;
      if (*shared) pairs.emplace(group[i]->owner, group[j]->owner);
    }
  }
  return true;
}

// Says yes where neither dimensions nor memory bound the work.
bool share(const Region& a, const Region& b) {
  if (const std::optional<bool> shared = share_by_dimensions(a, b)) return *shared;
  if (has_more_elements_than_room(a) || has_more_elements_than_room(b)) return true;
  Region first = a, second = b;
  first.owner = 0;
  second.owner = 1;
  Pairs pairs;
  mark_elements({&first, &second}, pairs);
  return pairs.count({0, 1}) > 0;
}

}  // namespace

Regions::Regions(std::vector<Region> regions) : regions_(std::move(regions)) {
  spans_.reserve(regions_.size());
  for (size_t i = 0; i < regions_.size(); ++i) {
    const auto [low, high] = ends_of(regions_[i]);
    if (regions_[i].numel > 0) spans_.push_back({low, high, i});
  }
  std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.low < b.low; });
  reach_.reserve(spans_.size());
  for (const Span& span : spans_) reach_.push_back(reach_.empty() ? span.high : std::max(reach_.back(), span.high));
}

std::vector<std::pair<int64_t, int64_t>> Regions::find_overlaps() const {
  Pairs pairs;
  for (size_t first = 0, last; first < spans_.size(); first = last) {
    for (last = first + 1; last < spans_.size() && spans_[last].low < reach_[last - 1]; ++last) {
    }
    // Those that visit a byte twice are in conflict whatever else they meet.
    std::vector<const Region*> group;
    int64_t elements = 0;
    bool unsure = false;
    for (size_t i = first; i < last; ++i) {
      const Region& region = regions_[spans_[i].region];
      const std::optional<bool> twice = revisits(region);
      unsure = unsure || !twice;
      if (twice.value_or(false)) {
        pairs.emplace(region.owner, region.owner);
      } else {
        group.push_back(&region);
        elements += region.numel;
      }
    }
    const int64_t count = static_cast<int64_t>(group.size());
    // Marking also takes memory for the whole span.
    const int64_t room = (reach_[last - 1] - spans_[first].low) / 16;
    const bool by_pairs = !unsure && count * count < std::max(elements, room) + 64;
    if (count > (unsure ? 0 : 1) && !(by_pairs && compare_pairs(group, pairs))) mark_elements(group, pairs);
  }
  return {pairs.begin(), pairs.end()};
}

std::vector<const Region*> Regions::find_met(const Region& other) const {
  std::vector<const Region*> met;
  if (other.numel == 0) return met;
  const auto [low, high] = ends_of(other);
  // The first span that ends after `low`: from there on they may meet.
  const auto from = std::upper_bound(reach_.begin(), reach_.end(), low) - reach_.begin();
  for (size_t i = from; i < spans_.size() && spans_[i].low < high; ++i) {
    if (spans_[i].high <= low) continue;
    const Region& region = regions_[spans_[i].region];
    if (share(region, other)) met.push_back(&region);
  }
  return met;
}

}  // namespace genopt
