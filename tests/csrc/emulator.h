// Runs the CTAs of a kernel on a CPU, one after the other: each thread is a fiber, and they take turns where they wait
// for each other, so that a run is deterministic. Wrong use is an error that names the threads and the address:
//   - two threads at the same byte of shared memory, one of them writing, with no barrier between them;
//   - a byte touched while an asynchronous copy to it is under way, or read before anything was written to it;
//   - addresses outside shared memory or the arguments' buffers, or not aligned to the access;
//   - lanes of a warp in different collective instructions, a thread that ends while others wait for it.
// An asynchronous copy takes place when it is waited for, the latest moment there is.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace vitrail::emulator {

int thread_index();
int block_index();

void block_barrier();
void warp_barrier();

// Checked addresses in shared memory; the access is noted.
const void* read_shared(uint32_t offset, uint32_t bytes);
void* write_shared(uint32_t offset, uint32_t bytes);

void copy_async(uint32_t offset, const void* source, uint32_t bytes, bool present);
void commit_copies();
void wait_for_copies(int pending);

void check_global(const void* pointer, std::size_t bytes);
template <typename T>
T* global(T* pointer) {
  check_global(pointer, sizeof(T));
  return pointer;
}

// What each lane of the warp gave; all lanes wait for each other. `operation` must be the same for all.
template <typename T>
using Lanes = std::array<T, 32>;
void* gather_bytes(const void* mine, std::size_t bytes, const char* operation);
template <typename T>
const Lanes<T>& gather(const T& mine, const char* operation) {
  return *static_cast<const Lanes<T>*>(gather_bytes(&mine, sizeof(T), operation));
}

// How often shared memory must be asked again for the rows of an ldmatrix.
void count_bank_conflicts(const Lanes<uint32_t>& rows);

template <typename... Parameters, std::size_t... kIndices>
void apply_indexed(void (*kernel)(Parameters...), void** arguments, std::index_sequence<kIndices...>) {
  kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[kIndices])...);
}
template <typename... Parameters>
void apply(void (*kernel)(Parameters...), void** arguments) {
  apply_indexed(kernel, arguments, std::index_sequence_for<Parameters...>{});
}

}  // namespace vitrail::emulator
