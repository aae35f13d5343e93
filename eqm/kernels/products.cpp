// c = a b + bias: a linear layer's three products. A row of c depends on its row of a alone, unless
// a lies across.

#include "halves.h"

namespace {

constexpr int WIDE = 3;
constexpr long COLUMNS = columns_of(WIDE);
// Rows of a that are held, in float16, in the cache of one core, and of an a that lies across:
// there a row of memory gives only so many numbers in a piece.
constexpr long BLOCK = 32, BLOCK_ACROSS = 64;
// Pairs for which they are held.
constexpr long SLAB = 2048;

// Of one row of a in a slab; at powers of two, rows would share places of a cache.
long row_of(long k) { return ceiling(std::min(k, SLAB), 16) + 16; }

// Of n numbers in each of some rows: found by all threads of a team together.
float most_of(const float* rows, long count, long n, long stride, std::vector<float>& found) {
  const Share share = Share::mine(count);
  float most = 0;
  for (long r = share.from; r < share.to; r++) most = std::max(most, most_of(rows + r * stride, n));
  found[omp_get_thread_num()] = most;
#pragma omp barrier
  return *std::max_element(found.begin(), found.begin() + omp_get_num_threads());
}

// Put a row of a tile's sums, scaled back, to c: added to what is `before`, unless that is null. If
// they are `last`, past the caches, which c would fill before anybody reads it.
void put(const float* sums, int power, const float* before, long columns, bool last, float* c) {
  for (long j = 0; j < std::min(COLUMNS, columns); j += 16) {
    const __mmask16 there = first(columns - j);
    __m512 x = scaled(sums + j, power);
    if (before) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(there, before + j));
    // Whole lines of memory alone.
    if (last && there == 0xffff && reinterpret_cast<uintptr_t>(c + j) % 64 == 0)
      _mm512_stream_ps(c + j, x);
    else
      _mm512_mask_storeu_ps(c + j, there, x);
  }
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
    const float b_scale = two_to(b_power);
    if (b_lies)
      right_across<WIDE>(b, b_column, n, k, Share::mine(panels * COLUMNS / 16), b_scale, packed);
    else
      right<WIDE>(b, b_row, n, k, Share::mine(k), b_scale, packed);
#pragma omp barrier

    most = all_a;
    uint32_t* const left = static_cast<uint32_t*>(room_a) + omp_get_thread_num() * block * stride;
    alignas(64) float sums[ROWS * COLUMNS];
    float by[BLOCK_ACROSS];
    int back[BLOCK_ACROSS];
    // Where there are few blocks, threads share one, and each converts it.
    const long shares = std::clamp(4 * threads / blocks, 1L, panels);
#pragma omp for schedule(dynamic)
    for (long item = 0; item < blocks * shares; item++) {
      const long top = item / shares * block, share = item % shares, rows = std::min(block, m - top);
      for (long r = 0; r < rows; r++) {
        const float most_row = a_lies ? all_a : most_of(a + (top + r) * a_row, k);
        const int power = exponent(most_row);
        by[r] = two_to(power);
        back[r] = -power - b_power;
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
              tile<true, WIDE>(left + r * depth, 0, b_at, depth, sums);
            else
              tile<false, WIDE>(left + r * stride, stride, b_at, depth, sums);
            for (long i = 0; i < std::min(ROWS, rows - r); i++) {
              float* const at = c + (top + r + i) * n + from;
              const float* const before = k0 ? at : bias ? bias + from : nullptr;
              put(sums + i * COLUMNS, back[r + i], before, n - from, k0 + depth == k, at);
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
