// c = a b + bias: matrices of float32, multiplied by a processor's instructions for float16.
//
// A number is scaled by a power of two that brings the largest one of its row (of a) or matrix (of
// b, and of an a that lies across) just below 2**TOP, rounded to float16, and scaled back in the
// end, so that neither small nor large ones leave float16's range. Products of CHUNK pairs are
// added in float16, those sums in float32. Of random numbers that is less than half as wrong as a
// product in bfloat16, whose own sums are float32: 0.12 % against 0.29 %. At worst, where all
// products are alike and so are their roundings, it is 0.8 %.
//
// Every sum has one order, whatever number of threads: the same bits always. A row of c depends on
// its row of a alone, unless a lies across. What is not finite makes rows that are not.
//
// Compiled when it is first needed, by eqm.kernels.halves, for processors with AVX512-FP16.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

// A tile of c: its sums are 24 of the 32 registers. Columns of three registers share each number of
// a, so that arithmetic, two instructions a cycle, is what bounds it, and not loads.
constexpr long ROWS = 8, COLUMNS = 96;
// Pairs that are added in float16. Twice as many are 3 % faster, and 1.4 times as wrong.
constexpr long CHUNK = 64;
// Rows of a that are held, in float16, in the cache of one core, and of an a that lies across:
// there a row of memory gives only so many numbers in a piece.
constexpr long BLOCK = 32, BLOCK_ACROSS = 64;
// Of a tile's pairs in one go, so that its part of b is still in the nearest cache for the next.
constexpr long SLAB = 2048;
// 2**(2 * TOP) * CHUNK is within float16, whose largest number is 65504.
constexpr int TOP = 4;
constexpr long AHEAD = 8;

long ceiling(long n, long unit) { return (n + unit - 1) / unit * unit; }

// Of one row of a in a slab; at powers of two, rows would share places of a cache.
long row_of(long k) { return ceiling(std::min(k, SLAB), 16) + 16; }

__mmask16 first(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// -- scales ----------------------------------------------------------------------------------

// The power of two by which numbers of at most this size are brought below 2**TOP.
int exponent(float most) {
  if (!(most > 0) || !std::isfinite(most)) return 0;
  int power;
  std::frexp(most, &power);
  return std::min(TOP - power, 120);
}

float most_of(const float* row, long n) {
  __m512 most = _mm512_setzero_ps();
  for (long i = 0; i < n; i += 16)
    most = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(first(n - i), row + i)), most);
  return _mm512_reduce_max_ps(most);
}

