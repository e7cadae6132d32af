// The instructions that C++ has no word for, each twice: for nvcc, and for a host compiler, where the test-only
// emulator (tests/csrc/emulator.h) runs thread blocks of the same kernels on a CPU. Kernels use these and no other
// intrinsic.
//
// A warp is 32 lanes. In fragments of matrices a lane is written as (g, t) = (lane / 4, lane % 4). The layouts are
// those of the PTX ISA, "Matrix fragments for mma.m16n8k16 / mma.m16n8k32" and "ldmatrix"; sm_80 is the first to have
// them all.
//
// Shared memory is addressed by byte offsets into the one dynamic allocation of the CTA, as PTX does.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define VITRAIL_HOST 0
#define VITRAIL_INLINE __device__ __forceinline__
#else
#include <cmath>
#include <cstring>

#include "emulator.h"
#define VITRAIL_HOST 1
#define VITRAIL_INLINE inline
#endif

namespace vitrail {

// What one instruction moves: 8 and 16 bytes.
struct alignas(8) Word2 {
  uint32_t word[2];
};
struct alignas(16) Word4 {
  uint32_t word[4];
};

// The two 16-bit floats, as types that are only names: values of them are raw bits, two to a register.
struct BFloat16 {};
struct Half {};

// ---- Where a thread is, and what it waits for -----------------------------------------------------------------------

// threadIdx.x and blockIdx.x: CTAs and grids are one-dimensional.
VITRAIL_INLINE int thread_index() {
#if VITRAIL_HOST
  return emulator::thread_index();
#else
  return static_cast<int>(threadIdx.x);
#endif
}
VITRAIL_INLINE int block_index() {
#if VITRAIL_HOST
  return emulator::block_index();
#else
  return static_cast<int>(blockIdx.x);
#endif
}

// All threads of the CTA get here before any goes on; what they wrote to memory before, all see after.
VITRAIL_INLINE void block_barrier() {
#if VITRAIL_HOST
  emulator::block_barrier();
#else
  __syncthreads();
#endif
}

// The same for the 32 lanes of a warp.
VITRAIL_INLINE void warp_barrier() {
#if VITRAIL_HOST
  emulator::warp_barrier();
#else
  __syncwarp();
#endif
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

#if !VITRAIL_HOST
extern __shared__ __align__(128) unsigned char shared_memory[];

VITRAIL_INLINE uint32_t shared_address(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + offset;
}
#endif

// LDS and STS of a T; `offset` is a multiple of its size.
template <typename T>
VITRAIL_INLINE T load_shared(uint32_t offset) {
#if VITRAIL_HOST
  T value;
  std::memcpy(&value, emulator::read_shared(offset, sizeof(T)), sizeof(T));
  return value;
#else
  return *reinterpret_cast<const T*>(shared_memory + offset);
#endif
}
template <typename T>
VITRAIL_INLINE void store_shared(uint32_t offset, const T& value) {
#if VITRAIL_HOST
  std::memcpy(emulator::write_shared(offset, sizeof(T)), &value, sizeof(T));
#else
  *reinterpret_cast<T*>(shared_memory + offset) = value;
#endif
}

// LDG and STG of a T, which is aligned to its size. `load_global` is for memory that the kernel does not write.
template <typename T>
VITRAIL_INLINE T load_global(const T* pointer) {
#if VITRAIL_HOST
  return *emulator::global(pointer);
#else
  return __ldg(pointer);
#endif
}
template <>
VITRAIL_INLINE Word4 load_global(const Word4* pointer) {
#if VITRAIL_HOST
  return *emulator::global(pointer);
#else
  const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(pointer));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
#endif
}
template <>
VITRAIL_INLINE Word2 load_global(const Word2* pointer) {
#if VITRAIL_HOST
  return *emulator::global(pointer);
#else
  const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(pointer));
  return {{loaded.x, loaded.y}};
#endif
}
template <typename T>
VITRAIL_INLINE void store_global(T* pointer, const T& value) {
#if VITRAIL_HOST
  *emulator::global(pointer) = value;
#else
  *pointer = value;
#endif
}
// cp.async (LDGSTS): copies kBytes from global to shared memory while the thread goes on. With `present` false nothing
// is read and zeros are written. Both addresses are multiples of kBytes. 16 bytes go past the L1 cache, as they are
// needed once; with kStream the L2 cache lets go of them first, which is for weights that are read once a launch.
template <int kBytes, bool kStream = false>
VITRAIL_INLINE void copy_async(uint32_t offset, const void* source, bool present = true) {
  static_assert(kBytes == 8 || kBytes == 16);
#if VITRAIL_HOST
  emulator::copy_async(offset, source, kBytes, present);
#else
  const int read = present ? kBytes : 0;
  const uint32_t to = shared_address(offset);
  if constexpr (kStream) {
    static_assert(kBytes == 16);
    asm volatile(
        "{\n"
        ".reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, policy;\n"
        "}\n" ::"r"(to),
        "l"(source), "r"(read)
        : "memory");
  } else if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(source), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(to), "l"(source), "r"(read) : "memory");
  }
