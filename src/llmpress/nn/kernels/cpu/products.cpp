// Products with compressed weights on a CPU, from the tensors as they are stored.
//
// This file includes itself once for each instruction set (the second half, LEVEL 2, 1, 0); which
// runs is decided when the library is loaded. There is no thread pool here: torch's own
// parallel_for is handed over by Python. Every output is computed by one thread in one order, so
// results depend neither on the number of threads nor on how many rows come together.
//
// Shapes: x [M, in], y [M, out]; a weight by rows is [out, in], a codebook's codes are [in, J] with
// J = ceil(out / d); G = ceil(in / group). Codes are a little-endian bit stream without gaps.
#ifndef LEVEL

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

enum Dtype { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };

constexpr int64_t MOST_ROWS = 8;      // that share what was unpacked in registers
constexpr int64_t LEAST_WORK = 16384; // weights that are worth a thread

using Task = void (*)(int64_t begin, int64_t end, void* context);
int32_t (*parallel_for)(int64_t, int64_t, int64_t, Task, void*) = nullptr;

void in_parallel(int64_t count, int64_t weights_each, Task task, void* context) {
  const int64_t least = LEAST_WORK / (weights_each + 1) + 1;
  if (parallel_for == nullptr || count <= least)
    task(0, count, context);
  else
    parallel_for(0, count, least, task, context);
}

// Memory that a thread which calls keeps between calls.
struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
  float* floats(int64_t count) {
    const size_t needed = (count * sizeof(float) + 127) / 64 * 64;
    if (needed > size) {
      std::free(data);
      data = static_cast<char*>(std::aligned_alloc(64, needed));
      size = data == nullptr ? 0 : needed;
      if (data == nullptr) std::abort();
    }
    return reinterpret_cast<float*>(data);
  }
};

// A weight [rows, columns] in groups: scale * (code - zero). One bit with `sign` instead of scales
// is sign * (2 * code - 1).
struct Packed {
  const uint8_t* codes;
  const uint16_t* scales; // fp16 [rows, G]
  const uint8_t* zeros;   // packed like codes [rows, G]
  int64_t rows, columns, bits, group;
  float sign;
  int64_t groups() const { return (columns + group - 1) / group; }
  int64_t bytes() const { return (rows * columns * bits + 7) / 8; }
  int64_t zero_bytes() const { return (rows * groups() * bits + 7) / 8; }
};

struct Dense { // [rows, columns] in fp32, bf16 or fp16
  const void* values;
  int64_t rows, columns, dtype;
};

struct Codebook {
  const uint8_t* codes;
  const void* entries; // [K, d]
  const uint16_t* scales; // fp16 [out] or null
  int64_t in, out, bits, K, d, dtype;
  int64_t J() const { return (out + d - 1) / d; }
  int64_t bytes() const { return (in * J() * bits + 7) / 8; }
};

// Triplets of one precision: V [rank, in], U [rank, out], sigma [rank].
struct Triplets {
  Packed V, U;
  const float* sigma;
};

// Rows of x that share a delta: rows[first .. first + count) of a list.
struct Tenant {
  int64_t first_group, num_groups, first_row, num_rows;
};

INLINE float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u)
    bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
  else if (rest >= 0x400u)
    bits = sign | ((rest << 13) + 0x38000000u);
  else {
    const float value = static_cast<float>(rest) * 5.9604644775390625e-8f; // 2^-24
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

INLINE uint16_t to_half(float value) { // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return sign | 0x7e00u;
  if (rest >= 0x477ff000u) return sign | 0x7c00u;
  if (rest < 0x38800000u) { // subnormal: the sum's last bit is 2^-24
    float magnitude, half = 0.5f;
    std::memcpy(&magnitude, &rest, 4);
    const float sum = magnitude + half;
    uint32_t found;
    std::memcpy(&found, &sum, 4);
    return sign | (found - 0x3f000000u);
  }
  return sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13);
}

INLINE uint16_t to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

// `bits` bits of a stream from position `at`, of which no byte after `size` is read.
INLINE uint32_t code_at(const uint8_t* stream, int64_t at, int64_t bits, int64_t size) {
  uint32_t window = 0;
  const int64_t first = at >> 3, last = first + 4 < size ? first + 4 : size;
  for (int64_t byte = first; byte < last; byte++) window |= uint32_t(stream[byte]) << (8 * (byte - first));
  return (window >> (at & 7)) & ((1u << bits) - 1u);
}

} // namespace

#define LEVEL 0
#define SPACE plain
#include "products.cpp"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define LEVEL 1
#define SPACE avx2
#include "products.cpp"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")
#endif
#define LEVEL 2
#define SPACE avx512
#include "products.cpp"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

struct Products {
  void (*packed)(const Packed&, const void*, int64_t, int64_t, void*);
  void (*dense)(const Dense*, int64_t, const void*, int64_t, int64_t, void*);
  void (*codebook)(const Codebook&, const void*, int64_t, int64_t, void*);
  void (*delta)(const Triplets*, const Tenant*, int64_t, const int64_t*, int64_t, const void*,
                const void*, int64_t, void*);
  void (*write_packed)(const Packed&, int64_t, void*);
  void (*write_codebook)(const Codebook&, int64_t, void*);
};

#define PRODUCTS(space)                                                                           \
  {space::packed_product, space::dense_products, space::codebook_product, space::delta_product,   \
   space::write_packed, space::write_codebook}
const Products LEVELS[] = {
    PRODUCTS(plain),
#if defined(__x86_64__)
    PRODUCTS(avx2), PRODUCTS(avx512),
#endif
};
const Products* use = &LEVELS[0];

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vbmi"))
      return 2;
    return 1;
  }
#endif
  return 0;
}

} // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

EXPORT int llmpress_version() { return 1; }

// Returns the level in use: that asked for, or the best one here where it is higher or negative.
EXPORT int llmpress_start(void* torch_parallel_for, int level) {
  std::memcpy(&parallel_for, &torch_parallel_for, sizeof parallel_for);
  const int best = best_level(), taken = level < 0 || level > best ? best : level;
  use = &LEVELS[taken];
  return taken;
}

EXPORT void llmpress_packed(void* y, const void* x, int64_t dtype, int64_t M, const uint8_t* codes,
                            const uint16_t* scales, const uint8_t* zeros, int64_t rows,
                            int64_t columns, int64_t bits, int64_t group, float sign) {
  use->packed({codes, scales, zeros, rows, columns, bits, group, sign}, x, dtype, M, y);
}

EXPORT void llmpress_write_packed(void* weight, int64_t dtype, const uint8_t* codes,
                                  const uint16_t* scales, const uint8_t* zeros, int64_t rows,
                                  int64_t columns, int64_t bits, int64_t group, float sign) {
  use->write_packed({codes, scales, zeros, rows, columns, bits, group, sign}, dtype, weight);
}

EXPORT void llmpress_dense(void* y, const void* x, int64_t dtype, int64_t M, const void* weight,
                           int64_t rows, int64_t columns, int64_t stored) {
  const Dense w{weight, rows, columns, stored};
  use->dense(&w, 1, x, dtype, M, y);
}

// y = (x Bᵀ) Aᵀ with A [out, rank], B [rank, in].
EXPORT void llmpress_low_rank(void* y, const void* x, int64_t dtype, int64_t M, const void* A,
                              const void* B, int64_t out, int64_t rank, int64_t in, int64_t stored) {
  const Dense w[2] = {{B, rank, in, stored}, {A, out, rank, stored}};
  use->dense(w, 2, x, dtype, M, y);
}

EXPORT void llmpress_codebook(void* y, const void* x, int64_t dtype, int64_t M,
                              const uint8_t* codes, const void* entries, const uint16_t* scales,
                              int64_t in, int64_t out, int64_t bits, int64_t K, int64_t d,
                              int64_t stored) {
  use->codebook({codes, entries, scales, in, out, bits, K, d, stored}, x, dtype, M, y);
}