// Of n numbers in each of some rows: found by all threads of a team together.
float most_of(const float* rows, long count, long n, long stride, std::vector<float>& found) {
  const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
  float most = 0;
  for (long r = count * thread / threads; r < count * (thread + 1) / threads; r++)
    most = std::max(most, most_of(rows + r * stride, n));
  found[thread] = most;
#pragma omp barrier
  return *std::max_element(found.begin(), found.begin() + threads);
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

// Rows of a that lies across: (depth, rows) becomes panels of (depth, ROWS).
void left_across(const float* a, long stride, long rows, long depth, float scale, uint32_t* out) {
  const __m512 by = _mm512_set1_ps(scale);
  for (long i = 0; i < depth; i++, a += stride) {
    // Rows of memory are far apart: nothing guesses the next ones.
    if (i + AHEAD < depth)
      for (long r = 0; r < rows; r += 16) _mm_prefetch(a + AHEAD * stride + r, _MM_HINT_T0);
    for (long r = 0; r < rows; r += 16) {
      const __m512i x = twice(_mm512_mul_ps(_mm512_maskz_loadu_ps(first(rows - r), a + r), by));
      uint32_t* at = out + r * depth + i * ROWS;
      _mm256_store_si256((__m256i*)at, _mm512_castsi512_si256(x));
      _mm256_store_si256((__m256i*)(at + depth * ROWS), _mm512_extracti64x4_epi64(x, 1));
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

// All of b becomes panels of (k, COLUMNS), with zeros beyond n: by all threads of a team, each of
// which reads its share in one piece.
void right(const float* b, long stride, long n, long k, float scale, _Float16* out) {
  const __m512 by = _mm512_set1_ps(scale);
#pragma omp for schedule(static)
  for (long i = 0; i < k; i++)
    for (long from = 0; from < n; from += COLUMNS)
      for (long j = 0; j < COLUMNS; j += 16) {
        const __m512 x = _mm512_maskz_loadu_ps(first(n - from - j), b + i * stride + from + j);
        _Float16* at = out + from * k + i * COLUMNS + j;
        _mm256_store_si256((__m256i*)at, halves(_mm512_mul_ps(x, by)));
      }
}

void right_across(const float* b, long stride, long n, long k, float scale, _Float16* out) {
  const __m512 by = _mm512_set1_ps(scale);
#pragma omp for schedule(static)
  for (long j = 0; j < ceiling(n, COLUMNS); j += 16)
    for (long i = 0; i < k; i += 16) {
      __m512 x[16];
      for (long r = 0; r < 16; r++) {
        const __mmask16 there = j + r < n ? first(k - i) : 0;
        x[r] = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, b + (j + r) * stride + i), by);
      }
      transpose(x);
      _Float16* at = out + j / COLUMNS * COLUMNS * k + i * COLUMNS + j % COLUMNS;
      for (long r = 0; r < std::min(16L, k - i); r++)
        _mm256_store_si256((__m256i*)(at + r * COLUMNS), halves(x[r]));
    }
}

// -- products --------------------------------------------------------------------------------

// Add a tile's products to its sums. a: in panels of (depth, ROWS), or rows of a stride.
template <bool PANEL>
void tile(const uint32_t* a, long stride, const _Float16* b, long depth, float* sums) {
  alignas(64) _Float16 chunk[ROWS * COLUMNS];
  for (long from = 0; from < depth; from += CHUNK) {
    __m512h sum[ROWS][3];
#pragma GCC unroll 8
    for (long r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = sum[r][2] = _mm512_setzero_ph();
    for (long k = std::min(CHUNK, depth - from); k; k--) {
      const __m512h b0 = _mm512_load_ph(b), b1 = _mm512_load_ph(b + 32), b2 = _mm512_load_ph(b + 64);
#pragma GCC unroll 8
      for (long r = 0; r < ROWS; r++) {
        const __m512h x = _mm512_castsi512_ph(_mm512_set1_epi32(a[PANEL ? r : r * stride]));
        sum[r][0] = _mm512_fmadd_ph(x, b0, sum[r][0]);
        sum[r][1] = _mm512_fmadd_ph(x, b1, sum[r][1]);
        sum[r][2] = _mm512_fmadd_ph(x, b2, sum[r][2]);
      }
      a += PANEL ? ROWS : 1;
      b += COLUMNS;
    }
#pragma GCC unroll 8
    for (long r = 0; r < ROWS; r++)
#pragma GCC unroll 3
      for (long j = 0; j < 3; j++) _mm512_store_ph(chunk + r * COLUMNS + j * 32, sum[r][j]);
    // Converting what is in memory takes half of the instructions of what is in a register.
    asm volatile("" ::: "memory");
#pragma GCC unroll 4
    for (long i = 0; i < ROWS * COLUMNS; i += 16) {
      const __m512 x = _mm512_cvtph_ps(_mm256_load_si256((const __m256i*)(chunk + i)));
      _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), x));
    }
  }
}

// Numbers of c. Past the caches, which c would fill before anybody reads it, where they are a whole
// line of memory and the last of their sums.
void put(float* at, __mmask16 there, __m512 x, bool last) {
  if (last && there == 0xffff && reinterpret_cast<uintptr_t>(at) % 64 == 0)
    _mm512_stream_ps(at, x);
  else
    _mm512_mask_storeu_ps(at, there, x);
}

}  // namespace

