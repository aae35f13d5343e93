// Numbers of float32, multiplied by a processor's instructions for float16.
//
// A number is scaled by a power of two that brings the largest one of its row or matrix just below
// 2**TOP, rounded to float16, and scaled back in the end, so that neither small nor large ones leave
// float16's range. Products of CHUNK pairs are added in float16, those sums in float32. Of random
// numbers that is less than half as wrong as a product in bfloat16, whose own sums are float32:
// 0.12 % against 0.29 %. At worst, where all products are alike and so are their roundings, it is
// 0.9 %.
//
// Every sum has one order, whatever number of threads: the same bits always. What is not finite
// makes what is not; of an infinite number's matrix, others may be lost.
//
// Compiled when it is first needed, by eqm.kernels.halves, for processors with AVX512-FP16.

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

// A tile of a product: 8 rows and 32 columns for each register of them. Three are 24 of the 32
// registers, and share each number of a, so that arithmetic, two instructions a cycle, is what
// bounds it, and not loads.
constexpr long ROWS = 8;
constexpr long columns_of(int wide) { return 32 * wide; }
// Pairs that are added in float16. Twice as many are 3 % faster, and 1.4 times as wrong.
constexpr long CHUNK = 64;
// 2**(2 * TOP) * CHUNK is within float16, whose largest number is 65504.
constexpr int TOP = 4;
// Lines of memory that are asked for before they are needed.
constexpr long AHEAD = 8;

long ceiling(long n, long unit) { return (n + unit - 1) / unit * unit; }

__mmask16 first(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// Some of so many things: as those of a thread of the team.
struct Share {
  long from, to;
  static Share mine(long count) {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {count * thread / threads, count * (thread + 1) / threads};
  }
};

// -- scales ----------------------------------------------------------------------------------

// 2**n, of an n that exponent() gives.
float two_to(int n) {
  const uint32_t bits = (n + 127) << 23;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

// The power of two by which numbers of at most this size are brought below 2**TOP.
int exponent(float most) {
  uint32_t bits;
  std::memcpy(&bits, &most, sizeof bits);
  const int power = (bits >> 23 & 255) - 126;  // most < 2**power
  return !(most > 0) || power == 129 ? 0 : std::min(TOP - power, 120);
}

float most_of(const float* row, long n) {
  __m512 most = _mm512_setzero_ps();
  for (long i = 0; i < n; i += 16)
    most = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(first(n - i), row + i)), most);
  return _mm512_reduce_max_ps(most);
}

// -- from float32 to float16 -----------------------------------------------------------------

