// Attention of a few hundred tokens, forward and back: one head of one image a thread.
//
// qkv holds (images, tokens, 3, heads, width), out and its gradient (images, tokens, heads, width),
// as layers give and take them. Of a head, queries q, keys k and values v (tokens, width):
//
//     S = q k^T / sqrt(width)    P = exp(S - log sum exp S)    out = P v
//
// where of the keys their mean is taken, which changes no P: what all of them share would be most of
// every score, and most of its error. And back, of a gradient do, with P computed again from the
// logarithms, which are kept:
//
//     dv = P^T do    dP = do v^T    dS = P (dP - sum of do out) / sqrt(width)    dq = dS k
//     dk = dS^T q

#include "halves.h"

namespace {

constexpr int WIDE = 2;
constexpr long COLUMNS = columns_of(WIDE);

// exp of numbers of at most about 0: 2^n times a polynomial of the rest.
__m512 exponential(__m512 x) {
  // Below, it is 0. In this order what is not a number stays.
  x = _mm512_max_ps(_mm512_set1_ps(-104), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, n);
}

// Memory of one thread, handed out piece by piece; from nowhere, it counts what would be.
class Arena {
 public:
  explicit Arena(char* at) : begin(at), at(at) {}
  template <class T>
  T* take(long count) {
    T* piece = reinterpret_cast<T*>(at);
    at += ceiling(count * sizeof(T), 64);
    return piece;
  }
  long taken() const { return at - begin; }

 private:
  char* const begin;
  char* at;
};

// Tokens of one head: rows of `width` numbers, a stride apart.
struct Rows {
  const float* at;
  long stride;
  const float* row(long i) const { return at + i * stride; }
};

struct Head {
  long tokens, width;
  long padded() const { return ceiling(tokens, COLUMNS); }
  // Of one row in float16, twice.
  long row_of(long n) const { return ceiling(n, 16) + 16; }
  // Of scores.
  float scale() const { return 1 / std::sqrt(float(width)); }