EXPORT void llmpress_write_codebook(void* weight, int64_t dtype, const uint8_t* codes,
                                    const void* entries, const uint16_t* scales, int64_t in,
                                    int64_t out, int64_t bits, int64_t K, int64_t d,
                                    int64_t stored) {
  use->write_codebook({codes, entries, scales, in, out, bits, K, d, stored}, dtype, weight);
}

EXPORT void llmpress_delta(void* out, const void* x, const void* y, int64_t dtype, int64_t rows,
                           const Triplets* groups, const Tenant* tenants, int64_t num_tenants,
                           const int64_t* row_numbers) {
  use->delta(groups, tenants, num_tenants, row_numbers, rows, x, y, dtype, out);
}
}

#else // LEVEL

namespace {
namespace SPACE {

#if LEVEL == 2
constexpr int VL = 16;
#elif LEVEL == 1
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vf_loose __attribute__((vector_size(4 * VL), aligned(4), may_alias));

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_loose*>(p); }
INLINE void store(float* p, vf v) { *reinterpret_cast<vf_loose*>(p) = v; }
INLINE vf splat(float value) { return vf{} + value; }
INLINE vi lanes() {
  vi v{};
  for (int k = 0; k < VL; k++) v[k] = k;
  return v;
}
INLINE vf first_lanes(vf v, int64_t count) { // the others are zero
  const vi keep = lanes() < int32_t(count);
  return (vf)((vi)v & keep);
}

// Values of a dtype, VL of them.
template <int D> inline __attribute__((always_inline)) vf load_as(const void* base, int64_t at);
template <> inline __attribute__((always_inline)) vf load_as<F32>(const void* base, int64_t at) {
  return load(static_cast<const float*>(base) + at);
}
#if LEVEL == 2
template <> inline __attribute__((always_inline)) vf load_as<BF16>(const void* base, int64_t at) {
  const __m256i raw = _mm256_loadu_si256((const __m256i*)((const uint16_t*)base + at));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
}
template <> inline __attribute__((always_inline)) vf load_as<F16>(const void* base, int64_t at) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)base + at)));
}
template <> inline __attribute__((always_inline)) vf load_as<I8>(const void* base, int64_t at) {
  const __m128i raw = _mm_loadu_si128((const __m128i*)((const int8_t*)base + at));
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
}
#elif LEVEL == 1
template <> inline __attribute__((always_inline)) vf load_as<BF16>(const void* base, int64_t at) {
  const __m128i raw = _mm_loadu_si128((const __m128i*)((const uint16_t*)base + at));
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
}
template <> inline __attribute__((always_inline)) vf load_as<F16>(const void* base, int64_t at) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)base + at)));
}
template <> inline __attribute__((always_inline)) vf load_as<I8>(const void* base, int64_t at) {
  const __m128i raw = _mm_loadl_epi64((const __m128i*)((const int8_t*)base + at));
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
}
#else
template <> inline __attribute__((always_inline)) vf load_as<BF16>(const void* base, int64_t at) {
  vi v{};
  for (int k = 0; k < VL; k++) v[k] = int32_t(uint32_t(((const uint16_t*)base)[at + k]) << 16);
  return (vf)v;
}
template <> inline __attribute__((always_inline)) vf load_as<F16>(const void* base, int64_t at) {
  vf v{};
  for (int k = 0; k < VL; k++) v[k] = from_half(((const uint16_t*)base)[at + k]);
  return v;
}
template <> inline __attribute__((always_inline)) vf load_as<I8>(const void* base, int64_t at) {
  vf v{};
  for (int k = 0; k < VL; k++) v[k] = ((const int8_t*)base)[at + k];
  return v;
}
#endif

