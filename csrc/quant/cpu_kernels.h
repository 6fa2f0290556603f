// How one tensor is quantized and dequantized on CPU, a piece of 4096 elements after the other, each read and written
// once. Included once by each quant/cpu_*.cpp, as cpu/walk.h is by cpu/walk_*.cpp. The inner loops:
// loops.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "loops.h"

namespace genopt::quant::GENOPT_CAPABILITY {

// Elements of shorter runs take their units' numbers from columns: those of the units, where each element in a row of
// that many has its own, else copies of them, for so many elements at once.
constexpr int kShortRun = 32;
constexpr int kTogether = 256;

inline bool has_rows(const Quantization& q) {
  return q.run == 1 && q.units >= kShortRun;
}

// Calls visit(unit, begin, end) for the parts of elements [begin, end) that share a run.
template <class Visit>
void for_runs(const Quantization& q, int64_t begin, int64_t end, Visit visit) {
  int64_t unit = begin / q.run % q.units, left = q.run - begin % q.run;
  for (; begin < end; left = q.run) {
    const int64_t stop = std::min(end, begin + left);
    visit(unit, begin, stop);
    begin = stop;
    if (++unit == q.units) unit = 0;
  }
}

// The same where runs are single elements: a row of units at once.
template <class Visit>
void for_rows(const Quantization& q, int64_t begin, int64_t end, Visit visit) {
  for (int64_t unit = begin % q.units; begin < end; unit = 0) {
    const int64_t stop = std::min(end, begin + q.units - unit);
    visit(unit, begin, stop);
    begin = stop;
  }
}

// Calls work(codec, T(), symmetric, stochastic), the last two as std::bool_constant.
template <class Work>
void with_types(const Quantization& q, Work work) {
  const auto with_flag = [](bool flag, auto visit) { flag ? visit(std::true_type{}) : visit(std::false_type{}); };
  with_codec(q.dtype, [&](auto codec) {
    using T = Compute<decltype(codec)>;
    with_flag(q.zero_point == nullptr, [&](auto symmetric) {
      with_flag(q.stochastic, [&](auto stochastic) { work(codec, T{}, symmetric, stochastic); });
    });
  });
}

// Calls encode(first element, their number, where their codes go, whether non-temporally, random key) for each piece.
template <class Encode>
void for_codes(const Quantization& q, bool non_temporal, int64_t begin, int64_t end, Encode encode) {
  const Fence fence;
  alignas(64) int8_t wide[kPiece + 1];
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t at = piece * kPiece;
    const int count = static_cast<int>(std::min<int64_t>(kPiece, q.numel - at));
    const uint32_t key = q.stochastic ? random_key(q.seed, static_cast<uint64_t>(at)) : 0;
    if (q.codes && !non_temporal) prefetch(static_cast<const char*>(q.codes) + at * q.bits / 8, count * q.bits / 8);
    if (q.bits == 8 && q.codes) {
      encode(at, count, static_cast<int8_t*>(q.codes) + at, non_temporal, key);
    } else {
      encode(at, count, wide, false, key);
      if (q.codes) pack_run(wide, count, static_cast<uint8_t*>(q.codes) + at / 2, non_temporal);
    }
  }
}