  int power(const Rows& x) const {
    float most = 0;
    for (long i = 0; i < tokens; i++) most = std::max(most, most_of(x.row(i), width));
    return exponent(most);
  }
  // Tokens less their mean, (tokens, width), and after them the mean.
  Rows centred(const Rows& x, float* out) const {
    const __m512 part = _mm512_set1_ps(1.0f / tokens);
    float* const mean = out + tokens * width;
    std::fill_n(mean, width, 0.0f);
    for (long i = 0; i < tokens; i++)
      for (long j = 0; j < width; j += 16) {
        const __mmask16 there = first(width - j);
        const __m512 sum = _mm512_maskz_loadu_ps(there, mean + j);
        const __m512 row = _mm512_maskz_loadu_ps(there, x.row(i) + j);
        _mm512_mask_storeu_ps(mean + j, there, _mm512_fmadd_ps(row, part, sum));
      }
    for (long i = 0; i < tokens; i++)
      for (long j = 0; j < width; j += 16) {
        const __mmask16 there = first(width - j);
        const __m512 row = _mm512_maskz_loadu_ps(there, x.row(i) + j);
        const __m512 less = _mm512_sub_ps(row, _mm512_maskz_loadu_ps(there, mean + j));
        _mm512_mask_storeu_ps(out + i * width + j, there, less);
      }
    return {out, width};
  }
  // x as b (tokens, width), or x^T as b (width, tokens), of a product, by a scale of such a power.
  void plain(const Rows& x, int power, _Float16* out) const {
    right<WIDE>(x.at, x.stride, width, tokens, {0, tokens}, two_to(power), out);
  }
  void across(const Rows& x, int power, _Float16* out) const {
    right_across<WIDE>(x.at, x.stride, tokens, width, {0, padded() / 16}, two_to(power), out);
  }
  // ROWS rows of x (tokens, width) as a of a product, and the powers of their scales.
  void left(const Rows& x, long from, uint32_t* out, int* powers) const {
    for (long r = 0; r < ROWS; r++) {
      if (from + r < tokens) {
        powers[r] = exponent(most_of(x.row(from + r), width));
        left_row(x.row(from + r), width, two_to(powers[r]), out + r * row_of(width));
      } else {
        std::memset(out + r * row_of(width), 0, row_of(width) * sizeof *out);
        powers[r] = 0;
      }
    }
  }
  // ROWS rows of x y^T by `scale`, (ROWS, padded), for x and y of scales of such powers.
  void scores(const uint32_t* x, const int* powers, const _Float16* y, int power, float scale,
              float* out) const {
    alignas(64) float sums[ROWS * COLUMNS];
    const __m512 by = _mm512_set1_ps(scale);
    for (long from = 0; from < padded(); from += COLUMNS) {
      std::memset(sums, 0, sizeof sums);
      tile<false, WIDE>(x, row_of(width), y + from * width, width, sums);
      for (long r = 0; r < ROWS; r++)
        for (long j = 0; j < COLUMNS; j += 16) {
          const __m512 sum = scaled(sums + r * COLUMNS + j, -powers[r] - power);
          _mm512_store_ps(out + r * padded() + from + j, _mm512_mul_ps(sum, by));
        }
    }
  }
  // ROWS rows of x y, for rows or panels x of `tokens` pairs, divided by 2**power and, where given,
  // times `by`, and put in their place.
  template <bool PANEL>
  void mixed(const uint32_t* x, const _Float16* y, int power, const float* by, long from,
             float* out, long stride) const {
    alignas(64) float sums[ROWS * COLUMNS];
    for (long column = 0; column < width; column += COLUMNS) {
      std::memset(sums, 0, sizeof sums);
      tile<PANEL, WIDE>(x, row_of(tokens), y + column * tokens, tokens, sums);
      for (long r = 0; r < std::min(ROWS, tokens - from); r++)
        for (long j = 0; j < std::min(COLUMNS, width - column); j += 16) {
          __m512 sum = scaled(sums + r * COLUMNS + j, -power);
          if (by) sum = _mm512_mul_ps(sum, _mm512_set1_ps(by[r]));
          _mm512_mask_storeu_ps(out + (from + r) * stride + column + j, first(width - column - j),
                                sum);
        }
    }
  }
};

struct Forward {
  const Head head;
  _Float16 *keys, *values;
  uint32_t *left, *weights;
  float *scores, *less;

  Forward(const Head& head, Arena& arena) : head(head) {
    keys = arena.take<_Float16>(head.padded() * head.width);
    values = arena.take<_Float16>(ceiling(head.width, COLUMNS) * head.tokens);
    left = arena.take<uint32_t>(ROWS * head.row_of(head.width));
    weights = arena.take<uint32_t>(ROWS * head.row_of(head.tokens));
    scores = arena.take<float>(ROWS * head.padded());
    less = arena.take<float>((head.tokens + 1) * head.width);
  }

  void operator()(const Rows& q, const Rows& all, const Rows& v, float* out, long stride,
                  float* logs) const {
    const long tokens = head.tokens;
    const Rows k = head.centred(all, less);
    const int k_power = head.power(k), v_power = head.power(v);
    head.across(k, k_power, keys);
    head.plain(v, v_power, values);
    int powers[ROWS];
    float by[ROWS];
    for (long from = 0; from < tokens; from += ROWS) {
      head.left(q, from, left, powers);
      head.scores(left, powers, keys, k_power, head.scale(), scores);
      for (long r = 0; r < ROWS; r++) {
        const float* row = scores + r * head.padded();
        __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (long j = 0; j < tokens; j += 16)
          most = _mm512_mask_max_ps(most, first(tokens - j), most, _mm512_load_ps(row + j));
        const float top = _mm512_reduce_max_ps(most);
        for (long j = 0; j < tokens; j += 16) {
          const __m512 x = _mm512_sub_ps(_mm512_load_ps(row + j), _mm512_set1_ps(top));
          const __m512 p = _mm512_maskz_mov_ps(first(tokens - j), exponential(x));
          total = _mm512_add_ps(total, p);
          const __m512 scaled = _mm512_mul_ps(p, _mm512_set1_ps(1 << TOP));
          _mm512_storeu_si512(weights + r * head.row_of(tokens) + j, twice(scaled));
        }
        const float sum = _mm512_reduce_add_ps(total);
        by[r] = 1 / sum;
        if (from + r < tokens) logs[from + r] = top + std::log(sum);
      }
      head.mixed<false>(weights, values, TOP + v_power, by, from, out, stride);
    }
  }
};

struct Backward {
  const Head head;
  _Float16 *keys_across, *values_across, *keys, *queries, *grads;
  uint32_t *left, *slopes_left, *weights, *slopes_across;
  float *scores, *products, *slopes, *less;