__m256i halves(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

// Numbers of a are kept twice in 32 bits: what brings one into all lanes of a register is free for
// 32 bits, and costs an instruction of arithmetic for 16.
__m512i twice(__m512 x) {
  const __m512i wide = _mm512_cvtepu16_epi32(halves(x));
  return _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
}

void left_row(const float* row, long n, float scale, uint32_t* out) {
  const __m512 by = _mm512_set1_ps(scale);
  for (long i = 0; i < n; i += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(first(n - i), row + i);
    _mm512_storeu_si512(out + i, twice(_mm512_mul_ps(x, by)));
  }
}

// Numbers r to r + 16 of pair i, into panels of (depth, ROWS).
void left_pair(__m512 x, long r, long i, long depth, uint32_t* out) {
  const __m512i both = twice(x);
  uint32_t* at = out + r * depth + i * ROWS;
  _mm256_store_si256((__m256i*)at, _mm512_castsi512_si256(both));
  _mm256_store_si256((__m256i*)(at + depth * ROWS), _mm512_extracti64x4_epi64(both, 1));
}

// Rows of a that lies across: (depth, rows) becomes panels of (depth, ROWS).
void left_across(const float* a, long stride, long rows, long depth, float scale, uint32_t* out) {
  const __m512 by = _mm512_set1_ps(scale);
  for (long i = 0; i < depth; i++, a += stride) {
    // Rows of memory are far apart: nothing guesses the next ones.
    if (i + AHEAD < depth)
      for (long r = 0; r < rows; r += 16) _mm_prefetch(a + AHEAD * stride + r, _MM_HINT_T0);
    for (long r = 0; r < rows; r += 16) {
      const __m512 x = _mm512_maskz_loadu_ps(first(rows - r), a + r);
      left_pair(_mm512_mul_ps(x, by), r, i, depth, out);
    }
  }
}

// Turn 16 x 16 numbers over, in registers.
void transpose(__m512* r) {
  const auto wide = [](__m512 x) { return _mm512_castps_pd(x); };
  const auto narrow = [](__m512d x) { return _mm512_castpd_ps(x); };
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = narrow(_mm512_unpacklo_pd(wide(t[i]), wide(t[i + 2])));
    r[i + 1] = narrow(_mm512_unpackhi_pd(wide(t[i]), wide(t[i + 2])));
    r[i + 2] = narrow(_mm512_unpacklo_pd(wide(t[i + 1]), wide(t[i + 3])));
    r[i + 3] = narrow(_mm512_unpackhi_pd(wide(t[i + 1]), wide(t[i + 3])));
  }
  for (int half = 0; half < 16; half += 8)
    for (int i = half; i < half + 4; i++) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

// A share of the rows of b (k, n), in panels of (k, columns), with zeros beyond n.
template <int WIDE>
void right(const float* b, long stride, long n, long k, Share share, float scale, _Float16* out) {
  constexpr long columns = columns_of(WIDE);
  const __m512 by = _mm512_set1_ps(scale);
  for (long i = share.from; i < share.to; i++)
    for (long from = 0; from < n; from += columns)
      for (long j = 0; j < columns; j += 16) {
        const __m512 x = _mm512_maskz_loadu_ps(first(n - from - j), b + i * stride + from + j);
        _Float16* at = out + from * k + i * columns + j;
        _mm256_store_si256((__m256i*)at, halves(_mm512_mul_ps(x, by)));
      }
}

// The same of b that lies across, (n, k): a share of its groups of 16 columns.
template <int WIDE>
void right_across(const float* b, long stride, long n, long k, Share share, float scale,
                  _Float16* out) {
  constexpr long columns = columns_of(WIDE);
  const __m512 by = _mm512_set1_ps(scale);
  for (long j = 16 * share.from; j < 16 * share.to; j += 16)
    for (long i = 0; i < k; i += 16) {
      __m512 x[16];
      for (long r = 0; r < 16; r++) {
        const __mmask16 there = j + r < n ? first(k - i) : 0;
        x[r] = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, b + (j + r) * stride + i), by);
      }
      transpose(x);
      _Float16* at = out + j / columns * columns * k + i * columns + j % columns;
      for (long r = 0; r < std::min(16L, k - i); r++)
        _mm256_store_si256((__m256i*)(at + r * columns), halves(x[r]));
    }
}

// -- products --------------------------------------------------------------------------------

// Sums of a tile, times 2**power, which alone may be beyond float32 where what it makes is not.
__m512 scaled(const float* sums, int power) {
  return _mm512_scalef_ps(_mm512_load_ps(sums), _mm512_set1_ps(power));
}

// Add a tile's products to its sums. a: in panels of (depth, ROWS), or rows of a stride.
template <bool PANEL, int WIDE>
void tile(const uint32_t* a, long stride, const _Float16* b, long depth, float* sums) {
  constexpr long columns = columns_of(WIDE);
  alignas(64) _Float16 chunk[ROWS * columns];
  for (long from = 0; from < depth; from += CHUNK) {
    __m512h sum[ROWS][WIDE];
#pragma GCC unroll 8
    for (long r = 0; r < ROWS; r++)
#pragma GCC unroll 3
      for (long j = 0; j < WIDE; j++) sum[r][j] = _mm512_setzero_ph();
    for (long k = std::min(CHUNK, depth - from); k; k--) {
      __m512h right[WIDE];
#pragma GCC unroll 3
      for (long j = 0; j < WIDE; j++) right[j] = _mm512_load_ph(b + 32 * j);
#pragma GCC unroll 8
      for (long r = 0; r < ROWS; r++) {
        const __m512h x = _mm512_castsi512_ph(_mm512_set1_epi32(a[PANEL ? r : r * stride]));
#pragma GCC unroll 3
        for (long j = 0; j < WIDE; j++) sum[r][j] = _mm512_fmadd_ph(x, right[j], sum[r][j]);
      }
      a += PANEL ? ROWS : 1;
      b += columns;
    }
#pragma GCC unroll 8
    for (long r = 0; r < ROWS; r++)
#pragma GCC unroll 3
      for (long j = 0; j < WIDE; j++) _mm512_store_ph(chunk + r * columns + j * 32, sum[r][j]);
    // Converting what is in memory takes half of the instructions of what is in a register.
    asm volatile("" ::: "memory");
#pragma GCC unroll 4
    for (long i = 0; i < ROWS * columns; i += 16) {
      const __m512 x = _mm512_cvtph_ps(_mm256_load_si256((const __m256i*)(chunk + i)));
      _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), x));
    }
  }
}

}  // namespace