INLINE float value_of(const void* base, int64_t at, int64_t dtype) {
  if (dtype == F32) return ((const float*)base)[at];
  if (dtype == I8) return ((const int8_t*)base)[at];
  const uint16_t raw = ((const uint16_t*)base)[at];
  if (dtype == F16) return from_half(raw);
  const uint32_t bits = uint32_t(raw) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <int D> static void widen(const void* from, int64_t at, int64_t count, float* to) {
  int64_t k = 0;
  for (; k + VL <= count; k += VL) store(to + k, load_as<D>(from, at + k));
  for (; k < count; k++) to[k] = value_of(from, at + k, D);
}
static void widen(int64_t dtype, const void* from, int64_t at, int64_t count, float* to) {
  if (dtype == F32) widen<F32>(from, at, count, to);
  else if (dtype == BF16) widen<BF16>(from, at, count, to);
  else if (dtype == F16) widen<F16>(from, at, count, to);
  else widen<I8>(from, at, count, to);
}

static void narrow(const float* from, int64_t count, int64_t dtype, void* to, int64_t at) {
  if (dtype == F32) {
    std::memcpy((float*)to + at, from, count * 4);
    return;
  }
  uint16_t* target = (uint16_t*)to + at;
  int64_t k = 0;
  if (dtype == BF16) {
    for (; k < count; k++) target[k] = to_bfloat(from[k]);
    return;
  }
#if LEVEL >= 1
  for (; k + 8 <= count; k += 8)
    _mm_storeu_si128((__m128i*)(target + k), _mm256_cvtps_ph(_mm256_loadu_ps(from + k), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; k < count; k++) target[k] = to_half(from[k]);
}

// The sums over the lanes of four vectors.
INLINE void sums(const vf* v, float* to) {
#if LEVEL >= 1
#if LEVEL == 2
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 a = (__m256)v[0], b = (__m256)v[1], c = (__m256)v[2], d = (__m256)v[3];
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int n = 0; n < 4; n++) to[n] = (v[n][0] + v[n][2]) + (v[n][1] + v[n][3]);
#endif
}

// Where the bytes and the first bit of each of VL codes are, for a stream position modulo 8.
struct Window {
#if LEVEL >= 1
  vi bytes, shift;
#endif
};
struct Windows {
  Window at[8];
  vi mask;
  int bits;
  explicit Windows(int64_t num_bits) : bits(int(num_bits)) {
    mask = vi{} + int32_t((1u << num_bits) - 1u);
#if LEVEL >= 1
    for (int phase = 0; phase < 8; phase++)
      for (int lane = 0; lane < VL; lane++) {
        const int bit = phase + (num_bits > 8 ? lane % 8 : lane) * bits, byte = bit >> 3;
        for (int k = 0; k < 4; k++)
          ((uint8_t*)&at[phase].bytes)[4 * lane + k] = byte + k < 16 ? uint8_t(byte + k) : 0x80;
        at[phase].shift[lane] = bit & 7;
      }
#endif
  }
};

// Those of every width, made once.
static const Windows& windows_of(int64_t bits) {
  static const Windows all[] = {Windows(0), Windows(1), Windows(2), Windows(3), Windows(4), Windows(5),
                                Windows(6), Windows(7), Windows(8), Windows(9), Windows(10), Windows(11),
                                Windows(12), Windows(13), Windows(14), Windows(15), Windows(16)};
  return all[bits];
}

// VL codes from bit `at`; 16 bytes are read from its byte. Bits above a code's own are left as they
// are, but for LEVEL 0. For up to 8 bits, at LEVEL 1 for up to 16.
INLINE vi raw_codes(const uint8_t* stream, int64_t at, const Window& window, int bits) {
  const uint8_t* p = stream + (at >> 3);
#if LEVEL == 2
  (void)bits;
  const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  return (vi)_mm512_srlv_epi32(_mm512_shuffle_epi8(all, (__m512i)window.bytes), (__m512i)window.shift);
#elif LEVEL == 1
  (void)bits;
  const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return (vi)_mm256_srlv_epi32(_mm256_shuffle_epi8(all, (__m256i)window.bytes), (__m256i)window.shift);
#else
  (void)window;
  (void)p;
  vi v{};
  for (int k = 0; k < VL; k++) {
    uint32_t word;
    const int64_t bit = at + k * bits;
    std::memcpy(&word, stream + (bit >> 3), 4);
    v[k] = int32_t((word >> (bit & 7)) & ((1u << bits) - 1u));
  }
  return v;
#endif
}

constexpr int LOOKED_UP = LEVEL == 2 ? 4 : LEVEL == 1 ? 3 : 0; // bits that a table in a register covers

// scale * (code - zero) of one group, of VL codes.
template <bool TABLE> struct Group {
  vf first, second; // the table; or zero and scale
  inline __attribute__((always_inline)) void set(float scale, float zero, int bits) {
    if (TABLE) {
      const vf code = __builtin_convertvector(lanes() & int32_t((1 << bits) - 1), vf);
      first = (code - zero) * scale;
    } else {
      first = splat(zero);
      second = splat(scale);
    }
  }
  inline __attribute__((always_inline)) vf weights(vi raw, vi mask) const {
    if (TABLE) {
#if LEVEL == 2
      return (vf)_mm512_permutexvar_ps((__m512i)raw, (__m512)first);
#elif LEVEL == 1
      return (vf)_mm256_permutevar8x32_ps((__m256)first, (__m256i)raw);
#endif
    }
    return (__builtin_convertvector(raw & mask, vf) - first) * second;
  }
};

// A row's stream that may be read 16 bytes past its end: a copy where it is the last of all.
struct Tail {
  Scratch scratch;
  const uint8_t* readable(const uint8_t* p, const uint8_t* end, int64_t count) {
    if (p + count + 16 <= end) return p;
    uint8_t* memory = (uint8_t*)scratch.floats(count / 4 + 17);
    const int64_t here = end - p < count ? end - p : count;
    std::memset(memory, 0, count + 64);
    std::memcpy(memory, p, here);
    return memory;
  }
};

// Scales and zero points of up to VL groups of a row.
INLINE void group_values(const Packed& w, const Windows& windows, int64_t row, int64_t group, int64_t count, float* scales, float* zeros) {
  if (w.scales == nullptr) {
    scales[0] = 2 * w.sign;
    zeros[0] = 0.5f;
    return;
  }
  const int64_t all = w.groups(), at = row * all + group;
  if (at + VL <= w.rows * all && ((at * w.bits) >> 3) + 16 <= w.zero_bytes()) {
    store(scales, load_as<F16>(w.scales, at));
    const vi raw = raw_codes(w.zeros, at * w.bits, windows.at[(at * w.bits) & 7], windows.bits);
    store(zeros, __builtin_convertvector(raw & windows.mask, vf));
    return;
  }
  for (int64_t g = 0; g < count; g++) {
    scales[g] = from_half(w.scales[at + g]);
    zeros[g] = float(code_at(w.zeros, (at + g) * w.bits, w.bits, w.zero_bytes()));
  }
}

// y[m, 0 .. R) = the products of M rows of x with R rows of a packed weight.
template <int M, int R, bool TABLE>
static void packed_rows(const Packed& w, const Windows& windows, const float* x, int64_t ldx, int64_t row, float* y, int64_t ldy, Tail* tails) {
  vf acc[M][R];
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) acc[m][r] = vf{};
  const int bits = windows.bits;
  const int64_t row_bits = w.columns * bits, phase = (row * row_bits) & 7; // 0 for all where R > 1
  const uint8_t *end = w.codes + w.bytes(), *stream[R];
  for (int r = 0; r < R; r++)
    stream[r] = tails[r].readable(w.codes + (((row + r) * row_bits) >> 3), end, (phase + row_bits + 7) >> 3);
  const vi mask = windows.mask;
  const int64_t groups = w.groups();
  alignas(64) float scales[R][VL], zeros[R][VL];
  for (int64_t g = 0; g < groups; g++) {
    if (g % VL == 0)
      for (int r = 0; r < R; r++)
        group_values(w, windows, row + r, g, groups - g < VL ? groups - g : VL, scales[r], zeros[r]);
    Group<TABLE> group[R];
    for (int r = 0; r < R; r++) group[r].set(scales[r][g % VL], zeros[r][g % VL], bits);
    const int64_t begin = g * w.group, stop = begin + w.group < w.columns ? begin + w.group : w.columns;
    const Window& window = windows.at[(phase + begin * bits) & 7];
    const bool steady = (VL * bits) % 8 == 0;
    int64_t i = begin;
    for (; i + VL <= stop; i += VL) {
      const int64_t at = phase + i * bits;
      for (int r = 0; r < R; r++) {
        const vf weight = group[r].weights(raw_codes(stream[r], at, steady ? window : windows.at[at & 7], bits), mask);
        for (int m = 0; m < M; m++) acc[m][r] += weight * load(x + m * ldx + i);
      }
    }
    if (i < stop) {
      const int64_t at = phase + i * bits;
      for (int r = 0; r < R; r++) {
        const vf weight = first_lanes(group[r].weights(raw_codes(stream[r], at, windows.at[at & 7], bits), mask), stop - i);
        for (int m = 0; m < M; m++) acc[m][r] += weight * load(x + m * ldx + i);
      }
    }
  }
  for (int m = 0; m < M; m++) {
    vf four[4] = {};
    float found[4];
    for (int r = 0; r < R; r++) four[r] = acc[m][r];
    sums(four, found);
    for (int r = 0; r < R; r++) y[m * ldy + r] = found[r];
  }
}

template <int M, int R, int D>
static void dense_rows(const Dense& w, const float* x, int64_t ldx, int64_t row, float* y, int64_t ldy) {
  vf acc[M][R];
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) acc[m][r] = vf{};
  int64_t i = 0;
  for (; i + VL <= w.columns; i += VL)
    for (int r = 0; r < R; r++) {
      const vf weight = load_as<D>(w.values, (row + r) * w.columns + i);
      for (int m = 0; m < M; m++) acc[m][r] += weight * load(x + m * ldx + i);
    }
  if (i < w.columns)
    for (int r = 0; r < R; r++) {
      alignas(64) float rest[VL] = {};
      for (int64_t k = i; k < w.columns; k++) rest[k - i] = value_of(w.values, (row + r) * w.columns + k, D);
      for (int m = 0; m < M; m++) acc[m][r] += load(rest) * load(x + m * ldx + i);
    }
  for (int m = 0; m < M; m++) {
    vf four[4] = {};
    float found[4];
    for (int r = 0; r < R; r++) four[r] = acc[m][r];
    sums(four, found);
    for (int r = 0; r < R; r++) y[m * ldy + r] = found[r];
  }
}

// R rows of a weight at once, so that sums do not wait for each other.
template <int M> constexpr int rows_at_once() { return LEVEL == 2 ? (M <= 4 ? 4 : 2) : (M == 1 ? 4 : M == 2 ? 2 : 1); }

template <int M, bool TABLE>
static void packed_range(const Packed& w, const Windows& windows, const float* x, int64_t ldx, int64_t begin, int64_t end, float* y, int64_t ldy) {
  constexpr int R = rows_at_once<M>();
  Tail tails[R];
  int64_t row = begin;
  if (w.columns * w.bits % 8 == 0)
    for (; row + R <= end; row += R)
      packed_rows<M, R, TABLE>(w, windows, x, ldx, row, y + row, ldy, tails);
  for (; row < end; row++) packed_rows<M, 1, TABLE>(w, windows, x, ldx, row, y + row, ldy, tails);
}

template <int M, int D>
static void dense_range(const Dense& w, const float* x, int64_t ldx, int64_t begin, int64_t end, float* y, int64_t ldy) {
  constexpr int R = rows_at_once<M>();
  int64_t row = begin;
  for (; row + R <= end; row += R) dense_rows<M, R, D>(w, x, ldx, row, y + row, ldy);
  for (; row < end; row++) dense_rows<M, 1, D>(w, x, ldx, row, y + row, ldy);
}