  Backward(const Head& head, Arena& arena) : head(head) {
    const long plain = ceiling(head.width, COLUMNS) * head.tokens;
    keys_across = arena.take<_Float16>(head.padded() * head.width);
    values_across = arena.take<_Float16>(head.padded() * head.width);
    keys = arena.take<_Float16>(plain);
    queries = arena.take<_Float16>(plain);
    grads = arena.take<_Float16>(plain);
    left = arena.take<uint32_t>(ROWS * head.row_of(head.width));
    slopes_left = arena.take<uint32_t>(ROWS * head.row_of(head.tokens));
    weights = arena.take<uint32_t>(ceiling(head.tokens, 16) * head.tokens);
    slopes_across = arena.take<uint32_t>(ceiling(head.tokens, 16) * head.tokens);
    scores = arena.take<float>(ROWS * head.padded());
    products = arena.take<float>(ROWS * head.padded());
    slopes = arena.take<float>(ceiling(head.tokens, 16) * head.tokens);
    less = arena.take<float>((head.tokens + 1) * head.width);
  }

  // P of one row, into its panels, and dS; the largest absolute value in dS.
  float row(long i, const float* score, const float* product, float log, float dot) const {
    __m512 most = _mm512_setzero_ps();
    for (long j = 0; j < head.tokens; j += 16) {
      const __mmask16 there = first(head.tokens - j);
      const __m512 x = _mm512_sub_ps(_mm512_load_ps(score + j), _mm512_set1_ps(log));
      const __m512 p = _mm512_maskz_mov_ps(there, exponential(x));
      left_pair(_mm512_mul_ps(p, _mm512_set1_ps(1 << TOP)), j, i, head.tokens, weights);
      const __m512 slope = _mm512_sub_ps(_mm512_load_ps(product + j), _mm512_set1_ps(dot));
      const __m512 ds = _mm512_mul_ps(_mm512_mul_ps(p, slope), _mm512_set1_ps(head.scale()));
      _mm512_store_ps(slopes + i * ceiling(head.tokens, 16) + j, ds);
      most = _mm512_max_ps(_mm512_abs_ps(ds), most);
    }
    return _mm512_reduce_max_ps(most);
  }

