// The selective scan of core/scan.py with its state in registers: the same equations and names.
//
//   h_t = 2^(delta_t A2) h_{t-1} + (delta_t u_t) B_t,    y_t = sum_n C_t h_t,    A2 = A log2(e)
//
// Layouts, last axis fastest: u, delta, y (b t e); A2 (n e); B, C (b t n); state, last (b n e);
// entry (b k n e), the state before every SPAN positions. One share is one text of the batch and
// `wide` channels, a multiple of LANES. Built by native.py with -DN=... -DSPAN=... and -DREAL=float
// or double. Loops over n have a constant length and unroll, beyond 16 states in part: all 64 would
// take a compiler six seconds.
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
#define LANES (BYTES / (long)sizeof(REAL))
#define FOR_N _Pragma("GCC unroll 16") for (int n = 0; n < N; n++)

typedef REAL vec __attribute__((vector_size(BYTES)));
#if WIDE  // double
typedef long long bits __attribute__((vector_size(BYTES)));
enum { TERMS = 14, MANTISSA = 52, LEAST = -1022, MOST = 1024 };
#else
typedef int bits __attribute__((vector_size(BYTES)));
enum { TERMS = 8, MANTISSA = 23, LEAST = -126, MOST = 128 };
#endif

static inline vec all(REAL x) { return x - (vec){0}; }
static inline vec get(const REAL *from) { vec v; memcpy(&v, from, BYTES); return v; }
static inline void put(REAL *to, vec v) { memcpy(to, &v, BYTES); }
static inline vec pick(bits mask, vec yes, vec no) {
  return (vec)(((bits)yes & mask) | ((bits)no & ~mask));
}
// A NaN may carry a message in its low bits, and power_of_two would shift it into the exponent: a
// number again.
static inline vec plain(vec v) { return pick(v == v, v, all(__builtin_nan(""))); }
static inline REAL total(vec v) {
  for (int half = LANES / 2; half; half /= 2) for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

// 2^x = 2^whole sum_k (ln 2 part)^k / k!  with |part| <= 1/2; the whole part is added to the
// exponent's bits.
static inline vec power_of_two(vec x) {
  static const REAL ln2_k_over_k[14] = {  // ln(2)^k / k!
      1, 6.9314718055994529e-01, 2.4022650695910069e-01, 5.5504108664821576e-02,
      9.6181291076284769e-03, 1.3333558146428441e-03, 1.5403530393381606e-04,
      1.5252733804059838e-05, 1.3215486790144305e-06, 1.0178086009239696e-07,
      7.0549116208011209e-09, 4.4455382718708101e-10, 2.5678435993488196e-11,
      1.3691488853904124e-12};
  // adding it rounds to a whole number, left in the lowest bits
  const REAL shift = 1.5 * (1ll << MANTISSA);
  vec whole = x + shift, part = x - (whole - shift), sum = all(ln2_k_over_k[TERMS - 1]);
  for (int k = TERMS - 2; k >= 0; k--) sum = sum * part + ln2_k_over_k[k];
  sum = (vec)((bits)sum + ((bits)whole << MANTISSA));
  return pick(x >= (REAL)MOST, all(__builtin_inf()), pick(x < (REAL)LEAST, all(0), sum));
}

// Span by span, and in it channel by channel, so that a span's rows are read while they are near.
// Between spans the state waits in `last`.
static void forward_share(const REAL *u, const REAL *delta, const REAL *A2, const REAL *B,
                          const REAL *C, const REAL *state, REAL *y, REAL *last, REAL *entry,
                          long times, long width, long from, long to) {
  for (long start = 0; start < times; start += SPAN, state = last, entry += N * width) {
    long end = times - start < SPAN ? times : start + SPAN;
    for (long e = from; e < to; e += LANES) {
      vec h[N], a2[N];
      FOR_N {
        long i = n * width + e;
        h[n] = get(state + i), a2[n] = plain(get(A2 + i));
        put(entry + i, h[n]);
      }
      for (long t = start; t < end; t++) {
        vec d = plain(get(delta + t * width + e)), x = d * get(u + t * width + e), sum = all(0);
        FOR_N {
          h[n] = power_of_two(d * a2[n]) * h[n] + x * B[t * N + n];
          sum += h[n] * C[t * N + n];
        }
        put(y + t * width + e, sum);
      }
      FOR_N put(last + n * width + e, h[n]);
    }
  }
}

// Walks the spans from the right. A span's states are computed anew from its entry; then, with
// carry = a_{t+1} g_{t+1},
//   g_t = C_t dy_t + carry,  dC = h_t dy_t,  dB = g_t delta_t u_t,  d(delta_t A) = a_t g_t h_{t-1}.
// carry (b n e) holds the gradient of the last state on the way in and of the first state on the
// way out.
static void backward_share(const REAL *dy, const REAL *u, const REAL *delta, const REAL *A2,
                           const REAL *B, const REAL *C, const REAL *entry, REAL *carry, REAL *du,
                           REAL *ddelta, REAL *dA, REAL *dB, REAL *dC,
                           long times, long width, long from, long to) {
  const REAL ln2 = 6.9314718055994531e-1;
  vec h[SPAN + 1][N], a[SPAN][N], sum_B[SPAN][N], sum_C[SPAN][N];
  for (long k = (times + SPAN - 1) / SPAN - 1; k >= 0; k--) {
    long start = k * SPAN, span = times - start < SPAN ? times - start : SPAN;
    memset(sum_B, 0, sizeof sum_B);
    memset(sum_C, 0, sizeof sum_C);
    for (long e = from; e < to; e += LANES) {
      vec a2[N], right[N], sum_A[N];
      FOR_N {
        long i = n * width + e;
        a2[n] = plain(get(A2 + i));
        right[n] = get(carry + i);
        sum_A[n] = get(dA + i);
        h[0][n] = get(entry + k * N * width + i);
      }
      for (long s = 0; s < span; s++) {
        long i = (start + s) * width + e;
        vec d = plain(get(delta + i)), x = d * get(u + i);
        FOR_N {
          a[s][n] = power_of_two(d * a2[n]);
          h[s + 1][n] = a[s][n] * h[s][n] + x * B[(start + s) * N + n];
        }
      }
      for (long s = span - 1; s >= 0; s--) {
        long i = (start + s) * width + e, j = (start + s) * N;
        vec d = get(delta + i), ui = get(u + i), x = d * ui, out = get(dy + i);
        vec dx = all(0), slope = all(0);
        FOR_N {
          vec g = out * C[j + n] + right[n];
          sum_C[s][n] += h[s + 1][n] * out;
          sum_B[s][n] += g * x;
          dx += g * B[j + n];
          right[n] = a[s][n] * g;
          vec z = right[n] * h[s][n];
          slope += z * a2[n];
          sum_A[n] += z * d;
        }
        put(du + i, dx * d);
        put(ddelta + i, dx * ui + slope * ln2);
      }
      FOR_N put(carry + n * width + e, right[n]), put(dA + n * width + e, sum_A[n]);
    }
    for (long s = 0; s < span; s++) FOR_N {
      dB[(start + s) * N + n] = total(sum_B[s][n]);
      dC[(start + s) * N + n] = total(sum_C[s][n]);
    }
  }
}

// A number too small for a full mantissa, such as softplus(-90), costs an x86 core some hundred
// cycles each time. While a thread is in the kernel it is zero; restore() gives the old mode back.
static inline unsigned flush_to_zero(void) {
#ifdef __SSE__
  unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040);  // results, operands
  return mode;
#else
  return 0;
#endif
}
static inline void restore(unsigned mode) {
#ifdef __SSE__
  _mm_setcsr(mode);
#endif
}