// As many rows of x as are unpacked for together: 1, 2, 4 or 8; those beyond M are zeros.
INLINE int64_t padded_rows(int64_t M) { return M <= 1 ? 1 : M <= 2 ? 2 : M <= 4 ? 4 : 8; }

static void some_packed_rows(const Packed& w, const Windows& windows, int64_t M, const float* x, int64_t ldx, int64_t begin, int64_t end, float* y, int64_t ldy) {
  if (w.bits <= LOOKED_UP) {
    if (M == 1) packed_range<1, true>(w, windows, x, ldx, begin, end, y, ldy);
    else if (M == 2) packed_range<2, true>(w, windows, x, ldx, begin, end, y, ldy);
    else if (M <= 4) packed_range<4, true>(w, windows, x, ldx, begin, end, y, ldy);
    else packed_range<8, true>(w, windows, x, ldx, begin, end, y, ldy);
  } else {
    if (M == 1) packed_range<1, false>(w, windows, x, ldx, begin, end, y, ldy);
    else if (M == 2) packed_range<2, false>(w, windows, x, ldx, begin, end, y, ldy);
    else if (M <= 4) packed_range<4, false>(w, windows, x, ldx, begin, end, y, ldy);
    else packed_range<8, false>(w, windows, x, ldx, begin, end, y, ldy);
  }
}

template <int D>
static void some_dense_rows(const Dense& w, int64_t M, const float* x, int64_t ldx, int64_t begin, int64_t end, float* y, int64_t ldy) {
  if (M == 1) dense_range<1, D>(w, x, ldx, begin, end, y, ldy);
  else if (M == 2) dense_range<2, D>(w, x, ldx, begin, end, y, ldy);
  else if (M <= 4) dense_range<4, D>(w, x, ldx, begin, end, y, ldy);
  else dense_range<8, D>(w, x, ldx, begin, end, y, ldy);
}

INLINE int64_t padded(int64_t count) { return (count + 15) / 16 * 16 + 16; }

// x as fp32 rows that may be read VL past their end, and rows of zeros up to `padded_rows`.
static void widen_rows(int64_t dtype, const void* x, int64_t M, int64_t columns, float* to, int64_t ld) {
  const int64_t whole = M / MOST_ROWS * MOST_ROWS, all = whole + (M > whole ? padded_rows(M - whole) : 0);
  for (int64_t m = 0; m < all; m++) {
    if (m < M) widen(dtype, x, m * columns, columns, to + m * ld);
    const int64_t from = m < M ? columns : 0;
    std::memset(to + m * ld + from, 0, (ld - from) * sizeof(float));
  }
}

struct PackedJob {
  const Packed& w;
  const Windows& windows;
  const float* x;
  float* sum;
  int64_t ldx, ldy, M, dtype;
  void* y;
};

static void packed_task(int64_t begin, int64_t end, void* context) {
  const PackedJob& job = *(const PackedJob*)context;
  for (int64_t m = 0; m < job.M; m += MOST_ROWS) {
    const int64_t here = job.M - m < MOST_ROWS ? job.M - m : MOST_ROWS;
    some_packed_rows(job.w, job.windows, here, job.x + m * job.ldx, job.ldx, begin, end, job.sum + m * job.ldy, job.ldy);
  }
  for (int64_t m = 0; m < job.M; m++)
    narrow(job.sum + m * job.ldy + begin, end - begin, job.dtype, job.y, m * job.w.rows + begin);
}

static void packed_product(const Packed& w, const void* x, int64_t dtype, int64_t M, void* y) {
  static thread_local Scratch scratch;
  const int64_t ldx = padded(w.columns), ldy = padded(w.rows), rows = M + MOST_ROWS;
  float* memory = scratch.floats(rows * (ldx + ldy));
  widen_rows(dtype, x, M, w.columns, memory, ldx);
  const Windows& windows = windows_of(w.bits);
  PackedJob job{w, windows, memory, memory + rows * ldx, ldx, ldy, M, dtype, y};
  in_parallel(w.rows, w.columns * M, packed_task, &job);
}

struct DenseJob {
  const Dense& w;
  const float* x;
  float* sum;
  int64_t ldx, ldy, M, dtype;
  void* y; // null to leave the sums in fp32
};

static void dense_task(int64_t begin, int64_t end, void* context) {
  const DenseJob& job = *(const DenseJob*)context;
  for (int64_t m = 0; m < job.M; m += MOST_ROWS) {
    const int64_t here = job.M - m < MOST_ROWS ? job.M - m : MOST_ROWS;
    const float* x = job.x + m * job.ldx;
    float* sum = job.sum + m * job.ldy;
    if (job.w.dtype == F32) some_dense_rows<F32>(job.w, here, x, job.ldx, begin, end, sum, job.ldy);
    else if (job.w.dtype == BF16) some_dense_rows<BF16>(job.w, here, x, job.ldx, begin, end, sum, job.ldy);
    else some_dense_rows<F16>(job.w, here, x, job.ldx, begin, end, sum, job.ldy);
  }
  if (job.y != nullptr)
    for (int64_t m = 0; m < job.M; m++)
      narrow(job.sum + m * job.ldy + begin, end - begin, job.dtype, job.y, m * job.w.rows + begin);
}

// x by several weights in turn; what is between stays in fp32.
static void dense_products(const Dense* w, int64_t count, const void* x, int64_t dtype, int64_t M, void* y) {
  static thread_local Scratch scratch;
  const int64_t rows = M + MOST_ROWS;
  int64_t widest = w[0].columns;
  for (int64_t n = 0; n < count; n++) widest = w[n].rows > widest ? w[n].rows : widest;
  const int64_t ld = padded(widest);
  float* from = scratch.floats(2 * rows * ld);
  float* to = from + rows * ld;
  widen_rows(dtype, x, M, w[0].columns, from, ld);
  for (int64_t n = 0; n < count; n++) {
    for (int64_t m = 0; m < rows; m++) std::memset(to + m * ld + (m < M ? w[n].rows : 0), 0, (ld - (m < M ? w[n].rows : 0)) * sizeof(float));
    DenseJob job{w[n], from, to, ld, ld, M, dtype, n + 1 == count ? y : nullptr};
    in_parallel(w[n].rows, w[n].columns * M, dense_task, &job);
    float* other = from;
    from = to;
    to = other;
  }
}

// ---- codebooks: entries of d consecutive outputs; lanes are outputs -----------------------------

constexpr int64_t CHUNK_BYTES = 16384;

// Copies the entries of 16 codes one after the other; each copy may write beyond its entry.
template <int WIDTH> INLINE uint8_t* copy_entries(const uint32_t* index, const uint8_t* entries, const uint8_t* last, uint32_t top, int64_t size, uint8_t* to) {
  for (int k = 0; k < 16; k++) {
    const uint8_t* from = index[k] == top ? last : entries + int64_t(index[k]) * size;
    if (WIDTH > 0) std::memcpy(to, from, WIDTH);
    else std::memcpy(to, from, size);
    to += size;
  }
  return to;
}

