// The five models of this book, forward only, in one file that needs no library: WebAssembly for a page,
// or a shared library for the tests. One opened model at a time; a page gives each model a copy of its own.
//
//   gpt, thinker, mamba       restart(n) reads ids[0..n), push(id) one more: the logits of the next character
//   diffusion, thinker-page   page(t), then denoise(...) or refine(...): a page of ids where `mask` is 1
//
// Letters are the book's: d width, h head, c channel of a head, e inner width, n state, r round, v vocabulary;
// here `n` at the arguments of a product is how many positions it takes. Equations: irann/core, irann/models.
#include <stddef.h>
#include <stdint.h>

#define memcpy __builtin_memcpy
#define memmove __builtin_memmove
#define memset __builtin_memset
#define sqrt __builtin_sqrt
#define sqrtf __builtin_sqrtf
double sin(double), cos(double), exp(double), log(double);

#define EXPORT __attribute__((visibility("default")))
#define LANES 4
typedef float vec __attribute__((vector_size(16)));
typedef int32_t bits __attribute__((vector_size(16)));

// ------------------------------------------------------------------------------------------- memory
// All that a model needs is taken once, when it is opened, and given back when the next one is.

#ifdef __wasm__
extern unsigned char __heap_base;
static size_t top;
static void free_all(void) { top = ((size_t)&__heap_base + 15) & ~(size_t)15; }
static void *take(size_t bytes) {  // 0 if there is no more
  if (!top) free_all();
  size_t at = top, need = ((top += (bytes + 15) & ~(size_t)15) + 65535) / 65536, have = __builtin_wasm_memory_size(0);
  if (need > have && __builtin_wasm_memory_grow(0, need - have) == (size_t)-1) return 0;
  return memset((void *)at, 0, bytes);
}
#else
#include <stdlib.h>
static void *taken[1024];
static int count;
static void free_all(void) { while (count) free(taken[--count]); }
static void *take(size_t bytes) { return count < 1024 ? taken[count++] = calloc(1, bytes + 16) : 0; }
#endif
static float *numbers(size_t n) { return take(n * sizeof(float)); }

// ---------------------------------------------------------------------------------------- arithmetic

typedef float loose __attribute__((vector_size(16), aligned(4), may_alias));
static inline vec get(const float *from) { return *(const loose *)from; }
static inline void put(float *to, vec v) { *(loose *)to = v; }
static inline vec all(float x) { return (vec){x, x, x, x}; }
static inline float total(vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// e^x = 2^whole e^part, |part| <= ln(2) / 2; the whole part is added to the exponent's bits.
static inline vec vexp(vec x) {
  const vec least = all(-87), most = all(88), shift = all(12582912.f);  // 1.5 * 2^23: adding it rounds
  bits low = x < least, high = x > most;
  x = (vec)(((bits)x & ~low & ~high) | ((bits)least & low) | ((bits)most & high));
  vec whole = x * 1.44269504f + shift, k = whole - shift;
  vec part = (x - k * 0.693359375f) + k * 2.12194440e-4f, sum = all(1.f / 5040);
  const float over_factorial[6] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1};
  for (int i = 0; i < 6; i++) sum = sum * part + over_factorial[i];
  sum = sum * part + 1;
  return (vec)((bits)sum + ((bits)whole << 23));
}
static float exp1(float x) { return vexp(all(x))[0]; }
static float sigmoid(float x) { return 1 / (1 + exp1(-x)); }

// R rows of w times N positions of x: each number that is loaded is used R or N times.
static inline __attribute__((always_inline)) void tile(
    float *y, const float *x, const float *w, int in, int out, int row, const int R, const int N) {
  vec sum[4][4];
  for (int r = 0; r < R; r++) for (int i = 0; i < N; i++) sum[r][i] = all(0);
  int c = 0;
  for (; c + LANES <= in; c += LANES) {
    vec a[4];
    for (int i = 0; i < N; i++) a[i] = get(x + i * in + c);
    for (int r = 0; r < R; r++) {
      vec b = get(w + r * row + c);
      for (int i = 0; i < N; i++) sum[r][i] += b * a[i];
    }
  }
  for (int r = 0; r < R; r++) for (int i = 0; i < N; i++) {
    float s = total(sum[r][i]);
    for (int k = c; k < in; k++) s += w[r * row + k] * x[i * in + k];
    y[i * out + r] = s;
  }
}

// Scores of one query with s keys, which lie d apart.
static void dots(float *y, const float *q, const float *k, int s, int d, int c) {
  int j = 0;
  for (; j + 4 <= s; j += 4) tile(y + j, q, k + j * d, c, s, d, 4, 1);
  for (; j < s; j++) tile(y + j, q, k + j * d, c, s, d, 1, 1);
}

// y (n out) = x (n in) times w (out in), transposed: a linear map of n positions.
static __attribute__((noinline)) void linear(float *y, const float *x, const float *w, int n, int in, int out) {
  int i = 0;
  for (; i + 4 <= n; i += 4, x += 4 * in, y += 4 * out) {
    int o = 0;
    for (; o + 2 <= out; o += 2) tile(y + o, x, w + o * in, in, out, in, 2, 4);
    for (; o < out; o++) tile(y + o, x, w + o * in, in, out, in, 1, 4);
  }
  for (; i < n; i++, x += in, y += out) {
    int o = 0;
    for (; o + 4 <= out; o += 4) tile(y + o, x, w + o * in, in, out, in, 4, 1);
    for (; o < out; o++) tile(y + o, x, w + o * in, in, out, in, 1, 1);
  }
}