  void operator()(const Rows& q, const Rows& all, const Rows& v, const Rows& out, const Rows& grad,
                  const float* logs, float* dq, float* dk, float* dv, long stride) const {
    const long tokens = head.tokens, padded = head.padded();
    // Rows of dS add up to 0: its product with the mean is 0 as well.
    const Rows k = head.centred(all, less);
    const int k_power = head.power(k), q_power = head.power(q), v_power = head.power(v);
    const int g_power = head.power(grad);
    head.across(v, v_power, values_across);
    head.across(k, k_power, keys_across);
    head.plain(k, k_power, keys);
    head.plain(q, q_power, queries);
    head.plain(grad, g_power, grads);
    int powers[ROWS];
    float most = 0;
    for (long from = 0; from < tokens; from += ROWS) {
      head.left(q, from, left, powers);
      head.scores(left, powers, keys_across, k_power, head.scale(), scores);
      head.left(grad, from, left, powers);
      head.scores(left, powers, values_across, v_power, 1, products);
      for (long i = from; i < std::min(from + ROWS, tokens); i++) {
        __m512 dot = _mm512_setzero_ps();
        for (long j = 0; j < head.width; j += 16) {
          const __mmask16 there = first(head.width - j);
          dot = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, out.row(i) + j),
                                _mm512_maskz_loadu_ps(there, grad.row(i) + j), dot);
        }
        const long r = (i - from) * padded;
        most = std::max(most, row(i, scores + r, products + r, logs[i], _mm512_reduce_add_ps(dot)));
      }
    }
    const int power = exponent(most);
    const __m512 by = _mm512_set1_ps(two_to(power));
    for (long from = 0; from < tokens; from += ROWS) {
      for (long i = from; i < std::min(from + ROWS, tokens); i++)
        for (long j = 0; j < tokens; j += 16) {
          const __m512 ds =
              _mm512_mul_ps(_mm512_load_ps(slopes + i * ceiling(tokens, 16) + j), by);
          left_pair(ds, j, i, tokens, slopes_across);
          _mm512_storeu_si512(slopes_left + (i - from) * head.row_of(tokens) + j, twice(ds));
        }
      head.mixed<false>(slopes_left, keys, power + k_power, nullptr, from, dq, stride);
    }
    for (long from = 0; from < tokens; from += ROWS) {
      head.mixed<true>(slopes_across + from * tokens, queries, power + q_power, nullptr, from, dk,
                       stride);
      head.mixed<true>(weights + from * tokens, grads, TOP + g_power, nullptr, from, dv, stride);
    }
  }
};

template <class Way>
long room_of(const Head& head) {
  Arena arena(nullptr);
  Way(head, arena);
  return arena.taken();
}

// Have each head's numbers taken by one thread: act(way, item, where they begin in qkv, and in out).
template <class Way, class Act>
void each_head(const Head& head, long images, long heads, void* room, long threads, Act act) {
  const long whole = heads * head.width, each = room_of<Way>(head);
#pragma omp parallel num_threads(threads)
  {
    Arena arena(static_cast<char*>(room) + omp_get_thread_num() * each);
    const Way way(head, arena);
#pragma omp for schedule(dynamic)
    for (long item = 0; item < images * heads; item++) {
      const long token = item / heads * head.tokens, column = item % heads * head.width;
      act(way, item, 3 * token * whole + column, token * whole + column);
    }
  }
}

// Queries, keys and values of a head that begins at a place of qkv.
struct Qkv {
  const Rows q, k, v;
  Qkv(const float* at, long whole)
      : q{at, 3 * whole}, k{at + whole, 3 * whole}, v{at + 2 * whole, 3 * whole} {}
};

}  // namespace

// Bytes of each thread that attend() works in, and attend_back().
extern "C" void attending_room(long tokens, long width, long* bytes) {
  const Head head{tokens, width};
  bytes[0] = room_of<Forward>(head);
  bytes[1] = room_of<Backward>(head);
}

// logs: (images, heads, tokens). room: as attending_room() says for all threads, at a multiple of 64.
extern "C" void attend(const float* qkv, float* out, float* logs, long images, long tokens,
                       long heads, long width, void* room, long threads) {
  const long whole = heads * width;
  each_head<Forward>({tokens, width}, images, heads, room, threads,
                     [=](const Forward& forward, long item, long from, long to) {
                       const Qkv head(qkv + from, whole);
                       forward(head.q, head.k, head.v, out + to, whole, logs + item * tokens);
                     });
}

extern "C" void attend_back(const float* qkv, const float* out, const float* logs,
                            const float* grad, float* dqkv, long images, long tokens, long heads,
                            long width, void* room, long threads) {
  const long whole = heads * width;
  each_head<Backward>({tokens, width}, images, heads, room, threads,
                      [=](const Backward& backward, long item, long to, long from) {
                        const Qkv head(qkv + to, whole);
                        backward(head.q, head.k, head.v, {out + from, whole}, {grad + from, whole},
                                 logs + item * tokens, dqkv + to, dqkv + to + whole,
                                 dqkv + to + 2 * whole, 3 * whole);
                      });
}