// 16 codes from bit `at`, none above `top`; what is behind `end` reads as code 0.
struct Codes16 {
  uint8_t copy[64];
  const uint8_t* p;
  int64_t bit;
  inline __attribute__((always_inline)) Codes16(const uint8_t* stream, int64_t at, const uint8_t* end) : p(stream + (at >> 3)), bit(at & 7) {
    if (p + 48 > end) {
      std::memset(copy, 0, sizeof copy);
      if (p < end) std::memcpy(copy, p, end - p < 48 ? end - p : 48);
      p = copy;
    }
  }
#if LEVEL >= 1
  inline __attribute__((always_inline)) __m256i half(int number, const Windows& windows, uint32_t top) const {
    const int64_t at = bit + 8 * number * windows.bits;
    const Window& window = windows.at[at & 7];
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(p + (at >> 3))));
    const __m256i bytes = *(const __m256i*)&window.bytes, shift = *(const __m256i*)&window.shift;
    const __m256i mask = _mm256_set1_epi32(int32_t((1u << windows.bits) - 1u));
    const __m256i raw = _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(all, bytes), shift), mask);
    return _mm256_min_epu32(raw, _mm256_set1_epi32(int32_t(top)));
  }
  inline __attribute__((always_inline)) void to(uint32_t* index, const Windows& windows, uint32_t top) const {
    _mm256_store_si256((__m256i*)index, half(0, windows, top));
    _mm256_store_si256((__m256i*)(index + 8), half(1, windows, top));
  }
#else
  inline __attribute__((always_inline)) void to(uint32_t* index, const Windows& windows, uint32_t top) const {
    for (int k = 0; k < 16; k++) {
      uint32_t word;
      const int64_t at = bit + k * windows.bits;
      std::memcpy(&word, p + (at >> 3), 4);
      const uint32_t code = (word >> (at & 7)) & ((1u << windows.bits) - 1u);
      index[k] = code < top ? code : top;
    }
  }
#endif
};

struct CodebookJob {
  const Codebook& w;
  const Windows& windows;
  const float* x;  // [M, in]
  float* sum;      // [M, tiles * T]
  int64_t ldx, ldy, M, dtype, tile; // codes of a tile, a multiple of 16
  const uint8_t* last;
  const uint8_t* planes; // the t-th values of all entries, int8 [d, a power of two]; or null
  int64_t plane;
  const void* split;
  void* y;
};

INLINE int64_t size_of(int64_t dtype) { return dtype == F32 ? 4 : dtype == I8 ? 1 : 2; }

template <int WIDTH>
static void gather_block(const CodebookJob& job, int64_t tile, int64_t i0, int64_t count, uint8_t* block, int64_t stride) {
  const Codebook& w = job.w;
  const int64_t J = w.J(), size = w.d * size_of(w.dtype);
  const uint8_t *end = w.codes + w.bytes(), *entries = (const uint8_t*)w.entries;
  alignas(64) uint32_t index[16];
  for (int64_t i = 0; i < count; i++) {
    uint8_t* to = block + i * stride;
    const int64_t at = ((i0 + i) * J + tile * job.tile) * w.bits;
    for (int64_t c = 0; c < job.tile; c += 16) {
      Codes16(w.codes, at + c * w.bits, end).to(index, job.windows, uint32_t(w.K - 1));
      to = copy_entries<WIDTH>(index, entries, job.last, uint32_t(w.K - 1), size, to);
    }
  }
}

static void gather(const CodebookJob& job, int64_t tile, int64_t i0, int64_t count, uint8_t* block, int64_t stride) {
  const int64_t size = job.w.d * size_of(job.w.dtype);
  if (size == 1) gather_block<1>(job, tile, i0, count, block, stride);
  else if (size == 2) gather_block<2>(job, tile, i0, count, block, stride);
  else if (size <= 4) gather_block<4>(job, tile, i0, count, block, stride);
  else if (size <= 8) gather_block<8>(job, tile, i0, count, block, stride);
  else if (size <= 16) gather_block<16>(job, tile, i0, count, block, stride);
  else if (size <= 32) gather_block<32>(job, tile, i0, count, block, stride);
  else gather_block<0>(job, tile, i0, count, block, stride);
}

// Where the weights of a tile lie in a block: vectors of VL outputs, of one input after the other.
// Vectors are `step` bytes apart, but every `parts` vectors a plane begins.
struct Block {
  const uint8_t* bytes;
  int64_t count, stride, step, parts, plane;
  const uint8_t* vector(int64_t v) const { return bytes + v / parts * plane + v % parts * step; }
};

template <int M, int Q, int D>
static void add_block(const Block& block, int64_t v, const float* x, int64_t ldx, float* sum, int64_t ldy) {
  vf acc[M][Q];
  const uint8_t* from[Q];
  sum += v * VL;
  for (int q = 0; q < Q; q++) {
    from[q] = block.vector(v + q);
    for (int m = 0; m < M; m++) acc[m][q] = load(sum + m * ldy + q * VL);
  }
  for (int64_t i = 0; i < block.count; i++)
    for (int q = 0; q < Q; q++) {
      const vf weight = load_as<D>(from[q] + i * block.stride, 0);
      for (int m = 0; m < M; m++) acc[m][q] += weight * x[m * ldx + i];
    }
  for (int m = 0; m < M; m++)
    for (int q = 0; q < Q; q++) store(sum + m * ldy + q * VL, acc[m][q]);
}

template <int M, int D>
static void add_tile(const Block& block, int64_t vectors, const float* x, int64_t ldx, float* sum, int64_t ldy) {
  constexpr int Q = M == 1 ? 4 : M <= 4 ? (LEVEL == 2 ? 4 : 2) : (LEVEL == 2 ? 2 : 1);
  int64_t v = 0;
  for (; v + Q <= vectors; v += Q) add_block<M, Q, D>(block, v, x, ldx, sum, ldy);
  if (Q > 3 && vectors - v == 3) add_block<M, (Q > 3 ? 3 : 1), D>(block, v, x, ldx, sum, ldy), v += 3;
  if (Q > 2 && vectors - v == 2) add_block<M, (Q > 2 ? 2 : 1), D>(block, v, x, ldx, sum, ldy), v += 2;
  for (; v < vectors; v++) add_block<M, 1, D>(block, v, x, ldx, sum, ldy);
}

template <int M>
static void add_tile_of(int64_t dtype, const Block& block, int64_t vectors, const float* x, int64_t ldx, float* sum, int64_t ldy) {
  if (dtype == I8) add_tile<M, I8>(block, vectors, x, ldx, sum, ldy);
  else if (dtype == F16) add_tile<M, F16>(block, vectors, x, ldx, sum, ldy);
  else if (dtype == BF16) add_tile<M, BF16>(block, vectors, x, ldx, sum, ldy);
  else add_tile<M, F32>(block, vectors, x, ldx, sum, ldy);
}

// Inputs that are unpacked at once, and the bytes of one of them in a block.
INLINE int64_t block_stride(const CodebookJob& job) { return job.tile * job.w.d * size_of(job.w.dtype); }
INLINE int64_t block_inputs(const CodebookJob& job) {
  const int64_t fit = CHUNK_BYTES / block_stride(job);
  return fit < 1 ? 1 : fit > 64 ? 64 : fit;
}

#if LEVEL == 2
constexpr int64_t MOST_LOOKED_UP = 4096; // entries of int8 whose values are looked up by shuffles

// Two times 64 codes' values from a table of 128 << N; `bit` are the codes' bits from 7 on.
struct Two {
  __m512i first, second;
};
template <int N> struct LookedUp {
  static inline __attribute__((always_inline)) Two in(const uint8_t* table, const Two& low, const __mmask64 (*bit)[2]) {
    const Two lower = LookedUp<N - 1>::in(table, low, bit), upper = LookedUp<N - 1>::in(table + (64 << N), low, bit);
    return {_mm512_mask_blend_epi8(bit[N - 1][0], lower.first, upper.first),
            _mm512_mask_blend_epi8(bit[N - 1][1], lower.second, upper.second)};
  }
};
template <> struct LookedUp<0> {
  static inline __attribute__((always_inline)) Two in(const uint8_t* table, const Two& low, const __mmask64 (*)[2]) {
    const __m512i lower = _mm512_loadu_si512(table), upper = _mm512_loadu_si512(table + 64);
    return {_mm512_permutex2var_epi8(lower, low.first, upper), _mm512_permutex2var_epi8(lower, low.second, upper)};
  }
};