// y (n out) = a (n in) times w (in out), rows of w whose number in `a` is zero left out: squared ReLU leaves few others.
static void sparse(float *y, const float *a, const float *w, int n, int in, int out) {
  for (; n > 0; n--, a += in, y += out) {
    memset(y, 0, out * sizeof(float));
    for (int k = 0; k < in;) {
      const float *rows[4] = {w, w, w, w};
      float by[4] = {0, 0, 0, 0};
      for (int found = 0; found < 4 && k < in; k++) if (a[k] != 0) by[found] = a[k], rows[found++] = w + (size_t)k * out;
      int o = 0;
      for (; o + LANES <= out; o += LANES)
        put(y + o, get(y + o) + by[0] * get(rows[0] + o) + by[1] * get(rows[1] + o) + by[2] * get(rows[2] + o) + by[3] * get(rows[3] + o));
      for (; o < out; o++) for (int r = 0; r < 4; r++) y[o] += by[r] * rows[r][o];
    }
  }
}

static void add(float *x, const float *y, int n) { for (int i = 0; i < n; i++) x[i] += y[i]; }

// Mean zero and variance one, times the gain if there is one: LayerNorm without parameters.
static __attribute__((noinline)) void layer_norm(float *y, const float *x, const float *gain, int width) {
  float mean = 0, variance = 0;
  for (int i = 0; i < width; i++) mean += x[i];
  mean /= width;
  for (int i = 0; i < width; i++) variance += (x[i] - mean) * (x[i] - mean);
  float scale = 1 / sqrtf(variance / width + 1e-5f);
  for (int i = 0; i < width; i++) y[i] = (x[i] - mean) * scale * (gain ? gain[i] : 1);
}

static void rms_norm(float *y, const float *x, const float *gain, int width) {
  float square = 0;
  for (int i = 0; i < width; i++) square += x[i] * x[i];
  float scale = 1 / sqrtf(square / width + 1e-5f);
  for (int i = 0; i < width; i++) y[i] = x[i] * scale * gain[i];
}

static __attribute__((noinline)) void softmax(float *p, const float *x, int n) {
  float most = x[0], sum = 0;
  int i = 0;
  for (int j = 1; j < n; j++) if (x[j] > most) most = x[j];
  for (; i + LANES <= n; i += LANES) {
    vec e = vexp(get(x + i) - most);
    put(p + i, e);
    sum += total(e);
  }
  for (; i < n; i++) sum += p[i] = exp1(x[i] - most);
  for (i = 0; i < n; i++) p[i] /= sum;
}

static int argmax(const float *x, int n) {
  int best = 0;
  for (int i = 1; i < n; i++) if (x[i] > x[best]) best = i;
  return best;
}

// --------------------------------------------------------------------------------- a model from a file
// A file: these whole numbers; for diffusion two tables of float64, which only the page reads (alpha_bar, and the
// distribution function of the noise levels); then all parameters in half precision, in the order of `open`.

enum { GPT, THINKER, MAMBA, DIFFUSION, PAGE_THINKER };
typedef struct {
  int32_t magic, kind, vocabulary, window, layers, heads, width, inner;
  int32_t prelude, core, rounds, gained, state, conv, rank, channels, neighbours, levels, bayes, conditioned;
  int32_t halt_width, unused;  // so that the tables begin at a multiple of 8 bytes
} Config;
enum { MAGIC = 0x326e7269, MOST_LAYERS = 64 };  // "irn2"

typedef struct { const float *attn, *proj, *fc, *out; } Block;  // c_attn, c_proj; mlp.c_fc, mlp.c_proj (transposed)
typedef struct {
  const float *norm, *in, *conv, *conv_bias, *x, *dt, *dt_bias, *A, *D, *out;
  float *inputs, *h;  // what the convolution still needs, (conv e), the newest last; the state (e n)
} Mixer;

static Config m;
static Block blocks[MOST_LAYERS];
static Mixer mixers[MOST_LAYERS + 1];  // of the last only the norm
static const float *wte, *head, *head_bias, *gains, *halt_bias, *halt_in, *halt_in_bias, *halt_head;
static const float *input_proj, *time_in, *time_in_bias, *time_out, *time_out_bias, *clean;
static float *embeddings, *rotary, *logits, *keys, *values, *x, *y, *z, *wide, *scores, *seen, *noise;
static float *hidden, *before, *injected, *p, *noisy, *guess, *sure, *deltas, *sums, *answer;
static int32_t *ids, *shown, *reached;  // by round of the thinker: how many positions, the first ones, have taken it
static unsigned char *mask, *file;
static int held, length, rounds_taken, positions;
static float halted;

static const uint16_t *next;  // the next half of the file
static const uint16_t *end;