#endif
}

// Ends a group of this thread's copies, which may be empty.
VITRAIL_INLINE void commit_copies() {
#if VITRAIL_HOST
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until all but the last kPending groups of *this thread's* copies are there; others need a barrier besides.
template <int kPending>
VITRAIL_INLINE void wait_for_copies() {
#if VITRAIL_HOST
  emulator::wait_for_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// ldmatrix.x4: four matrices of 8 rows of 16 bytes. Lane 8 i + r gives the address of row r of matrix i; lane (g, t)
// gets in word i the bytes 4 t .. 4 t + 3 of row g of matrix i. The eight rows of a matrix are read without conflict if
// they lie in different 16-byte columns of the 128 bytes that shared memory serves at a time.
VITRAIL_INLINE Word4 load_matrices(uint32_t row_offset) {
#if VITRAIL_HOST
  const emulator::Lanes<uint32_t>& rows = emulator::gather(row_offset, "ldmatrix");
  emulator::count_bank_conflicts(rows);
  const int lane = thread_index() % 32;
  Word4 words;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&words.word[i], emulator::read_shared(rows[8 * i + lane / 4] + 4 * (lane % 4), 4), 4);
  }
  return words;
#else
  Word4 w;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
               : "r"(shared_address(row_offset))
               : "memory");
  return w;
#endif
}

// ---- Arithmetic on bits ---------------------------------------------------------------------------------------------