template <int N>
static void look_up(const CodebookJob& job, const uint8_t* low, const uint8_t* high, int64_t count, uint8_t* block) {
  for (int64_t n = 0; n < count; n += 128) {
    const Two codes{_mm512_load_si512(low + n), _mm512_load_si512(low + n + 64)};
    __mmask64 bit[N + 1][2];
    for (int k = 0; k < N; k++) {
      bit[k][0] = _mm512_test_epi8_mask(_mm512_load_si512(high + n), _mm512_set1_epi8(1 << k));
      bit[k][1] = _mm512_test_epi8_mask(_mm512_load_si512(high + n + 64), _mm512_set1_epi8(1 << k));
    }
    for (int64_t t = 0; t < job.w.d; t++) {
      const Two values = LookedUp<N>::in(job.planes + t * job.plane, codes, bit);
      _mm512_store_si512(block + t * count + n, values.first);
      _mm512_store_si512(block + t * count + n + 64, values.second);
    }
  }
}

// How 16 codes of up to 12 bits become 16 bytes of bits 0 to 7 and 16 of bits 7 to 14 (those above
// a code's own are the next one's), for a stream position modulo 8: 4 codes in each 64 bits.
struct Split {
  __m256i bytes[8], bits[8];
  explicit Split(int64_t width) {
    for (int phase = 0; phase < 8; phase++)
      for (int word = 0; word < 4; word++)
        for (int k = 0; k < 8; k++) {
          const int64_t first = phase + 4 * word * width;
          ((uint8_t*)&bytes[phase])[8 * word + k] = uint8_t((first >> 3) + k);
          ((uint8_t*)&bits[phase])[8 * word + k] = uint8_t((first & 7) + k % 4 * width + (k < 4 ? 0 : 7));
        }
  }
  inline __attribute__((always_inline)) void store(const uint8_t* p, int64_t phase, uint8_t* low, uint8_t* high) const {
    const __m256i near = _mm256_permutexvar_epi8(bytes[phase], _mm256_loadu_si256((const __m256i*)p));
    const __m256i all = _mm256_multishift_epi64_epi8(bits[phase], near);
    const __m256i sorted = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    _mm_store_si128((__m128i*)low, _mm256_castsi256_si128(sorted));
    _mm_store_si128((__m128i*)high, _mm256_extracti128_si256(sorted, 1));
  }
};

// A tile's values, plane by plane: [d][count][tile], planes of a multiple of 128 bytes.
static Block look_up_tile(const CodebookJob& job, int64_t tile, int64_t i0, int64_t count, uint8_t* block) {
  const Codebook& w = job.w;
  const Split& split = *(const Split*)job.split;
  const int64_t J = w.J(), all = (count * job.tile + 127) / 128 * 128;
  alignas(64) uint8_t low[64 * 64 + 128], high[64 * 64 + 128];
  const uint8_t* end = w.codes + w.bytes();
  int64_t n = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = ((i0 + i) * J + tile * job.tile) * w.bits;
    for (int64_t c = 0; c < job.tile; c += 16, n += 16) {
      const Codes16 codes(w.codes, at + c * w.bits, end);
      split.store(codes.p, codes.bit, low + n, high + n);
    }
  }
  for (; n < all; n++) low[n] = high[n] = 0;
  if (job.plane == 128) look_up<0>(job, low, high, all, block);
  else if (job.plane == 256) look_up<1>(job, low, high, all, block);
  else if (job.plane == 512) look_up<2>(job, low, high, all, block);
  else if (job.plane == 1024) look_up<3>(job, low, high, all, block);
  else if (job.plane == 2048) look_up<4>(job, low, high, all, block);
  else look_up<5>(job, low, high, all, block);
  return {block, count, job.tile, VL, job.tile / VL, all};
}

// A table's rest repeats it, so that bits above a code's own do not count; what no entry has is the
// last one's.
template <int DIM> static void split_entries(const Codebook& w, int64_t plane, uint8_t* planes) {
  const int64_t d = DIM > 0 ? DIM : w.d, distinct = int64_t(1) << w.bits;
  const uint8_t* entries = (const uint8_t*)w.entries;
  for (int64_t t = 0; t < d; t++) {
    uint8_t* to = planes + t * plane;
    for (int64_t k = 0; k < w.K; k++) to[k] = entries[k * d + t];
    for (int64_t k = w.K; k < plane; k++) to[k] = k < distinct ? to[w.K - 1] : to[k - distinct];
  }
}

// The entries' values plane by plane, where a job is to look them up by shuffles.
static void split(CodebookJob& job, Scratch& scratch) {
  const Codebook& w = job.w;
  if (w.dtype != I8 || w.K > MOST_LOOKED_UP) return;
  int64_t plane = 128;
  while (plane < w.K) plane *= 2;
  uint8_t* planes = (uint8_t*)scratch.floats(plane * w.d / 4);
  if (w.d == 2) split_entries<2>(w, plane, planes);
  else if (w.d == 3) split_entries<3>(w, plane, planes);
  else if (w.d == 4) split_entries<4>(w, plane, planes);
  else split_entries<0>(w, plane, planes);
  job.planes = planes;
  job.plane = plane;
}
#endif

// Weights of a tile for some inputs.
static Block unpacked_tile(const CodebookJob& job, int64_t tile, int64_t i, int64_t count, uint8_t* block) {
#if LEVEL == 2
  if (job.planes != nullptr) return look_up_tile(job, tile, i, count, block);
#endif
  const int64_t stride = block_stride(job);
  gather(job, tile, i, count, block, stride);
  return {block, count, stride, VL * size_of(job.w.dtype), stride, 0};
}

// Sums of a tile in the order of outputs.
static void in_order(const CodebookJob& job, const float* sum, float* to) {
  const int64_t d = job.w.d;
  if (job.planes == nullptr) std::memcpy(to, sum, job.tile * d * sizeof(float));
  else
    for (int64_t t = 0; t < d; t++)
      for (int64_t c = 0; c < job.tile; c++) to[c * d + t] = sum[t * job.tile + c];
}

static void codebook_task(int64_t begin, int64_t end, void* context) {
  const CodebookJob& job = *(const CodebookJob*)context;
  const Codebook& w = job.w;
  const int64_t T = job.tile * w.d, most = block_inputs(job);
  static thread_local Scratch scratch, line_memory;
  uint8_t* block = (uint8_t*)scratch.floats((most * block_stride(job) + 128 * w.d + 192) / 4);
  float* line = line_memory.floats((end - begin) * T);
  for (int64_t m = 0; m < job.M; m++)
    std::memset(job.sum + m * job.ldy + begin * T, 0, (end - begin) * T * sizeof(float));
  for (int64_t i = 0; i < w.in; i += most) {
    const int64_t count = w.in - i < most ? w.in - i : most;
    for (int64_t tile = begin; tile < end; tile++) {
      const Block weights = unpacked_tile(job, tile, i, count, block);
      for (int64_t m = 0; m < job.M; m += MOST_ROWS) {
        const int64_t here = job.M - m < MOST_ROWS ? job.M - m : MOST_ROWS;
        const float* x = job.x + m * job.ldx + i;
        float* sum = job.sum + m * job.ldy + tile * T;
        if (here == 1) add_tile_of<1>(w.dtype, weights, T / VL, x, job.ldx, sum, job.ldy);
        else if (here == 2) add_tile_of<2>(w.dtype, weights, T / VL, x, job.ldx, sum, job.ldy);
        else if (here <= 4) add_tile_of<4>(w.dtype, weights, T / VL, x, job.ldx, sum, job.ldy);
        else add_tile_of<8>(w.dtype, weights, T / VL, x, job.ldx, sum, job.ldy);
      }
    }
  }
  const int64_t first = begin * T, stop = end * T < w.out ? end * T : w.out;
  for (int64_t m = 0; m < job.M; m++) {
    for (int64_t tile = begin; tile < end; tile++) in_order(job, job.sum + m * job.ldy + tile * T, line + (tile - begin) * T);
    if (w.scales != nullptr) {
      int64_t o = first;
      for (; o + VL <= stop; o += VL) store(line + o - first, load(line + o - first) * load_as<F16>(w.scales, o));
      for (; o < stop; o++) line[o - first] *= from_half(w.scales[o]);
    }
    narrow(line, stop - first, job.dtype, job.y, m * w.out + first);
  }
}