inline void quantize_blocks(const Quantization& q, bool non_temporal, int64_t begin, int64_t end) {
  with_types(q, [&](auto codec, auto t, auto symmetric, auto stochastic) {
    using Codec = decltype(codec);
    using T = decltype(t);
    const CodeRange range = q.code_range();
    const auto* const x = static_cast<const typename Codec::Stored*>(q.numbers);
    const int run = static_cast<int>(q.run);
    for_codes(q, non_temporal, begin, end, [&](int64_t at, int count, int8_t* codes, bool non_temporal, uint32_t key) {
      // All blocks of a piece together: none has to wait for another's maximum and divisions.
      Reach<T> reach[kPiece / kSmallestBlock];
      const int blocks = (count + run - 1) / run;
      const int64_t unit = at / q.run;
      const auto size = [&](int block) { return std::min(run, count - block * run); };
      for (int i = 0; i < blocks; ++i) reach[i] = measure_run<Codec, symmetric(), T>(x + at + i * run, size(i));
      for (int i = 0; i < blocks; ++i) q.scale[unit + i] = scale_of(reach[i], range);
      if (!symmetric())
        for (int i = 0; i < blocks; ++i)
          q.zero_point[unit + i] = static_cast<int8_t>(zero_point_of(reach[i], q.scale[unit + i], range));
      if (!q.codes) return;
      for (int i = 0; i < blocks; ++i) {
        prefetch<2>(x + at + kPiece + i * run, size(i) * sizeof *x);
        encode_run<Codec, stochastic(), T>(x + at + i * run, size(i),
                                           Encoder<T>(q.scale[unit + i], q.zero_point_at(unit + i), range), key,
                                           static_cast<uint32_t>(at + i * run), codes + i * run, non_temporal);
      }
    });
  });
}

inline void measure(const Quantization& q, const void* all, int64_t begin, int64_t end) {
  with_types(q, [&](auto codec, auto t, auto symmetric, auto) {
    using Codec = decltype(codec);
    using T = decltype(t);
    const Reaches<T> reaches = *static_cast<const Reaches<T>*>(all);
    const auto* const x = static_cast<const typename Codec::Stored*>(q.numbers);
    const int64_t start = begin * kPiece, stop = std::min(end * kPiece, q.numel);
    if (has_rows(q)) {
      for_rows(q, start, stop, [&](int64_t unit, int64_t first, int64_t last) {
        measure_each<Codec, symmetric(), T>(x + first, last - first, reaches.high + unit, reaches.low + unit);
      });
      return;
    }
    for_runs(q, start, stop, [&](int64_t unit, int64_t first, int64_t last) {
      Reach<T> reach{reaches.high[unit], reaches.low[unit]};
      if (last - first < kShortRun) {
        for (int64_t i = first; i < last; ++i) reach.template add<symmetric()>(Codec::template decode<T>(x[i]));
      } else {
        reach.join(measure_run<Codec, symmetric(), T>(x + first, last - first));
      }
      reaches.high[unit] = reach.high;
      reaches.low[unit] = reach.low;
    });
  });
}

inline void encode(const Quantization& q, bool non_temporal, const void* all, int64_t begin, int64_t end) {
  with_types(q, [&](auto codec, auto t, auto, auto stochastic) {
    using Codec = decltype(codec);
    using T = decltype(t);
    const Encoders<T> encoders = *static_cast<const Encoders<T>*>(all);
    const auto* const x = static_cast<const typename Codec::Stored*>(q.numbers);
    T inverse[kTogether], lowest[kTogether], highest[kTogether];
    int zero_point[kTogether];
    for_codes(q, non_temporal, begin, end, [&](int64_t at, int count, int8_t* codes, bool non_temporal, uint32_t key) {
      if (q.run >= kShortRun) {
        for_runs(q, at, at + count, [&](int64_t unit, int64_t first, int64_t last) {
          encode_run<Codec, stochastic(), T>(x + first, static_cast<int>(last - first), encoders[unit], key,
                                             static_cast<uint32_t>(first), codes + (first - at), non_temporal);
        });
      } else if (has_rows(q)) {
        for_rows(q, at, at + count, [&](int64_t unit, int64_t first, int64_t last) {
          const Encoders<T> here{encoders.inverse + unit, encoders.lowest + unit, encoders.highest + unit,
                                 encoders.zero_point + unit};
          encode_each<Codec, stochastic(), T>(x + first, static_cast<int>(last - first), here, key,
                                              static_cast<uint32_t>(first), codes + (first - at));
        });
      } else {
        for (int64_t start = at; start < at + count; start += kTogether) {
          const int here = static_cast<int>(std::min<int64_t>(kTogether, at + count - start));
          for_runs(q, start, start + here, [&](int64_t unit, int64_t first, int64_t last) {
            const Encoder<T> encoder = encoders[unit];
            for (int64_t i = first - start; i < last - start; ++i) {
              inverse[i] = encoder.inverse;
              lowest[i] = encoder.lowest;
              highest[i] = encoder.highest;
              zero_point[i] = encoder.zero_point;
            }
          });
          encode_each<Codec, stochastic(), T>(x + start, here, {inverse, lowest, highest, zero_point}, key,
                                              static_cast<uint32_t>(start), codes + (start - at));
        }
      }
    });
  });
}