// LOP3: any function of three bits, for all 32 at once; bit (4 a + 2 b + c) of kTable is f(a, b, c). So 0xea, with
// tables 0xf0, 0xcc and 0xaa of a, b and c themselves, is (a & b) | c.
template <int kTable>
VITRAIL_INLINE uint32_t logic3(uint32_t a, uint32_t b, uint32_t c) {
#if VITRAIL_HOST
  uint32_t result = 0;
  for (int row = 0; row < 8; ++row) {
    if (kTable >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return result;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return result;
#endif
}

// PRMT: four of the eight bytes of a and b, which are 0..3 and 4..7, one hexadecimal digit of kBytes each.
template <int kBytes>
VITRAIL_INLINE uint32_t permute_bytes(uint32_t a, uint32_t b) {
#if VITRAIL_HOST
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const int byte = kBytes >> 4 * i & 7;
    result |= ((byte < 4 ? a : b) >> byte % 4 * 8 & 0xff) << 8 * i;
  }
  return result;
#else
  return __byte_perm(a, b, kBytes);
#endif
}

VITRAIL_INLINE float float_of_bits(uint32_t bits) {
#if VITRAIL_HOST
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#else
  return __uint_as_float(bits);
#endif
}

// ---- 16-bit floats, two to a register, the first in the low half
// ------------------------------------------------------

#if VITRAIL_HOST
// To nearest, ties to even, as the instructions round.
inline uint32_t round_to(BFloat16, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t round_to(Half, float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // A unit in the last place: 2^(exponent - 10), and 2^-24 for subnormal numbers.
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const float units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  return sign | (static_cast<uint32_t>(units) + (static_cast<uint32_t>(exponent + 14) << 10));
}
inline float widen(BFloat16, uint32_t bits) { return float_of_bits(bits << 16); }
inline float widen(Half, uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
#endif

// cvt.rn.{bf16x2,f16x2}.f32: two floats, rounded.
template <typename Float>
VITRAIL_INLINE uint32_t pack_floats(float low, float high) {
#if VITRAIL_HOST
  return round_to(Float{}, low) | round_to(Float{}, high) << 16;
#else
  uint32_t packed;
  if constexpr (std::is_same_v<Float, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#endif
}

// One of 16 bits as a float, exactly.
template <typename Float>
VITRAIL_INLINE float to_float(uint32_t bits) {
#if VITRAIL_HOST
  return widen(Float{}, bits & 0xffff);
#else
  if constexpr (std::is_same_v<Float, BFloat16>) {
    return float_of_bits(bits << 16);
  } else {
    float value;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
    return value;
  }
#endif
}

// x + y by halves: fma.rn with a factor of one, since sm_80 has no bf16x2 addition.
template <typename Float>
VITRAIL_INLINE uint32_t add2(uint32_t x, uint32_t y) {
#if VITRAIL_HOST
  return pack_floats<Float>(to_float<Float>(x) + to_float<Float>(y),
                            to_float<Float>(x >> 16) + to_float<Float>(y >> 16));
#else
  uint32_t sum;
  if constexpr (std::is_same_v<Float, BFloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(sum) : "r"(x), "r"(0x3f803f80u), "r"(y));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(sum) : "r"(x), "r"(0x3c003c00u), "r"(y));
  }
  return sum;
#endif
}

// ex2.approx.ftz, 2^x to 2 units in the last place.
VITRAIL_INLINE float exp2_approximately(float x) {
#if VITRAIL_HOST
  return std::exp2(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
#endif
}

// The nearest integer, ties to even, kept within -127..127; NaN becomes 0.
VITRAIL_INLINE int round_to_int8(float x) {
#if VITRAIL_HOST
  if (std::isnan(x)) return 0;
  return static_cast<int>(std::nearbyint(x < -127.0f ? -127.0f : x > 127.0f ? 127.0f : x));
#else
  const int rounded = __float2int_rn(x);
  return max(-127, min(127, rounded));
#endif
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// mma.m16n8k16 (HMMA): sum += A B of 16-bit floats, summed in float32. Lane (g, t) holds
//   a: A[g][2 t, +1], A[g + 8][2 t, +1], A[g][2 t + 8, +9], A[g + 8][2 t + 8, +9]     (A is 16 x 16)
//   b: B[2 t, +1][g], B[2 t + 8, +9][g]                                               (B is 16 x 8)
//   sum: S[g][2 t], S[g][2 t + 1], S[g + 8][2 t], S[g + 8][2 t + 1]                   (S is 16 x 8)
template <typename Float>
VITRAIL_INLINE void multiply_float(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if VITRAIL_HOST
  struct Operands {
    uint32_t a[4], b[2];
  };
  const emulator::Lanes<Operands>& lanes =
      emulator::gather(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "mma.m16n8k16");
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, shift = 16 * (k % 2);
      const uint32_t left = lanes[lane / 4 * 4 + t].a[i / 2 + k / 8 * 2] >> shift;
      const uint32_t right = lanes[(lane % 4 * 2 + i % 2) * 4 + t].b[k / 8] >> shift;
      sum[i] += to_float<Float>(left) * to_float<Float>(right);
    }
  }
#else
  if constexpr (std::is_same_v<Float, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// mma.m16n8k32 (IMMA): sum += A B of int8, summed exactly in int32. Lane (g, t) holds four values of k to a word:
//   a: A[g][4 t ..], A[g + 8][4 t ..], A[g][4 t + 16 ..], A[g + 8][4 t + 16 ..]       (A is 16 x 32)
//   b: B[4 t ..][g], B[4 t + 16 ..][g]                                                (B is 32 x 8)
// and of the sum what it does in `multiply_float`.
VITRAIL_INLINE void multiply_int8(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if VITRAIL_HOST
  struct Operands {
    uint32_t a[4], b[2];
  };
  const emulator::Lanes<Operands>& lanes =
      emulator::gather(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "mma.m16n8k32");
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 32; ++k) {
      const int t = k % 16 / 4, shift = 8 * (k % 4);
      const uint32_t left = lanes[lane / 4 * 4 + t].a[i / 2 + k / 16 * 2] >> shift;
      const uint32_t right = lanes[(lane % 4 * 2 + i % 2) * 4 + t].b[k / 16] >> shift;
      sum[i] += static_cast<int8_t>(left) * static_cast<int8_t>(right);
    }
  }
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace vitrail

// ---- Kernels --------------------------------------------------------------------------------------------------------

// KERNEL(name, threads, CTAs an SM should hold, (parameters)) { body }: one entry of the cubin. On a host it also makes
// `name_run(void**)`, by which the emulator calls the kernel with pointers to its arguments.
#if VITRAIL_HOST
#define KERNEL(name, threads, ctas, parameters)                                               \
  extern "C" void name parameters;                                                            \
  extern "C" void name##_run(void** arguments) { vitrail::emulator::apply(name, arguments); } \
  extern "C" void name parameters
#else
#define KERNEL(name, threads, ctas, parameters) \
  extern "C" __global__ void __launch_bounds__(threads, ctas) name parameters
#endif