static float half(uint16_t bits16) {
  uint32_t sign = (uint32_t)(bits16 & 0x8000) << 16, exponent = bits16 >> 10 & 31, fraction = bits16 & 1023;
  if (!exponent) return (sign ? -1 : 1) * (float)fraction / 16777216.f;  // subnormal: fraction * 2^-24
  uint32_t word = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  float value;
  memcpy(&value, &word, 4);
  return value;
}
static float *read(size_t n) {
  float *to = next + n <= end ? numbers(n) : 0;
  if (to) for (size_t i = 0; i < n; i++) to[i] = half(next[i]);
  next += n;
  return to;
}

static void read_block(Block *b) {
  size_t d = m.width, e = m.inner;
  b->attn = read(3 * d * d), b->proj = read(d * d), b->fc = read(e * d);
  float *out = next + d * e <= end ? numbers(d * e) : 0;
  for (size_t i = 0; out && i < d * e; i++) out[i % e * d + i / e] = half(next[i]);  // transposed, for `sparse`
  next += d * e, b->out = out;
}

static void read_mixer(Mixer *b) {
  size_t d = m.width, e = m.inner, n = m.state;
  b->norm = read(d), b->in = read(2 * e * d), b->conv = read(e * m.conv), b->conv_bias = read(e);
  b->x = read((m.rank + 2 * n) * e), b->dt = read(e * m.rank), b->dt_bias = read(e);
  float *A = read(e * n);
  for (size_t i = 0; A && i < e * n; i++) A[i] = -(float)exp(A[i]);  // A = -exp(A_log)
  b->A = A, b->D = read(e), b->out = read(d * e);
  b->inputs = numbers(m.conv * e), b->h = numbers(e * n);
}

static int page_model(void) { return m.kind == DIFFUSION || m.kind == PAGE_THINKER; }
static int sensible(void) {
  int right = m.magic == MAGIC && m.kind >= GPT && m.kind <= PAGE_THINKER && m.vocabulary > 0 && m.window > 0;
  right = right && m.halt_width >= 0 && m.width > 0 && m.inner > 0 && m.layers > 0 && m.layers <= MOST_LAYERS;
  if (m.kind == MAMBA) return right && m.state > 0 && m.state % LANES == 0 && m.conv > 0 && m.rank > 0;
  return right && m.heads > 0 && m.width % (2 * m.heads) == 0;
}

static float threshold;
static int round_limit;
// A position stops once the probability of having stopped reaches `limit`, and at last after `rounds` (0: all).
EXPORT void set_rule(float limit, int rounds) {
  threshold = limit;
  round_limit = rounds > 0 && rounds < m.rounds ? rounds : m.rounds;
}

// Where a file of so many bytes is to be put.
EXPORT unsigned char *room(int bytes) { free_all(); return file = take(bytes); }

// -> 0, or 1 if the file is no model, 2 if it has more or less parameters than it should, 3 without memory.
EXPORT int open_model(int bytes) {
  if (bytes < (int)sizeof m) return 1;
  memcpy(&m, file, sizeof m);
  if (!sensible()) return 1;
  size_t tables = m.kind == DIFFUSION ? (size_t)m.levels * 16 : 0;
  if (sizeof m + tables > (size_t)bytes) return 2;
  next = (const uint16_t *)(file + sizeof m + tables), end = (const uint16_t *)(file + bytes);
  size_t d = m.width, e = m.inner, v = m.vocabulary, t = m.window + 1;
  const int depth = m.layers;
  if (m.kind == DIFFUSION) {
    size_t per = m.channels + v * (m.bayes + m.conditioned), sees = (2 * m.neighbours + 1) * per;
    embeddings = read(v * m.channels);
    input_proj = read(d * sees);
    time_in = read(d * 32), time_in_bias = read(d), time_out = read(d * d), time_out_bias = read(d);
    clean = read(d);
    seen = numbers(t * (per + sees));
    noisy = numbers(t * m.channels), guess = numbers(t * v);
  } else {
    wte = read((v + (m.kind == PAGE_THINKER)) * d);
  }
  for (int i = 0; i < depth; i++) m.kind == MAMBA ? read_mixer(mixers + i) : read_block(blocks + i);
  gains = m.gained ? read((size_t)m.rounds * m.core * 2 * d) : 0;
  halt_bias = m.gained ? read(m.rounds) : 0;
  if (m.kind == THINKER || m.kind == PAGE_THINKER) {  // sees the hidden state, its distance, the entropy; last a bias
    size_t units = m.halt_width;
    halt_in = units ? read(units * (d + 2)) : 0, halt_in_bias = units ? read(units) : 0;
    halt_head = read((units ? units : d + 2) + 1);
  }
  const float *norm_f = m.kind == MAMBA ? read(d) : 0;
  if (norm_f) mixers[depth].norm = norm_f;
  head = read(v * d);
  head_bias = m.kind == DIFFUSION ? read(v) : 0;
  if (next != end) return 2;
  int many = page_model() || m.kind == THINKER ? t : 1;
  size_t caches = m.kind == THINKER ? m.prelude + (size_t)m.rounds * m.core : m.kind == GPT ? depth : 1;
  if (m.kind != MAMBA) {
    keys = numbers(caches * t * d), values = numbers(caches * t * d);
    size_t c = d / m.heads;
    rotary = numbers(t * c);
    for (size_t i = 0; rotary && i < t; i++) for (size_t j = 0; j < c; j += 2) {
      double angle = i * exp(-(double)j / c * 9.210340371976184);  // log(10000)
      rotary[i * c + j] = (float)cos(angle), rotary[i * c + j + 1] = (float)sin(angle);
    }
  } else deltas = numbers((size_t)depth * t * e), sums = numbers((size_t)depth * e);
  size_t most = 3 * d + 2 * e + m.rank + 2 * m.state + m.halt_width, in_page = page_model() && v > most ? v : most;
  x = numbers(many * d), y = numbers(many * most), z = numbers(many * most), wide = numbers(many * in_page);
  scores = numbers((size_t)depth * (m.kind == MAMBA ? 1 : m.heads) * t);
  hidden = numbers(many * d), before = numbers(many * d), injected = numbers(many * d);
  logits = numbers(many * v), p = numbers(v), sure = numbers(t), answer = numbers((size_t)depth * t);
  noise = numbers(t * (v + 64 + m.channels));
  ids = take(4 * (1 << 16)), shown = take(4 * t), reached = take(4 * (size_t)m.rounds), mask = take(t);
  for (size_t i = 0; m.kind == DIFFUSION && i < v; i++) {  // onto the sphere of radius sqrt(channels)
    float square = 0, *point = embeddings + i * m.channels;
    for (int j = 0; j < m.channels; j++) square += point[j] * point[j];
    float scale = sqrtf(m.channels) / (sqrtf(square) > 1e-12f ? sqrtf(square) : 1e-12f);
    for (int j = 0; j < m.channels; j++) point[j] *= scale;
  }
  held = length = positions = 0;
  set_rule(.5f, 0);
  return mask ? 0 : 3;
}