inline void decode(const Quantization& q, bool non_temporal, int64_t begin, int64_t end) {
  with_codec(q.dtype, [&](auto codec) {
    using Codec = decltype(codec);
    using Stored = typename Codec::Stored;
    using T = Compute<Codec>;
    constexpr int kStep = sizeof(Stored) == 8 ? kPiece / 2 : kPiece;
    const T largest = largest_of<T>(q.dtype);
    const Fence fence;
    const bool buffers = non_temporal && reinterpret_cast<uintptr_t>(q.numbers) % 64 == 0;
    alignas(64) Stored buffer[kStep];  // some KB at a time are written non-temporally faster than single lines
    alignas(64) int8_t wide[kStep + 1];
    float scale[kTogether];
    int8_t zero_point[kTogether];
    const int64_t stop = std::min(end * kPiece, q.numel);
    for (int64_t at = begin * kPiece; at < stop; at += kStep) {
      const int count = static_cast<int>(std::min<int64_t>(kStep, stop - at));
      const int8_t* codes = static_cast<const int8_t*>(q.codes) + at;
      if (q.bits == 4) {
        unpack_run(static_cast<const uint8_t*>(q.codes) + at / 2, count, wide);
        codes = wide;
      }
      Stored *const place = static_cast<Stored*>(q.numbers) + at, *const to = buffers ? buffer : place;
      if (q.run >= kShortRun) {
        for_runs(q, at, at + count, [&](int64_t unit, int64_t first, int64_t last) {
          // A few elements, while the lines for the next are on their way.
          for (int64_t from = first - at; from < last - at; from += kTogether) {
            const int here = static_cast<int>(std::min<int64_t>(kTogether, last - at - from));
            if (!buffers) prefetch(to + from + kTogether, here * sizeof(Stored));
            decode_run<Codec, T>(codes + from, here, q.zero_point_at(unit), q.scale[unit], largest, to + from);
          }
        });
      } else if (has_rows(q)) {
        for_rows(q, at, at + count, [&](int64_t unit, int64_t first, int64_t last) {
          decode_each<Codec, T>(codes + (first - at), static_cast<int>(last - first),
                                q.zero_point ? q.zero_point + unit : nullptr, q.scale + unit, largest,
                                to + (first - at));
        });
      } else {
        for (int start = 0; start < count; start += kTogether) {
          const int here = std::min(kTogether, count - start);
          const int64_t from = at + start;
          for_runs(q, from, from + here, [&](int64_t unit, int64_t first, int64_t last) {
            for (int64_t i = first - from; i < last - from; ++i)
              scale[i] = q.scale[unit], zero_point[i] = static_cast<int8_t>(q.zero_point_at(unit));
          });
          decode_each<Codec, T>(codes + start, here, zero_point, scale, largest, to + start);
        }
      }
      if (buffers)
        write_non_temporally(reinterpret_cast<char*>(place), reinterpret_cast<const char*>(buffer),
                             count * sizeof(Stored));
    }
  });
}

const Kernels& kernels() {
  static const Kernels table{quantize_blocks, measure, encode, decode};
  return table;
}

}  // namespace genopt::quant::GENOPT_CAPABILITY