INLINE int64_t tile_codes(const Codebook& w) { return w.d == 1 ? 64 : w.d == 2 || w.J() >= 256 ? 32 : 16; }

// The last entry with room behind it, for copies that are wider than an entry.
static void copy_last(const Codebook& w, Scratch& scratch) {
  const int64_t size = w.d * size_of(w.dtype);
  std::memcpy(scratch.floats(size / 4 + 16), (const uint8_t*)w.entries + (w.K - 1) * size, size);
}

static void codebook_product(const Codebook& w, const void* x, int64_t dtype, int64_t M, void* y) {
  static thread_local Scratch scratch, last;
  const int64_t tile = tile_codes(w), tiles = (w.J() + tile - 1) / tile;
  const int64_t ldx = padded(w.in), ldy = tiles * tile * w.d, rows = M + MOST_ROWS;
  float* memory = scratch.floats(rows * (ldx + ldy));
  widen_rows(dtype, x, M, w.in, memory, ldx);
  const Windows& windows = windows_of(w.bits);
  copy_last(w, last);
  CodebookJob job{w, windows, memory, memory + rows * ldx, ldx, ldy, M, dtype, tile, (const uint8_t*)last.data, nullptr, 0, nullptr, y};
#if LEVEL == 2
  static thread_local Scratch planes;
  const Split of_codes(w.bits);
  job.split = &of_codes;
  split(job, planes);
#endif
  in_parallel(tiles, w.in * tile * w.d * M, codebook_task, &job);
}

// ---- mixed-precision triplets: y += ((x Vᵀ) * sigma) U, each row with its tenant's -----------------

struct DeltaJob {
  const Triplets* groups;
  const Tenant* tenants;
  const int64_t* row_numbers;
  const float* x;            // [rows in the order of tenants, in], padded as `widen_rows` does
  float *z, *sum;            // z [rows, rank], sum [rows, out]
  float* values;             // scales and zero points of left vectors [ranks of all tenants, 2, G]
  int64_t ldx, ldz, ldy, dtype;
  int64_t num_tenants;
  const void* y;
  void* out;
  int64_t outputs, piece;
};

// As many rows as are multiplied together where there are so many.
INLINE int64_t whole_rows(int64_t count) { return count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : 1; }

INLINE int64_t total_rank(const DeltaJob& job, const Tenant& tenant) {
  int64_t rank = 0;
  for (int64_t g = 0; g < tenant.num_groups; g++) rank += job.groups[tenant.first_group + g].V.rows;
  return rank;
}

// Scales and zero points of a left vector, as fp32.
static void left_values(const DeltaJob& job, const Packed& U, int64_t r, int64_t place) {
  const Windows& windows = windows_of(U.bits);
  const int64_t groups = U.groups();
  float* to = job.values + place * 2 * groups;
  alignas(64) float scales[VL], zeros[VL];
  for (int64_t g = 0; g < groups; g += VL) {
    const int64_t count = groups - g < VL ? groups - g : VL;
    group_values(U, windows, r, g, count, scales, zeros);
    std::memcpy(to + g, scales, count * sizeof(float));
    std::memcpy(to + groups + g, zeros, count * sizeof(float));
  }
}

// Ranks of all tenants are one range; an item is 4 of them.
static void right_task(int64_t begin, int64_t end, void* context) {
  const DeltaJob& job = *(const DeltaJob*)context;
  int64_t item = 0, before = 0;
  for (int64_t t = 0; t < job.num_tenants && item < end; t++) {
    const Tenant& tenant = job.tenants[t];
    int64_t rank = 0;
    for (int64_t g = 0; g < tenant.num_groups && item < end; g++) {
      const Triplets& group = job.groups[tenant.first_group + g];
      const int64_t ranks = group.V.rows, items = (ranks + 3) / 4;
      const int64_t from = begin > item ? begin - item : 0, to = end - item < items ? end - item : items;
      if (from < to) {
        const Windows& windows = windows_of(group.V.bits);
        const int64_t first = 4 * from, stop = 4 * to < ranks ? 4 * to : ranks;
        for (int64_t m = 0, some; m < tenant.num_rows; m += some) {
          some = whole_rows(tenant.num_rows - m);
          float* z = job.z + (tenant.first_row + m) * job.ldz + rank;
          some_packed_rows(group.V, windows, some, job.x + (tenant.first_row + m) * job.ldx, job.ldx, first, stop, z, job.ldz);
          for (int64_t k = 0; k < some; k++)
            for (int64_t r = first; r < stop; r++) z[k * job.ldz + r] *= group.sigma[r];
        }
        for (int64_t r = first; r < stop; r++) left_values(job, group.U, r, before + rank + r);
      }
      item += items;
      rank += ranks;
    }
    before += total_rank(job, tenant);
  }
}

// sum[m, o .. o + Q * VL) += z[m] U for one precision.
template <int M, int Q, bool TABLE>
static void left_block(const Packed& U, const Windows& windows, const float* values, const float* z, int64_t ldz, int64_t o, int64_t valid, float* sum, int64_t ldy, Tail& tail) {
  vf acc[M][Q];
  for (int m = 0; m < M; m++)
    for (int q = 0; q < Q; q++) acc[m][q] = load(sum + m * ldy + o + q * VL);
  const uint8_t* end = U.codes + U.bytes();
  const int bits = windows.bits;
  const int64_t groups = U.groups();
  const bool aligned = U.group % VL == 0, one = aligned && o / U.group == (o + Q * VL - 1) / U.group;
  for (int64_t r = 0; r < U.rows; r++, values += 2 * groups) {
    const int64_t at = (r * U.columns + o) * bits;
    const uint8_t* stream = tail.readable(U.codes + (at >> 3), end, (Q * VL * bits + 14) >> 3);
    Group<TABLE> group;
    if (one) group.set(values[o / U.group], values[groups + o / U.group], bits);
    for (int q = 0; q < Q; q++) {
      const int64_t bit = (at & 7) + q * VL * bits, channel = o + q * VL;
      if (q * VL >= valid) break;
      vf weight;
      const vi raw = raw_codes(stream, bit, windows.at[bit & 7], bits);
      if (aligned) {
        const int64_t number = channel / U.group;
        if (!one) group.set(values[number], values[groups + number], bits);
        weight = group.weights(raw, windows.mask);
      } else {
        vf scale{}, zero{};
        for (int k = 0; k < VL; k++) {
          const int64_t number = channel + k < U.columns ? (channel + k) / U.group : groups - 1;
          scale[k] = values[number];
          zero[k] = values[groups + number];
        }
        weight = (__builtin_convertvector(raw & windows.mask, vf) - zero) * scale;
      }
      for (int m = 0; m < M; m++) acc[m][q] += weight * z[m * ldz + r];
    }
  }
  for (int m = 0; m < M; m++)
    for (int q = 0; q < Q; q++) store(sum + m * ldy + o + q * VL, acc[m][q]);
}

template <int M>
static void left_rows(const Packed& U, const float* values, const float* z, int64_t ldz, int64_t o, int64_t valid, float* sum, int64_t ldy, Tail& tail) {
  constexpr int Q = 64 / VL;
  const Windows& windows = windows_of(U.bits);
  if (U.bits <= LOOKED_UP) left_block<M, Q, true>(U, windows, values, z, ldz, o, valid, sum, ldy, tail);
  else left_block<M, Q, false>(U, windows, values, z, ldz, o, valid, sum, ldy, tail);
}