EXPORT int32_t *get_ids(void) { return ids; }
EXPORT int32_t *get_shown(void) { return shown; }
EXPORT unsigned char *get_mask(void) { return mask; }
EXPORT float *get_logits(void) { return logits; }
EXPORT float *get_noise(void) { return noise; }
EXPORT float *get_noisy(void) { return noisy; }
EXPORT float *get_embeddings(void) { return embeddings; }
EXPORT float *get_attention(void) { return scores; }  // (layers heads window+1), of the last position
EXPORT int get_rounds(void) { return rounds_taken; }
EXPORT float get_halted(void) { return halted; }

// ------------------------------------------------------------------------------------ a Transformer block

// Queries, keys and values of n positions from `first` on; keys and values go into the caches.
static void project(float *q, float *k, float *v, const float *normed, const Block *b, int n, int first) {
  int d = m.width, c = d / m.heads;
  linear(wide, normed, b->attn, n, d, 3 * d);
  for (int i = 0; i < n; i++) {
    const float *qkv = wide + i * 3 * d, *turn = rotary + (first + i) * c;
    for (int part = 0; part < 2; part++) for (int h = 0; h < m.heads; h++) {
      float *to = (part ? k : q) + i * d + h * c;
      layer_norm(to, qkv + part * d + h * c, 0, c);  // QK-norm, then each pair of channels turns by its angle
      for (int j = 0; j < c; j += 2) {
        float a = to[j], o = to[j + 1];
        to[j] = a * turn[j] - o * turn[j + 1], to[j + 1] = a * turn[j + 1] + o * turn[j];
      }
    }
    memcpy(v + i * d, qkv + 2 * d, d * sizeof(float));
  }
}

// The weighted mean of s values, of 4 R channels at once.
static inline __attribute__((always_inline)) void mean(
    float *to, const float *v, const float *weights, int s, int d, const int R) {
  vec sum[4];
  for (int i = 0; i < R; i++) sum[i] = all(0);
  for (int j = 0; j < s; j++) for (int i = 0; i < R; i++) sum[i] += weights[j] * get(v + j * d + LANES * i);
  for (int i = 0; i < R; i++) put(to + LANES * i, sum[i]);
}

// One query looks at s positions: softmax(q k / sqrt(c)) v, head by head.
static void attend(float *to, const float *q, const float *k, const float *v, int s, float *weights) {
  int d = m.width, c = d / m.heads, t = m.window + 1;
  float scale = 1 / sqrtf(c);
  for (int h = 0; h < m.heads; h++, weights += t, q += c, k += c, v += c, to += c) {
    dots(weights, q, k, s, d, c);
    for (int j = 0; j < s; j++) weights[j] *= scale;
    softmax(weights, weights, s);
    int i = 0;
    for (; i + 4 * LANES <= c; i += 4 * LANES) mean(to + i, v + i, weights, s, d, 4);
    for (; i + LANES <= c; i += LANES) mean(to + i, v + i, weights, s, d, 1);
    for (; i < c; i++) for (int j = to[i] = 0; j < s; j++) to[i] += weights[j] * v[j * d + i];
  }
}

// x <- x + attention(norm(x)), x <- x + mlp(norm(x)), at n positions from `first` on: in a page each sees all, in a text
// itself and those before. `weights` are then the last one's.
static void block(const Block *b, float *stream, int n, int first, float *k, float *v, const float *gain, float *weights) {
  int d = m.width, e = m.inner;
  for (int i = 0; i < n; i++) layer_norm(y + i * d, stream + i * d, gain, d);
  project(z, k + first * d, v + first * d, y, b, n, first);
  for (int i = 0; i < n; i++) attend(y + i * d, z + i * d, k, v, first + (page_model() ? n : i + 1), weights);
  linear(z, y, b->proj, n, d, d);
  add(stream, z, n * d);
  for (int i = 0; i < n; i++) layer_norm(z + i * d, stream + i * d, gain ? gain + d : 0, d);
  linear(y, z, b->fc, n, d, e);
  for (int i = 0; i < n * e; i++) y[i] = y[i] > 0 ? y[i] * y[i] : 0;  // squared ReLU
  sparse(z, y, b->out, n, e, d);
  add(stream, z, n * d);
}