// Share i is text i / parts and part i % parts of the channels. dA is (b n e); dB and dC are
// (b parts t n): summed by the caller.
#define SHARES                                                                                   \
  _Pragma("omp parallel for schedule(static) num_threads(threads)")                              \
  for (long i = 0; i < batch * parts; i++) {                                                     \
    long b = i / parts, from = i % parts * wide, to = from + wide < width ? from + wide : width; \
    long te = b * times * width, tn = b * times * N, ne = b * N * width;                         \
    long k = (times + SPAN - 1) / SPAN * ne;                                                     \
    unsigned mode = flush_to_zero();

void forward(const REAL *u, const REAL *delta, const REAL *A2, const REAL *B, const REAL *C,
             const REAL *state, REAL *y, REAL *last, REAL *entry,
             long batch, long times, long width, long parts, long wide, long threads) {
  SHARES
    forward_share(u + te, delta + te, A2, B + tn, C + tn, state + ne, y + te, last + ne, entry + k,
                  times, width, from, to);
    restore(mode);
  }
}

void backward(const REAL *dy, const REAL *u, const REAL *delta, const REAL *A2, const REAL *B,
              const REAL *C, const REAL *entry, REAL *carry, REAL *du, REAL *ddelta, REAL *dA,
              REAL *dB, REAL *dC,
              long batch, long times, long width, long parts, long wide, long threads) {
  SHARES
    backward_share(dy + te, u + te, delta + te, A2, B + tn, C + tn, entry + k, carry + ne, du + te,
                   ddelta + te, dA + ne, dB + i * times * N, dC + i * times * N,
                   times, width, from, to);
    restore(mode);
  }
}