static void left_task(int64_t begin, int64_t end, void* context) {
  const DeltaJob& job = *(const DeltaJob*)context;
  const int64_t pieces = (job.outputs + 63) / 64;
  Tail tail;
  for (int64_t item = begin; item < end; item++) {
    const Tenant& tenant = job.tenants[item / pieces];
    const int64_t o = item % pieces * 64, valid = job.outputs - o < 64 ? job.outputs - o : 64;
    for (int64_t m = 0; m < tenant.num_rows; m++) {
      const int64_t row = job.row_numbers[tenant.first_row + m];
      float* sum = job.sum + (tenant.first_row + m) * job.ldy;
      widen(job.dtype, job.y, row * job.outputs + o, valid, sum + o);
    }
    int64_t rank = 0, before = 0;
    for (int64_t t = 0; t < item / pieces; t++) before += total_rank(job, job.tenants[t]);
    for (int64_t g = 0; g < tenant.num_groups; g++) {
      const Packed& U = job.groups[tenant.first_group + g].U;
      const float* values = job.values + (before + rank) * 2 * U.groups();
      for (int64_t m = 0, some; m < tenant.num_rows; m += some) {
        some = whole_rows(tenant.num_rows - m);
        some = some > 4 ? 4 : some;
        const int64_t at = tenant.first_row + m;
        const float* z = job.z + at * job.ldz + rank;
        float* sum = job.sum + at * job.ldy;
        if (some == 4) left_rows<4>(U, values, z, job.ldz, o, valid, sum, job.ldy, tail);
        else if (some == 2) left_rows<2>(U, values, z, job.ldz, o, valid, sum, job.ldy, tail);
        else left_rows<1>(U, values, z, job.ldz, o, valid, sum, job.ldy, tail);
      }
      rank += U.rows;
    }
    for (int64_t m = 0; m < tenant.num_rows; m++)
      narrow(job.sum + (tenant.first_row + m) * job.ldy + o, valid, job.dtype, job.out, job.row_numbers[tenant.first_row + m] * job.outputs + o);
  }
}

// `out` holds a copy of y already where rows have no tenant.
static void delta_product(const Triplets* groups, const Tenant* tenants, int64_t num_tenants, const int64_t* row_numbers, int64_t rows, const void* x, const void* y, int64_t dtype, void* out) {
  static thread_local Scratch scratch;
  if (num_tenants == 0) return;
  int64_t inputs = 0, outputs = 0, most = 0, items = 0, ranks = 0, left_groups = 0;
  for (int64_t t = 0; t < num_tenants; t++) {
    int64_t rank = 0;
    for (int64_t g = 0; g < tenants[t].num_groups; g++) {
      const Triplets& group = groups[tenants[t].first_group + g];
      inputs = group.V.columns;
      outputs = group.U.columns;
      left_groups = group.U.groups();
      rank += group.V.rows;
      items += (group.V.rows + 3) / 4;
    }
    most = rank > most ? rank : most;
    ranks += rank;
  }
  if (most == 0) return;
  const int64_t ldx = padded(inputs), ldz = padded(most), ldy = (outputs + 63) / 64 * 64;
  float* memory = scratch.floats(rows * (ldx + ldz + ldy) + 2 * ranks * left_groups);
  DeltaJob job{groups, tenants, row_numbers, memory, memory + rows * ldx, memory + rows * (ldx + ldz), memory + rows * (ldx + ldz + ldy), ldx, ldz, ldy, dtype, num_tenants, y, out, outputs, 64};
  for (int64_t n = 0; n < rows; n++) {
    widen(dtype, x, row_numbers[n] * inputs, inputs, memory + n * ldx);
    std::memset(memory + n * ldx + inputs, 0, (ldx - inputs) * sizeof(float));
  }
  in_parallel(items, 4 * inputs, right_task, &job);
  in_parallel(num_tenants * ((outputs + 63) / 64), 64 * most, left_task, &job);
}

// ---- whole weights, for many rows ----------------------------------------------------------------

struct WriteJob {
  const Packed* packed;
  const CodebookJob* codebook;
  const Windows& windows;
  int64_t dtype;
  void* weight;
};

template <bool TABLE> static void write_rows(const WriteJob& job, int64_t begin, int64_t end) {
  const Packed& w = *job.packed;
  const Windows& windows = job.windows;
  const int64_t groups = w.groups(), row_bits = w.columns * w.bits;
  static thread_local Scratch scratch;
  float* line = scratch.floats(w.columns + 2 * VL);
  alignas(64) float scales[VL], zeros[VL];
  Tail tail;
  for (int64_t row = begin; row < end; row++) {
    const int64_t phase = (row * row_bits) & 7;
    const uint8_t* stream = tail.readable(w.codes + ((row * row_bits) >> 3), w.codes + w.bytes(), (phase + row_bits + 7) >> 3);
    for (int64_t g = 0; g < groups; g++) {
      if (g % VL == 0) group_values(w, windows, row, g, groups - g < VL ? groups - g : VL, scales, zeros);
      Group<TABLE> group;
      group.set(scales[g % VL], zeros[g % VL], windows.bits);
      const int64_t stop = (g + 1) * w.group < w.columns ? (g + 1) * w.group : w.columns;
      for (int64_t i = g * w.group; i < stop; i += VL) {
        const int64_t at = phase + i * windows.bits;
        store(line + i, group.weights(raw_codes(stream, at, windows.at[at & 7], windows.bits), windows.mask));
      }
    }
    narrow(line, w.columns, job.dtype, job.weight, row * w.columns);
  }
}

static void write_packed_task(int64_t begin, int64_t end, void* context) {
  const WriteJob& job = *(const WriteJob*)context;
  if (job.packed->bits <= LOOKED_UP) write_rows<true>(job, begin, end);
  else write_rows<false>(job, begin, end);
}

// W [rows, columns].
static void write_packed(const Packed& w, int64_t dtype, void* weight) {
  const Windows& windows = windows_of(w.bits);
  WriteJob job{&w, nullptr, windows, dtype, weight};
  in_parallel(w.rows, w.columns, write_packed_task, &job);
}

static void write_codebook_task(int64_t begin, int64_t end, void* context) {
  const WriteJob& write = *(const WriteJob*)context;
  const CodebookJob& job = *write.codebook;
  const Codebook& w = job.w;
  const int64_t T = job.tile * w.d, tiles = (w.J() + job.tile - 1) / job.tile;
  static thread_local Scratch block_memory, line_memory;
  uint8_t* block = (uint8_t*)block_memory.floats((block_stride(job) + 192) / 4);
  float* line = line_memory.floats(tiles * T + VL);
  for (int64_t i = begin; i < end; i++) {
    for (int64_t tile = 0; tile < tiles; tile++) {
      gather(job, tile, i, 1, block, block_stride(job));
      widen(w.dtype, block, 0, T, line + tile * T);
    }
    if (w.scales != nullptr)
      for (int64_t o = 0; o < w.out; o++) line[o] *= job.sum[o];
    narrow(line, w.out, write.dtype, write.weight, i * w.out);
  }
}

// The transposed weight [in, out].
static void write_codebook(const Codebook& w, int64_t dtype, void* weight) {
  static thread_local Scratch last, scales;
  const Windows& windows = windows_of(w.bits);
  copy_last(w, last);
  float* factors = scales.floats(w.out + VL);
  if (w.scales != nullptr) widen(F16, w.scales, 0, w.out, factors);
  const CodebookJob job{w, windows, nullptr, factors, 0, 0, 0, dtype, tile_codes(w), (const uint8_t*)last.data, nullptr, 0, nullptr, nullptr};
  WriteJob write{nullptr, &job, windows, dtype, weight};
  in_parallel(w.in, w.out, write_codebook_task, &write);
}

} // namespace SPACE
} // namespace

#undef LEVEL
#undef SPACE
#endif // LEVEL