// c (m, n) = a (m, k) b (k, n) + bias (n), in rows without gaps; bias may be null. Strides are in
// numbers; of a matrix, one of them is 1. most_a, most_b: the largest absolute value in each, where
// that is known, and else less than 0; most_a is written. room_a, room_b: memory to work in, of
// so many bytes as room() says, at multiples of 64.
extern "C" void product(const float* a, long a_row, long a_column, const float* b, long b_row,
                        long b_column, const float* bias, float* c, long m, long n, long k,
                        float* most_a, const float* most_b, void* room_a, void* room_b,
                        long threads) {
  const bool a_lies = a_column != 1, b_lies = b_column != 1;
  const long panels = ceiling(n, COLUMNS) / COLUMNS, block = a_lies ? BLOCK_ACROSS : BLOCK;
  const long blocks = ceiling(m, block) / block, stride = row_of(k);
  _Float16* const packed = static_cast<_Float16*>(room_b);
  std::vector<float> found_a(threads), found_b(threads);
  const float given = *most_a;
  float most = given;
#pragma omp parallel num_threads(threads) reduction(max : most)
  {
    float all_a = given, all_b = *most_b;
    if (all_a < 0 && a_lies) all_a = most_of(a, k, m, a_column, found_a);
    if (all_b < 0)
      all_b = b_lies ? most_of(b, n, k, b_column, found_b) : most_of(b, k, n, b_row, found_b);
    const int b_power = exponent(all_b);
    const float b_scale = std::ldexp(1.0f, b_power);
    if (b_lies)
      right_across(b, b_column, n, k, b_scale, packed);
    else
      right(b, b_row, n, k, b_scale, packed);

    most = all_a;
    uint32_t* const left = static_cast<uint32_t*>(room_a) + omp_get_thread_num() * block * stride;
    alignas(64) float sums[ROWS * COLUMNS];
    float by[BLOCK_ACROSS], back[BLOCK_ACROSS];
    // Where there are few blocks, threads share one, and each converts it.
    const long shares = std::clamp(4 * threads / blocks, 1L, panels);
#pragma omp for schedule(dynamic)
    for (long item = 0; item < blocks * shares; item++) {
      const long top = item / shares * block, share = item % shares, rows = std::min(block, m - top);
      for (long r = 0; r < rows; r++) {
        const float most_row = a_lies ? all_a : most_of(a + (top + r) * a_row, k);
        const int power = exponent(most_row);
        by[r] = std::ldexp(1.0f, power);
        back[r] = std::ldexp(1.0f, -power - b_power);
        most = std::max(most, most_row);
      }
      for (long k0 = 0; k0 < k; k0 += SLAB) {
        const long depth = std::min(SLAB, k - k0);
        if (a_lies) {
          left_across(a + k0 * a_column + top, a_column, rows, depth, by[0], left);
        } else {
          for (long r = 0; r < rows; r++)
            left_row(a + (top + r) * a_row + k0, depth, by[r], left + r * stride);
          std::memset(left + rows * stride, 0, (ceiling(rows, ROWS) - rows) * stride * sizeof *left);
        }
        for (long panel = panels * share / shares; panel < panels * (share + 1) / shares; panel++)
          for (long r = 0; r < rows; r += ROWS) {
            const long from = panel * COLUMNS;
            const _Float16* b_at = packed + from * k + k0 * COLUMNS;
            std::memset(sums, 0, sizeof sums);
            if (a_lies)
              tile<true>(left + r * depth, 0, b_at, depth, sums);
            else
              tile<false>(left + r * stride, stride, b_at, depth, sums);
            for (long i = 0; i < std::min(ROWS, rows - r); i++) {
              const __m512 scale = _mm512_set1_ps(back[r + i]);
              for (long j = 0; j < std::min(COLUMNS, n - from); j += 16) {
                const __mmask16 there = first(n - from - j);
                float* const at = c + (top + r + i) * n + from + j;
                const float* const before = k0 ? at : bias ? bias + from + j : nullptr;
                __m512 x = _mm512_mul_ps(_mm512_load_ps(sums + i * COLUMNS + j), scale);
                if (before) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(there, before));
                put(at, there, x, k0 + depth == k);
              }
            }
          }
      }
    }
  }
  *most_a = most;
}

// Bytes that product() works in: for a, and for b.
extern "C" void room(long n, long k, bool a_lies, long threads, long* bytes) {
  bytes[0] = threads * (a_lies ? BLOCK_ACROSS : BLOCK) * row_of(k) * sizeof(uint32_t);
  bytes[1] = ceiling(n, COLUMNS) * k * sizeof(_Float16);
}