// ------------------------------------------------------------------------------------------------- gpt

static void gpt(int id) {
  int d = m.width, size = (m.window + 1) * d;
  memcpy(x, wte + id * d, d * sizeof(float));
  for (int i = 0; i < m.layers; i++)
    block(blocks + i, x, 1, held, keys + i * size, values + i * size, 0, scores + i * m.heads * (m.window + 1));
  layer_norm(y, x, 0, d);
  linear(logits, y, head, 1, d, m.vocabulary);
}

// --------------------------------------------------------------------------- thinker and thinker-page

static float distance(const float *a, const float *b, int n) {
  float sum = 0;
  for (int i = 0; i < n; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sqrtf(sum / n);
}
static float entropy(const float *from) {
  float nats = 0, most = from[argmax(from, m.vocabulary)], sum = 0;
  for (int i = 0; i < m.vocabulary; i++) sum += p[i] = exp1(from[i] - most);
  for (int i = 0; i < m.vocabulary; i++) nats += p[i] * (from[i] - most);
  return (float)log(sum) - nats / sum;
}

// One round: hidden <- norm(core(hidden + injected)) at n positions from `first` on; `before` is what it was.
static void think_once(int r, int n, int first, float *k, float *v, int size) {
  int d = m.width, seen_round = r < m.rounds ? r : m.rounds - 1;
  float *own = hidden + first * d;
  memcpy(before + first * d, own, n * d * sizeof(float));
  memcpy(x, own, n * d * sizeof(float));
  add(x, injected + first * d, n * d);
  for (int i = 0; i < m.core; i++) {
    const float *gain = gains ? gains + (seen_round * m.core + i) * 2 * d : 0;
    block(blocks + m.prelude + i, x, n, first, k + i * size, v + i * size, gain, scores);
  }
  for (int i = 0; i < n; i++) layer_norm(own + i * d, x + i * d, 0, d);
}

// The probability that position i, which predicts `say`, stops after round r: it sees its state, how far that moved, how
// unsure it is.
static float halt(int r, int i, const float *say) {
  int d = m.width;
  const float *own = hidden + i * d;
  float *sees = y, *units = z;  // which nothing else needs now
  int n = d + 2;
  memcpy(sees, own, d * sizeof(float));
  sees[d] = distance(own, before + i * d, d), sees[d + 1] = entropy(say);
  if (halt_in) {
    linear(units, sees, halt_in, 1, n, m.halt_width);
    sees = units, n = m.halt_width;
    for (int j = 0; j < n; j++) units[j] = units[j] + halt_in_bias[j] > 0 ? units[j] + halt_in_bias[j] : 0;
  }
  float sum = halt_head[n];
  for (int j = 0; j < n; j++) sum += halt_head[j] * sees[j];
  if (halt_bias) sum += halt_bias[r < m.rounds ? r : m.rounds - 1];
  return sigmoid(sum);
}

static void inject(int n, int first) {  // what every round sees of the characters: norm(prelude(wte))
  int d = m.width, size = page_model() ? 0 : (m.window + 1) * d;  // nobody comes back to a page's keys
  float *own = injected + first * d;
  for (int i = 0; i < m.prelude; i++) block(blocks + i, own, n, first, keys + i * size, values + i * size, 0, scores);
  for (int i = 0; i < n; i++) layer_norm(own + i * d, own + i * d, 0, d);
}

// n characters more; the last one thinks until it stops. All positions before it that lack a round which it goes on to,
// as they had stopped or are new, take it in the same call: so each sees of earlier ones what it would see had none
// stopped.
static void thinker(const int32_t *from, int n) {
  int d = m.width, size = (m.window + 1) * d, per_round = m.core * size, stop = 0, last = held + n - 1;
  float *k = keys + m.prelude * size, *v = values + m.prelude * size, survival = 1;
  for (int i = 0; i < n; i++) memcpy(injected + (held + i) * d, wte + from[i] * d, d * sizeof(float));
  inject(n, held);
  memset(hidden + held * d, 0, n * d * sizeof(float));
  for (rounds_taken = 0; rounds_taken < round_limit && !stop; rounds_taken++) {
    int r = rounds_taken, first = reached[r];
    think_once(r, last + 1 - first, first, k + r * per_round, v + r * per_round, size);
    reached[r] = last + 1;
    linear(logits, hidden + last * d, head, 1, d, m.vocabulary);
    survival *= 1 - halt(r, last, logits);
    stop = 1 - survival >= threshold;
  }
  halted = 1 - survival;
}

// ----------------------------------------------------------------------------------------------- mamba

static void mixer(Mixer *b, float *delta_kept) {
  int d = m.width, e = m.inner, n = m.state, conv = m.conv;
  float *signal = wide, *gate = wide + e, *u = z, *delta = z + e, *BC = y, *B = BC + m.rank, *C = B + n;
  rms_norm(y, x, b->norm, d);
  linear(wide, y, b->in, 1, d, 2 * e);
  memmove(b->inputs, b->inputs + e, (conv - 1) * e * sizeof(float));
  memcpy(b->inputs + (conv - 1) * e, signal, e * sizeof(float));
  for (int i = 0; i < e; i++) {  // each channel's own convolution, then SiLU
    float sum = b->conv_bias[i];
    for (int j = 0; j < conv; j++) sum += b->inputs[j * e + i] * b->conv[i * conv + j];
    u[i] = sum;
  }
  for (int i = 0; i + LANES <= e; i += LANES) put(u + i, get(u + i) / (1 + vexp(-get(u + i))));
  for (int i = e / LANES * LANES; i < e; i++) u[i] *= sigmoid(u[i]);
  linear(BC, u, b->x, 1, e, m.rank + 2 * n);  // the step size's input, then B and C
  linear(delta, BC, b->dt, 1, m.rank, e);
  for (int i = 0; i < e; i++) {
    float raw = delta[i] + b->dt_bias[i];
    delta[i] = raw > 20 ? raw : (float)log(1 + exp(raw));  // softplus
  }
  if (delta_kept) memcpy(delta_kept, delta, e * sizeof(float));
  for (int i = 0; i < e; i++) {  // h <- exp(delta A) h + delta u B,  y = C h + D u
    float *h = b->h + i * n;
    vec step = all(delta[i]), write = all(delta[i] * u[i]), sum = all(0);
    for (int j = 0; j < n; j += LANES) {
      vec now = vexp(step * get(b->A + i * n + j)) * get(h + j) + write * get(B + j);
      put(h + j, now);
      sum += now * get(C + j);
    }
    float g = gate[i];
    signal[i] = (total(sum) + b->D[i] * u[i]) * g * sigmoid(g);
  }
  linear(y, signal, b->out, 1, e, d);
  add(x, y, d);
}

static void mamba(int id) {
  int d = m.width, e = m.inner, t = m.window + 1;
  memcpy(x, wte + id * d, d * sizeof(float));
  for (int i = 0; i < m.layers; i++) mixer(mixers + i, held < t ? deltas + ((size_t)i * t + held) * e : 0);
  rms_norm(y, x, mixers[m.layers].norm, d);
  linear(logits, y, head, 1, d, m.vocabulary);
}

// Of what each layer wrote at each of the n positions read, the part still there at the last: (layers n),
// the mean over channels and states of exp(A times the sum of the later step sizes).
EXPORT float *remembered(int n) {
  int e = m.inner, t = m.window + 1, states = m.state;
  memset(sums, 0, (size_t)m.layers * e * sizeof(float));
  for (int at = n - 1; at >= 0; at--) for (int i = 0; i < m.layers; i++) {
    vec kept = all(0);
    for (int j = 0; j < e; j++) {
      float *since = sums + i * e + j;
      for (int k = 0; k < states; k += LANES) kept += vexp(*since * get(mixers[i].A + j * states + k));
      *since += deltas[((size_t)i * t + at) * e + j];
    }
    answer[i * n + at] = total(kept) / (e * states);
  }
  return answer;
}
// The mean step size at a position, over layers and channels: how much of the state it rewrites.
EXPORT float step_size(int at) {
  double sum = 0;
  for (int i = 0; i < m.layers; i++) for (int j = 0; j < m.inner; j++)
    sum += deltas[((size_t)i * (m.window + 1) + at) * m.inner + j];
  return sum / m.layers / m.inner;
}

// --------------------------------------------------------------------------------- from left to right

static void forget(void) {
  held = 0;
  if (m.kind == THINKER) memset(reached, 0, m.rounds * sizeof *reached);
  for (int i = 0; m.kind == MAMBA && i < m.layers; i++) {
    memset(mixers[i].inputs, 0, (size_t)m.conv * m.inner * sizeof(float));
    memset(mixers[i].h, 0, (size_t)m.inner * m.state * sizeof(float));
  }
}
static void see(const int32_t *from, int n) {
  if (m.kind == THINKER && n > 0) { thinker(from, n); held += n; return; }
  for (; n > 0; n--, from++, held++) {
    if (m.kind == GPT) gpt(*from);
    if (m.kind == MAMBA) mamba(*from);
  }
}

// Read the last of ids[0..n) that the window holds; the logits are then those of the character after them.
EXPORT void restart(int n) {
  forget();
  length = n;
  int from = m.kind != MAMBA && n > m.window ? n - m.window : 0;
  see(ids + from, n - from);
}

// One character more. When the window is full, its last half is read anew.
EXPORT void push(int id) {
  int more = 1;
  ids[length++] = id;
  if (m.kind != MAMBA && held == m.window) {
    forget();
    more = m.window / 2 > 1 ? m.window / 2 : 1;
  }
  see(ids + length - more, more);
}

// A character from logits: the likeliest at temperature 0; else the largest p_i / q_i, which is a draw from p if
// the q_i in `noise` are exponential (what torch.multinomial does).
static int draw(const float *from, float temperature, const float *q) {
  int best = argmax(from, m.vocabulary);
  if (temperature <= 0) return best;
  float most = from[best], top_ratio = -1;
  for (int i = 0; i < m.vocabulary; i++) {
    float ratio = exp1((from[i] - most) / temperature) / q[i];
    if (ratio > top_ratio) top_ratio = ratio, best = i;
  }
  return best;
}
EXPORT int choose(float temperature) { return draw(logits, temperature, noise); }

// ------------------------------------------------------------------------------------------ whole pages

// Begin a page of t positions: ids are its text, mask is 1 where they are to be written.
EXPORT void page(int t) {
  positions = t;
  if (m.kind == DIFFUSION) memset(guess, 0, (size_t)t * m.vocabulary * sizeof(float));
  else memset(hidden, 0, (size_t)t * m.width * sizeof(float));
}

// The denoiser: logits of every character at every position, given noisy embeddings, at a signal of alpha_bar.
EXPORT void see_through(double alpha_bar) {
  int t = positions, d = m.width, v = m.vocabulary, ch = m.channels, reach = m.neighbours;
  int per = ch + v * (m.bayes + m.conditioned), sees = (2 * reach + 1) * per;
  float factor = sqrt(alpha_bar) / (1 - alpha_bar), log_snr = log(alpha_bar / (1 - alpha_bar)), root = sqrtf(v);
  float *each = seen + (size_t)t * sees, *likelihood = logits, level[32];
  memset(seen, 0, (size_t)t * sees * sizeof(float));
  for (int i = 0; i < t; i++) {  // x, what it says of itself by Bayes, and the last guess
    float *own = each + i * per, *posterior = own + ch, *last = posterior + v * m.bayes;
    memcpy(own, mask[i] ? noisy + i * ch : embeddings + ids[i] * ch, ch * sizeof(float));
    for (int j = 0; j < v; j++) {
      float dot = 0;
      for (int k = 0; k < ch; k++) dot += own[k] * embeddings[j * ch + k];
      likelihood[i * v + j] = factor * dot;
    }
    if (m.bayes && mask[i]) softmax(posterior, likelihood + i * v, v);
    if (m.bayes && !mask[i]) for (int j = 0; j < v; j++) posterior[j] = j == ids[i];
    for (int j = 0; m.conditioned && j < v; j++) last[j] = (mask[i] ? guess[i * v + j] : j == ids[i]) * root;
    for (int j = 0; m.bayes && j < v; j++) posterior[j] *= root;
    for (int k = -reach; k <= reach; k++)  // position i is seen by its neighbours
      if (i - k >= 0 && i - k < t) memcpy(seen + (size_t)(i - k) * sees + (k + reach) * per, own, per * sizeof(float));
  }
  linear(x, seen, input_proj, t, sees, d);
  for (int i = 0; i < 16; i++) {
    float angle = log_snr * (float)exp((-1.5 + i * 2. / 15) * 2.302585092994046);  // log(10)
    level[i] = sin(angle), level[16 + i] = cos(angle);
  }
  linear(y, level, time_in, 1, 32, d);
  for (int i = 0; i < d; i++) y[i] += time_in_bias[i], y[i] *= sigmoid(y[i]);
  linear(z, y, time_out, 1, d, d);
  add(z, time_out_bias, d);
  for (int i = 0; i < t; i++) add(x + i * d, mask[i] ? z : clean, d);
  for (int i = 0; i < m.layers; i++) block(blocks + i, x, t, 0, keys, values, 0, scores);
  for (int i = 0; i < t; i++) layer_norm(y + i * d, x + i * d, 0, d);
  linear(wide, y, head, t, d, v);
  for (int i = 0; i < t * v; i++) logits[i] = wide[i] + head_bias[i % v] + (m.bayes ? likelihood[i] : 0);
}

// The guess that the denoiser shows itself next time: softmax of its logits.
EXPORT void keep_guess(float temperature) {
  int v = m.vocabulary;
  for (int i = 0; i < positions; i++) {
    float *to = guess + i * v;
    if (temperature > 0) {
      for (int j = 0; j < v; j++) to[j] = logits[i * v + j] / temperature;
      softmax(to, to, v);
    } else for (int best = argmax(logits + i * v, v), j = 0; j < v; j++) to[j] = j == best;
  }
}

// One step from a signal of alpha_bar to the larger one `after`, with fresh noise; what is sure from the left is
// known from then on -> how many characters that is. `shown` is what the page looks like.
EXPORT int denoise(double alpha_bar, double after, double eta, float temperature) {
  int t = positions, v = m.vocabulary, ch = m.channels, settled = 0;
  see_through(alpha_bar);
  keep_guess(temperature);
  double sigma2 = eta * eta * (1 - after) / (1 - alpha_bar) * (1 - alpha_bar / after);
  double rest = 1 - after - sigma2;
  float signal = sqrt(alpha_bar), spread = sqrt(1 - alpha_bar), to_x0 = sqrt(after);
  float to_eps = sqrt(rest > 0 ? rest : 0), fresh = sqrt(sigma2 > 0 ? sigma2 : 0);
  float colder = temperature > .5f ? temperature : .5f;
  for (int i = 0; i < t; i++) {
    const float *say = logits + i * v;
    float *own = noisy + i * ch;
    for (int j = 0; j < ch; j++) {
      float x0 = 0;
      for (int k = 0; k < v; k++) x0 += guess[i * v + k] * embeddings[k * ch + j];
      float eps = (own[j] - signal * x0) / spread;
      own[j] = to_x0 * x0 + to_eps * eps + fresh * noise[i * ch + j];
    }
    for (int k = 0; k < v; k++) {  // the nearest point of the sphere
      p[k] = 0;
      for (int j = 0; j < ch; j++) p[k] += own[j] * embeddings[k * ch + j];
    }
    shown[i] = argmax(p, v);
    if (mask[i]) ids[i] = argmax(say, v);
    for (int k = 0; k < v; k++) p[k] = say[k] / colder;
    softmax(p, p, v);
    sure[i] = p[argmax(p, v)];
  }
  while (settled < t && (!mask[settled] || sure[settled] > .9999f)) mask[settled++] = 0;
  for (int i = 0; i < t; i++) if (!mask[i] || after >= 1) shown[i] = ids[i];
  return after >= 1 ? t : settled;
}

// The page at once: think until every masked position would stop, guess, keep the surest of them, of which an equal
// part is due in each of the steps that are `left` -> how many are still masked. `shown` has all guesses.
EXPORT int refine(int left, float temperature) {
  int t = positions, d = m.width, v = m.vocabulary, limit = round_limit, masked = 0;
  float *survival = answer;
  for (int i = 0; i < t; i++) {
    memcpy(injected + i * d, wte + (mask[i] ? v : ids[i]) * d, d * sizeof(float));
    survival[i] = 1, masked += mask[i];
  }
  inject(t, 0);
  for (int r = 0, done = 0; r < limit && !done; r++) {
    think_once(r, t, 0, keys, values, 0);
    linear(logits, hidden, head, t, d, v);
    done = 1;
    for (int i = 0; i < t; i++) {
      survival[i] *= 1 - halt(r, i, logits + i * v);
      if (mask[i] && 1 - survival[i] < threshold) done = 0;
    }
    rounds_taken = r + 1;
  }
  for (int i = 0; i < t; i++) {
    shown[i] = mask[i] ? draw(logits + i * v, temperature, noise + i * v) : ids[i];
    softmax(p, logits + i * v, v);
    sure[i] = p[shown[i]];
  }
  for (int due = (masked + left - 1) / left; due > 0; due--) {
    int best = -1;
    for (int i = 0; i < t; i++) if (mask[i] && (best < 0 || sure[i] > sure[best])) best = i;
    if (best < 0) break;
    ids[best] = shown[best], mask[best] = 0, masked--;
  }
  return masked;
}

// ---------------------------------------------------------------------------------------------- SHA-256
// FIPS 180-4. A page opened from a disk or over plain http may have no other.

static uint32_t turned(uint32_t word, int by) { return word >> by | word << (32 - by); }
static void compress(uint32_t *s, const unsigned char *from, const uint32_t *k) {
  uint32_t w[64], v[8];
  for (int i = 0; i < 16; i++, from += 4) w[i] = (uint32_t)from[0] << 24 | from[1] << 16 | from[2] << 8 | from[3];
  for (int i = 16; i < 64; i++)
    w[i] = w[i - 16] + w[i - 7] + (turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3) +
           (turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10);
  memcpy(v, s, 32);
  for (int i = 0; i < 64; i++) {
    uint32_t one = v[7] + (turned(v[4], 6) ^ turned(v[4], 11) ^ turned(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
    uint32_t two = (turned(v[0], 2) ^ turned(v[0], 13) ^ turned(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
    memmove(v + 1, v, 28);
    v[4] += one, v[0] = one + two;
  }
  for (int i = 0; i < 8; i++) s[i] += v[i];
}
static double root_of(int prime, int third) {  // by Newton, as exact as a double
  double r = prime;
  for (int i = 0; i < 100; i++) r -= third ? (r * r * r - prime) / (3 * r * r) : (r * r - prime) / (2 * r);
  return r;
}
static uint32_t fraction(double r) { return (uint32_t)((r - (int)r) * 4294967296.); }
static unsigned char digest[32];

// -> the hash of the first bytes of `room`.
EXPORT unsigned char *sha256(int bytes) {
  uint32_t k[64], s[8];
  for (int prime = 2, found = 0; found < 64; prime++) {  // fractions of the roots of the first primes
    int divisor = 2;
    while (divisor < prime && prime % divisor) divisor++;
    if (divisor < prime) continue;
    if (found < 8) s[found] = fraction(root_of(prime, 0));
    k[found++] = fraction(root_of(prime, 1));
  }
  unsigned char last[128] = {0};
  int whole = bytes / 64 * 64, rest = bytes - whole, padded = rest < 56 ? 64 : 128;
  for (int i = 0; i < whole; i += 64) compress(s, file + i, k);
  memcpy(last, file + whole, rest);
  last[rest] = 0x80;
  for (int i = 0; i < 8; i++) last[padded - 1 - i] = (uint64_t)bytes * 8 >> 8 * i;
  for (int i = 0; i < padded; i += 64) compress(s, last + i, k);
  for (int i = 0; i < 32; i++) digest[i] = s[i / 4] >> (24 - i % 4 * 8);
  return digest;
}
